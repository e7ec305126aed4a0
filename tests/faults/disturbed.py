"""`python -m tests.faults.disturbed FOLDER FAULT STAGE...`: stages of the planted run, in a process and a cluster of
its own, which FAULT strikes once; with `none`, undisturbed. Prints what was struck. FOLDER may be a URL."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

from tests.faults.kill_harvest import is_ours, say
from tests.run_planted import dawdle

OBJECT_STORE_BYTES = 100 * 2**20
"""Of every node, where the store is to be short."""
SLOW_SECONDS = 0.3
"""That a simulation takes, so that searches are under way when they are struck."""


def hurried() -> None:
    """In the driver and in every worker: retries come at once, work takes long enough to be struck."""
    dawdle()
    import rayinterp.explain.outage as outage
    from rayinterp.planted import OracleSimulator

    outage.PAUSE_SECONDS = 1.0
    simulate = OracleSimulator.simulate

    def slow(self: OracleSimulator, requests: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return simulate(self, requests)

    OracleSimulator.simulate = slow


def processes(name: str) -> Iterator[psutil.Process]:
    """Those of this cluster whose command line holds the name."""
    for process in psutil.process_iter(["cmdline"]):
        if name in " ".join(process.info["cmdline"] or [])[:200] and is_ours(process):
            yield process


def kill(name: str) -> Callable[[Cluster], None]:
    """SIGKILL to one worker process of that name, once there is one."""

    def strike(cluster: Cluster) -> None:
        process = next(processes(f"ray::{name}"), None)
        if process is None:
            raise LookupError(name)
        process.kill()

    return strike


def kill_driver(cluster: Cluster) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_raylet(cluster: Cluster) -> None:
    """Of a worker node, and with it all that runs there."""
    next(iter(cluster.worker_nodes)).kill_raylet()


def kill_head_raylet(cluster: Cluster) -> None:
    cluster.head_node.kill_raylet()


def remove_node(cluster: Cluster) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


HELD: list[Any] = []


def fill_object_store(cluster: Cluster) -> None:
    """Keeps more in the store than it has room for: what stages put there goes to disk and back."""
    HELD.extend(ray.put(np.full(10 * 2**20, place, dtype=np.uint8)) for place in range(15))


FAULTS: dict[str, tuple[str, Callable[[Cluster], None]]] = {
    "driver in harvest": ("harvest", kill_driver),
    "driver in explain": ("explain", kill_driver),
    "harvest actor": ("harvest", kill("MapWorker(Map(Harvester)")),
    "fragment committer": ("harvest", kill("FragmentCommitter")),
    "raylet of a node": ("harvest", kill_raylet),
    "raylet of the head": ("harvest", kill_head_raylet),
    "node removed in harvest": ("harvest", remove_node),
    "node removed in explain": ("explain", remove_node),
    "search actor": ("explain", kill("SearchActor")),
    "simulator replica": ("explain", kill("ServeReplica")),
    "committer of rows": ("explain", kill("Committer")),
    "object store full": ("harvest", fill_object_store),
}
"""The stage that is struck, and how."""


def main(folder: str, fault: str, stages: list[str]) -> None:
    from rayinterp.run import open_run, run_stage
    from tests.conftest import planted_config

    struck_stage, strike = FAULTS.get(fault, ("", remove_node))
    memory = {"object_store_memory": OBJECT_STORE_BYTES} if fault == "object store full" else {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **memory)
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": hurried},
    )
    hurried()
    waiting = [strike] if struck_stage else []

    def progress_of(stage: str) -> Callable[..., None]:
        def on_progress(done: int, total: int, note: Any = "") -> None:
            if stage != struck_stage or not waiting or done >= total or (stage == "harvest" and not done):
                return
            if fault.startswith("driver"):
                say(f"struck {fault} at {done} of {total}")
            try:
                waiting[0](cluster)
            except LookupError:  # it has not started yet
                return
            waiting.clear()
            say(f"struck {fault} at {done} of {total}")

        return on_progress

    more = os.environ.get("RAYINTERP_TEST_OVERRIDES", "").split(";")
    run = open_run(planted_config(folder, "resources.harvest={num_actors: 2, num_cpus: 0.5}", *filter(None, more)))
    for stage in stages:
        run_stage(run, stage, progress_of(stage))
    assert not waiting, f"{fault} was never struck"
    if fault == "object store full":
        from ray._private.internal_api import memory_summary

        say(next(line for line in memory_summary(cluster.address, stats_only=True).splitlines() if "Spilled" in line))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
