"""`python -m tests.run_planted FOLDER STAGE...`: the planted run in a process and a Ray of its own, to be killed.

Every commit is made at once and followed by a pause, in the driver and in all workers, so that what a test sees is a
part of a stage and not the whole.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray

PAUSE_SECONDS = 0.7


def dawdle() -> None:
    """Slows this process's commits down."""
    import rayinterp.tables as tables

    def and_pause(method):
        def slow(self, *arguments):
            result = method(self, *arguments)
            time.sleep(PAUSE_SECONDS)
            return result

        return slow

    tables.COMMIT_SECONDS = 0.0
    tables.Tables.commit = and_pause(tables.Tables.commit)
    tables.Committer._write = and_pause(tables.Committer._write)


def start_cluster(setup_hook: Callable[[], None]) -> None:
    """A Ray of this process's own, and none that another test has under way.

    Args:
        setup_hook: Run in every worker.
    """
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": setup_hook},
    )


if __name__ == "__main__":
    from tests.conftest import planted_config, run_all

    start_cluster(dawdle)
    dawdle()
    # One shard of work in flight at a time, or all of them are written before the first is committed.
    run_all(planted_config(Path(sys.argv[1]), "resources.searches_per_actor=1"), sys.argv[2:])
