"""Cluster files pass Ray's own validation, and every stage of every config fits on one of their nodes."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

from rayinterp.config import StageResources, load_config

ROOT = Path(__file__).parent.parent
LAUNCHER = [ROOT / "cluster" / name for name in ("aws.yaml", "gcp.yaml")]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
SLURM = ROOT / "cluster" / "slurm.sh"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SLURM_SIZES = ("cpus-per-task", "gpus-per-node")
EXTRA_OF = {"s3": "s3", "gs": "gcs"}
"""Extras that open a run directory, by its scheme."""


def node_types(path):
    """As Ray's autoscaler sees them, by name."""
    if path == SLURM:
        cpus, gpus = (re.findall(rf"^#SBATCH --{n}=(\d+)$", path.read_text(), re.MULTILINE)[0] for n in SLURM_SIZES)
        return {"node": {"resources": {"CPU": int(cpus), "GPU": int(gpus)}}}
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


def launched(path, request, count):
    """Nodes by type that Ray's autoscaler would start for so many equal requests."""
    nodes = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=0,
            max_worker_nodes=node["max_workers"],
            priority=node.get("priority", 0),
            resources=node["resources"],
        )
        for name, node in node_types(path).items()
    }
    asked = [ResourceRequestByCount(request=ResourceRequestUtil.make(request), count=count)]
    wanted = SchedulingRequest(True, nodes, max_num_nodes=40, resource_requests=asked)
    reply = ResourceDemandScheduler().schedule(wanted)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_spot_nodes_come_first_and_the_rest_is_on_demand(path):
    nodes = node_types(path)
    assert launched(path, {"CPU": 16}, 6) == {"cpu_spot": 6}
    assert launched(path, {"CPU": 1}, 64) == {"cpu_spot": 4}
    assert launched(path, {"CPU": 48, "GPU": 4}, 3) == {"simulator_spot": 3}
    most = nodes["cpu_spot"]["max_workers"]
    assert launched(path, {"CPU": 16}, most + 2) == {"cpu_spot": most, "cpu": 2}


def test_nodes_of_google_with_a_gpu_have_a_driver_and_are_not_moved():
    nodes = [node for node in node_types(LAUNCHER[1]).values() if node["resources"].get("GPU")]
    assert len(nodes) == 4
    for node in nodes:
        assert "until nvidia-smi" in node["initialization_commands"][0]  # Ray looks once, and goes on without a GPU
        assert node["node_config"]["scheduling"]["onHostMaintenance"] == "TERMINATE"
        assert {"key": "install-nvidia-driver", "value": "True"} in node["node_config"]["metadata"]["items"]


def test_the_head_may_start_nodes_and_workers_may_not():
    """What the head is launched with, when it names no account of its own, is what Ray makes for it."""
    aws = {name: node["node_config"] for name, node in node_types(LAUNCHER[0]).items()}
    assert aws.pop("head")["IamInstanceProfile"] == {"Name": "rayinterp-head"}
    assert all(node["IamInstanceProfile"] == {"Name": "rayinterp"} for node in aws.values())
    assert all(node["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/") for node in aws.values())
    google = {name: node["node_config"] for name, node in node_types(LAUNCHER[1]).items()}
    assert "serviceAccounts" not in google.pop("head")
    assert all(node["serviceAccounts"][0]["email"].startswith("rayinterp@") for node in google.values())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_what_the_head_installs_is_pinned(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    assert not config["setup_commands"] and not config["worker_setup_commands"]
    (command,) = config["head_setup_commands"]
    (package,) = re.fullmatch(r"pip install --constraint ~/rayinterp/constraints\.txt (\S+)", command).groups()
    assert f"\n{package}==" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=lambda path: path.stem)
def test_the_image_opens_the_run_directory_that_the_file_names(path):
    schemes = set(re.findall(r"run_dir=(\w+)://", path.read_text()))
    installed = re.findall(r"EXTRAS=(\S+)", (ROOT / "cluster" / "Dockerfile").read_text())
    assert schemes and len(installed) == 2
    assert all(EXTRA_OF[scheme] in extras.split(",") for scheme in schemes for extras in installed)


@pytest.fixture
def allocation(tmp_path):
    """A Slurm allocation of two nodes whose commands write down what they were asked; RAY_STATUS is what Ray says."""
    commands = {
        "scontrol": "echo one; echo two",
        "srun": 'echo "srun $SRUN_CPUS_PER_TASK $RAY_AUTH_MODE=$RAY_AUTH_TOKEN $*" >> "$LOG"\n'
        '[[ "$*" == *hostname* ]] && echo 10.0.0.1 || sleep 3',
        "ray": 'exit "$RAY_STATUS"',
        "python": 'case "$*" in *token_hex*) echo secret;; *) echo "python $RAY_ADDRESS $*" >> "$LOG";; esac',
    }
    (tmp_path / "bin").mkdir()
    for name, does in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")

    def run(ray_status):
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "RAY_STATUS": str(ray_status),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "[one,two]",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_GPUS_ON_NODE": "4",
        }
        command = ["bash", str(SLURM), "configs/x.yaml", "run_dir=/shared/x"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return ended, (tmp_path / "log").read_text().splitlines()

    return run


def test_slurm_starts_ray_on_every_node_with_all_of_its_cores_and_then_the_run(allocation):
    ended, log = allocation(ray_status=0)
    assert ended.returncode == 0, ended.stderr
    started = [line for line in log if "ray start" in line]
    assert len(started) == 2 and all(line.startswith("srun 16 token=secret ") for line in started)
    assert all("--num-cpus=16 --num-gpus=4" in line for line in started)
    assert "python 10.0.0.1:20007 jobs/run.py configs/x.yaml run_dir=/shared/x" in log


def test_a_head_that_does_not_come_up_ends_the_allocation(allocation):
    ended, log = allocation(ray_status=1)
    assert ended.returncode == 1 and "no Ray head on one at port 20007" in ended.stderr
    assert not [line for line in log if line.startswith("python")]


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY, SLURM], ids=lambda path: path.stem)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: "-".join(path.relative_to(ROOT / "configs").parts))
def test_every_stage_fits_on_a_node(path, config):
    loaded = load_config(config)
    nodes = [node["resources"] for node in node_types(path).values()]
    for stage, resources in loaded.resources:
        if isinstance(resources, StageResources):
            assert any(
                resources.num_cpus <= node["CPU"] and resources.num_gpus <= node.get("GPU", 0) for node in nodes
            ), stage
