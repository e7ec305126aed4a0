"""`ray job submit -- python jobs/experiment.py NAME CONFIG [key=value ...]`: one of the paper's experiments."""

from rayinterp.cli import experiment, main_command

if __name__ == "__main__":
    main_command(experiment)
