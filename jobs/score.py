"""`ray job submit -- python jobs/score.py CONFIG [key=value ...]`: grade explanations and controls on test."""

from rayinterp.cli import main_job

if __name__ == "__main__":
    main_job(("score",))
