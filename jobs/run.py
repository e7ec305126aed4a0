"""`ray job submit -- python jobs/run.py CONFIG [key=value ...]`: every stage in order."""

from rayinterp.cli import main_job
from rayinterp.run import STAGES

if __name__ == "__main__":
    main_job(STAGES)
