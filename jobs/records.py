"""`ray job submit -- python jobs/records.py CONFIG [key=value ...]`: choose each feature's records."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("records",))
