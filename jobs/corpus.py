"""`ray job submit -- python jobs/corpus.py CONFIG [key=value ...]`: cut the corpus into token sequences."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("corpus",))
