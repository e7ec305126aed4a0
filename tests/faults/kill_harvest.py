"""`python -m tests.faults.kill_harvest FOLDER`: the planted harvest on a cluster of three nodes that loses, as shards
come in, an actor, the committer and a node. FOLDER holds the planted corpus. Prints what was killed, a line each."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from tests.run_planted import dawdle


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def kill_one(name: str) -> None:
    """SIGKILL to the first Ray worker process of that name."""
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith(f"ray::{name}") and is_ours(process):
            os.kill(process.pid, signal.SIGKILL)
            say(f"killed {name}")
            return
    raise AssertionError(f"no process {name}")


def is_ours(process: psutil.Process) -> bool:
    """Of this script's cluster: tests beside it have workers of the same names."""
    session = ray.get_runtime_context().worker.node.get_session_dir_path()
    return any(session in " ".join(parent.cmdline()) for parent in process.parents())


def harvest_slowly() -> None:
    """In every worker: the last shards come seconds after the first, and the pool is there to be struck."""
    dawdle()
    import rayinterp.tables as tables

    write = tables.Tables.write_fragments

    def slow(self: tables.Tables, *arguments: Any) -> list[str]:
        time.sleep(2)
        return write(self, *arguments)

    tables.Tables.write_fragments = slow


if __name__ == "__main__":
    from rayinterp.run import open_run, run_stage
    from tests.conftest import planted_config

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": harvest_slowly},
    )
    dawdle()
    faults = {
        1: lambda: kill_one("MapWorker(Map(Harvester)"),
        3: lambda: kill_one("FragmentCommitter"),
        5: lambda: (cluster.remove_node(nodes.pop(), allow_graceful=False), say("killed a node")),
    }

    def on_progress(done: int, total: int, note: str = "") -> None:
        for threshold in [t for t in faults if t <= done < total]:
            faults.pop(threshold)()

    run = open_run(planted_config(Path(sys.argv[1]), "resources.harvest={num_actors: 2, num_cpus: 0.5}"))
    run_stage(run, "harvest", on_progress)
    assert not faults, f"finished before {sorted(faults)}"
    ray.shutdown()
    cluster.shutdown()
