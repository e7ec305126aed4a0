"""`python -m tests.autoscaling FOLDER TRACE`: the planted run on a cluster that Ray's own autoscaler grows and shrinks.

The head has one CPU. Harvest actors fit on nodes of type `harvest` alone, simulator replicas on `simulator`; both types
start with no node, and Ray adds some as work asks for them. Nodes are processes of this machine, their CPUs are only
counted. In explain a simulator's node is removed under the searches. TRACE gets JSON: once a second the nodes of each
type that are up, and the stage.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import AutoscalingCluster

NODE_TYPES = {"harvest": {"CPU": 2, "GPU": 1}, "simulator": {"CPU": 3}}
"""What a node has; an actor takes all of it. The GPU is not there: Ray keeps what needs none off such nodes."""
MAX_NODES = 3
"""Of each type."""
IDLE_SECONDS = 6
HEAD = "ray.head.default"
"""The provider of fake nodes knows the head by this name."""


class FakeCluster(AutoscalingCluster):
    """As Ray's own, without its base file, which the wheel lacks, and without ending every Ray of this machine."""

    def _generate_config(
        self, head_resources: dict[str, Any], worker_node_types: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        types = worker_node_types | {HEAD: {"resources": head_resources, "node_config": {}, "max_workers": 0}}
        provider = {
            "type": "fake_multinode",
            "gcs_address": more["gcs_address"],
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        empty: dict[str, Any] = {f"{name}_commands": [] for name in commands} | {"cluster_synced_files": []}
        empty |= {name: {} for name in ("auth", "file_mounts", "docker")}
        return empty | {
            "cluster_name": "fake",
            "max_workers": 2 * MAX_NODES,
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": IDLE_SECONDS / 60,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": HEAD,
        }

    def begin(self, folder: str, address: str) -> None:
        """Starts the head, in a temporary folder of its own."""
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(self._config))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={address.rpartition(':')[2]}"]
        command += [
            "--num-cpus=1",
            "--include-dashboard=false",
            f"--autoscaling-config={config}",
            f"--temp-dir={folder}",
        ]
        more = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        subprocess.run(command, env=os.environ | more, check=True, stdout=subprocess.DEVNULL)

    def end(self, folder: str) -> None:
        """SIGKILL to every process of this cluster."""
        for process in psutil.process_iter(["cmdline"]):
            if folder in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid():
                process.kill()


def slowly() -> None:
    """In every worker: work takes long enough for nodes to come."""
    import rayinterp.harvest as harvest
    from rayinterp.planted import OracleSimulator

    def and_pause(method: Any, seconds: float) -> Any:
        def slow(self: Any, *arguments: Any) -> Any:
            time.sleep(seconds)
            return method(self, *arguments)

        return slow

    harvest.Harvester.__call__ = and_pause(harvest.Harvester.__call__, 4.0)
    OracleSimulator.simulate = and_pause(OracleSimulator.simulate, 3.0)


def node_types() -> Counter[str]:
    """Living nodes by type, the head left out."""
    counted: Counter[str] = Counter()
    for node in ray.nodes():
        has = {name: node["Resources"].get(name) for name in ("CPU", "GPU") if name in node["Resources"]}
        if node["Alive"]:
            counted.update(name for name, resources in NODE_TYPES.items() if has == resources)
    return counted


class Watch:
    """Looks at the cluster once a second."""

    def __init__(self) -> None:
        self.stage, self.marks, self._trace = "", [], []
        self._began, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            now = round(time.monotonic() - self._began, 1)
            self._trace.append({"seconds": now, "stage": self.stage, **{n: node_types()[n] for n in NODE_TYPES}})

    def mark(self, what: str) -> None:
        self.marks.append({"seconds": round(time.monotonic() - self._began, 1), "what": what})

    def end(self) -> dict[str, Any]:
        self._over.set()
        self._thread.join()
        return {"trace": self._trace, "marks": self.marks}


def wait_for_none(name: str, seconds: float = 120) -> None:
    """Until no node of that type is left."""
    deadline = time.monotonic() + seconds
    while node_types()[name]:
        assert time.monotonic() < deadline, f"nodes of type {name} do not leave"
        time.sleep(0.5)


def remove_one(name: str) -> None:
    """SIGKILL to the raylet of one node of that type, as when a spot node is taken away."""
    raylet = next(
        process
        for process in psutil.process_iter(["name"])
        if process.info["name"] == "raylet" and process.environ().get("RAY_NODE_TYPE_NAME") == name
    )
    raylet.kill()


def free_address() -> str:
    """Where the head may listen."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


OVERRIDES = (
    f"resources.harvest={{num_actors: 1, max_actors: {MAX_NODES}, num_cpus: 2, num_gpus: 1}}",
    f"resources.simulator={{num_actors: 0, max_actors: {MAX_NODES}, num_cpus: 3, "
    "target_ongoing: 1, upscale_seconds: 1, idle_seconds: 5}",
    "explainers={one: {method: tree, llm: knows, simulator: oracle, num_llm_roots: 2, depth: 3}, "
    "two: {method: tree, llm: mistaken, simulator: oracle, num_llm_roots: 2, depth: 3}, "
    "three: {method: lexical, simulator: oracle}}",
)


def main(folder: str, trace: str) -> None:
    from ray import serve

    from rayinterp.run import open_run, run_stage
    from tests.conftest import planted_config

    worker = {"node_config": {}, "min_workers": 0, "max_workers": MAX_NODES}
    types = {name: worker | {"resources": resources} for name, resources in NODE_TYPES.items()}
    address = free_address()
    cluster = FakeCluster({"CPU": 1}, types, gcs_address=address)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        cluster.begin(temporary, address)
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"worker_process_setup_hook": slowly},
            )
            watch = Watch()
            run = open_run(planted_config(Path(folder), *OVERRIDES))
            for stage in ("harvest", "index", "records"):
                watch.stage = stage
                run_stage(run, stage)
            watch.stage = "waiting"
            wait_for_none("harvest")
            removed: list[str] = []

            def remove_under_searches(done: int, total: int, note: Any = "") -> None:
                if not removed and node_types()["simulator"]:
                    remove_one("simulator")
                    removed.append("simulator")
                    watch.mark("a simulator node is removed")

            for stage in ("explain", "score"):
                watch.stage = stage
                run_stage(run, stage, remove_under_searches)
            watch.stage = "waiting"
            wait_for_none("simulator")
            for app in serve.status().applications:
                serve.delete(app)
            Path(trace).write_text(json.dumps(watch.end()))
            assert removed, "no node was removed"
        finally:
            ray.shutdown()
            cluster.end(temporary)


def draw(trace: Path, figure: Path) -> None:
    """Nodes against time, with the stages below."""
    from matplotlib.figure import Figure

    content = json.loads(trace.read_text())
    looks = content["trace"]
    seconds = [look["seconds"] for look in looks]
    canvas = Figure(figsize=(9, 3), layout="constrained")
    axes = canvas.subplots()
    for name, style in zip(NODE_TYPES, ("-", "--"), strict=True):
        axes.step(seconds, [look[name] for look in looks], style, where="post", label=f"{name} nodes")
    begun = [look for before, look in pairwise([{"stage": ""}, *looks]) if look["stage"] != before["stage"]]
    for place, look in enumerate(begun):
        axes.axvline(look["seconds"], color="0.85", zorder=0)
        axes.text(look["seconds"] + 0.5, MAX_NODES + 0.65 - 0.2 * (place % 2), look["stage"], size=8, color="0.4")
    for mark in content["marks"]:
        place = {"xy": (mark["seconds"], 1), "xytext": (mark["seconds"], 1.5), "ha": "right"}
        axes.annotate(mark["what"], **place, size=8, arrowprops={"arrowstyle": "->"})
    axes.set(
        xlabel="seconds", ylabel="nodes", ylim=(0, MAX_NODES + 0.9), xlim=(0, seconds[-1]), yticks=range(MAX_NODES + 1)
    )
    axes.legend(loc="center left", fontsize=8)
    canvas.savefig(figure, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
