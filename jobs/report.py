"""`ray job submit -- python jobs/report.py CONFIG [key=value ...]`: write the HTML report."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("report",))
