"""`python -m tests.run_planted FOLDER`: the planted run in a process and a Ray of its own, for tests that kill it.

Slowed down a little after every shard and every LLM call, so that there is a middle to be killed in.
"""

import sys
import time
from pathlib import Path

import rayinterp.tables
from rayinterp.run import connected
from tests.conftest import planted_config, run_all

if __name__ == "__main__":
    # Commit at once, and dawdle: what is visible when the test looks is then a part and not the whole.
    rayinterp.tables.COMMIT_SECONDS = 0.0
    original = rayinterp.tables.Tables.commit

    def slow_commit(self, table, fragments):
        original(self, table, fragments)
        time.sleep(0.5)

    rayinterp.tables.Tables.commit = slow_commit
    config = planted_config(Path(sys.argv[1]))
    with connected(config):
        run_all(config)
