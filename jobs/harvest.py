"""`ray job submit -- python jobs/harvest.py CONFIG [key=value ...]`: harvest feature activations of every sequence."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("harvest",))
