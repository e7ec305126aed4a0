"""Cluster files pass Ray's own validation, and every stage of every config fits on one of their nodes."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from rayinterp.config import StageResources, load_config

ROOT = Path(__file__).parent.parent
LAUNCHER = [ROOT / "cluster" / name for name in ("aws.yaml", "gcp.yaml")]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def node_types(path):
    """As Ray's autoscaler sees them, by name."""
    content = yaml.safe_load(path.read_text())
    if path in LAUNCHER:
        return content["available_node_types"]
    cluster = content["spec"].get("rayClusterSpec") or content["spec"]["rayClusterConfig"]
    made = {"metadata": {"name": "rayinterp", "namespace": "default"}, "spec": cluster}  # by KubeRay
    return _derive_autoscaling_config_from_ray_cr(made)["available_node_types"]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_workers_on_kubernetes_are_as_large_and_as_many_as_on_aws(path):
    def sizes(nodes):
        """Most nodes of each size; spot and on-demand nodes together, since one group has both on Kubernetes."""
        most = {}
        for node in nodes.values():
            size = (node["resources"]["CPU"], node["resources"].get("GPU", 0))
            most[size] = most.get(size, 0) + node["max_workers"]
        return most

    on_kubernetes = node_types(path)
    assert sizes(on_kubernetes) == sizes(node_types(LAUNCHER[0]))
    assert all(node["min_workers"] == 0 for node in on_kubernetes.values())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_ray_accepts_the_file(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    config["cluster_synced_files"] = []  # `ray up` adds it
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert "GPU" not in head["resources"]
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert workers and all(node["min_workers"] == 0 < node["max_workers"] for node in workers.values())
    assert all(f"{name}_spot" in workers for name in workers if not name.endswith("_spot"))
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=lambda path: path.stem)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: "-".join(path.relative_to(ROOT / "configs").parts))
def test_every_stage_fits_on_a_node(path, config):
    loaded = load_config(config)
    nodes = [node["resources"] for node in node_types(path).values()]
    for stage, resources in loaded.resources:
        if isinstance(resources, StageResources):
            assert any(
                resources.num_cpus <= node["CPU"] and resources.num_gpus <= node.get("GPU", 0) for node in nodes
            ), stage
