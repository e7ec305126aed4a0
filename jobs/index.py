"""`ray job submit -- python jobs/index.py CONFIG [key=value ...]`: embed every sequence."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("index",))
