"""`ray job submit -- python jobs/explain.py CONFIG [key=value ...]`: propose and search explanations."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("explain",))
