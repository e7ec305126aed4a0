"""`ray job submit -- python jobs/tune_search.py CONFIG [key=value ...] --arm tree --num-samples 20 --features 8`: try
settings of a tree search on features that the run does not use."""

from rayinterp.cli import main_command, tune

if __name__ == "__main__":
    main_command(tune)
