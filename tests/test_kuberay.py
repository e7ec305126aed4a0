"""Kubernetes objects: pods by Kubernetes' schemas, KubeRay's own by the fields of its definitions, Serve's by Serve.

`kuberay_fields.json` holds what the published definitions (CRDs) allow where our manifests go: the fields of each type,
those that must be there, and what a field holds: a plain type, an enum, another of the types, or a list of one.
"""

import copy
import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rayinterp.config import LLMSimulatorConfig, llms_used, load_config, service_name
from rayinterp.simulate.serve import StandingSimulator

ROOT = Path(__file__).parent.parent
MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
FACTS = json.loads((ROOT / "tests" / "kuberay_fields.json").read_text())
PLAIN = {"string": str, "integer": int, "number": int | float, "boolean": bool, "object": dict}
KUBERNETES = ("1.31", "1.37")


def load(path):
    return yaml.safe_load(path.read_text())


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def pod_templates(manifest):
    """By name: the head, each group of workers, and whoever submits the job."""
    cluster = cluster_of(manifest)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in manifest["spec"]:
        found["submitter"] = manifest["spec"]["submitterPodTemplate"]
    return found


def containers(manifest):
    return [container for pod in pod_templates(manifest).values() for container in pod["spec"]["containers"]]


def as_pod(template):
    return {"apiVersion": "v1", "kind": "Pod", **template}


def as_security_context_holder(context):
    """A pod with nothing of interest but a container's security context."""
    return as_pod({"metadata": {"name": "x"}, "spec": {"containers": [{"name": "x", "securityContext": context}]}})


def faults(value, wanted, where):
    """What KubeRay's definitions refuse in a value, each with its place.

    Args:
        wanted: What a field holds, as in `kuberay_fields.json`.
    """
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [fault for i, one in enumerate(value) for fault in faults(one, wanted[0], f"{where}[{i}]")]
    if isinstance(wanted, dict):
        return [] if value in wanted["enum"] else [f"{where} is {value!r}, not one of {wanted['enum']}"]
    if wanted == "strings":
        return [] if all(isinstance(part, str) for pair in value.items() for part in pair) else [f"{where}: not text"]
    if wanted in ("PodTemplate", "SecurityContext"):
        try:
            pod = as_pod(value) if wanted == "PodTemplate" else as_security_context_holder(value)
            for version in KUBERNETES:
                kubernetes_validate.validate(pod, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{where}: {error}"]
        return []
    if wanted in PLAIN:
        fits = isinstance(value, PLAIN[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
        return [] if fits else [f"{where} is {value!r}, not of type {wanted}"]
    fields = FACTS["fields"][wanted]
    missing = [f"{where}.{name} is missing" for name in FACTS["required"].get(wanted, []) if name not in value]
    unknown = [f"{where}.{name} is not a field of {wanted}" for name in value if name not in fields]
    inner = [faults(value[name], fields[name], f"{where}.{name}") for name in value if name in fields]
    return missing + unknown + [fault for one in inner for fault in one]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_knows_every_field(path):
    manifest = load(path)
    assert faults(manifest, manifest["kind"], manifest["kind"]) == []


def rename(node, old, new):
    node[new] = node.pop(old)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda spec, cluster: rename(spec, "backoffLimit", "backOffLimit"), "not a field of RayJobSpec"),
        (lambda spec, cluster: spec.update(backoffLimit="3"), "not of type integer"),
        (lambda spec, cluster: spec.update(shutdownAfterJobFinishes=1), "not of type boolean"),
        (lambda spec, cluster: cluster.pop("headGroupSpec"), "headGroupSpec is missing"),
        (lambda spec, cluster: cluster["workerGroupSpecs"][1].pop("minReplicas"), "[1].minReplicas is missing"),
        (lambda spec, cluster: cluster["headGroupSpec"]["rayStartParams"].update({"num-cpus": 8}), "not text"),
        (lambda spec, cluster: cluster["autoscalerOptions"].update(upscalingMode="Fast"), "not one of"),
        (lambda spec, cluster: cluster["workerGroupSpecs"][0]["template"]["spec"].update(toleration=[]), "toleration"),
        (lambda spec, cluster: spec["submitterPodTemplate"]["spec"].pop("containers"), "containers"),
    ],
)
def test_the_check_of_fields_can_fail(spoil, fault):
    manifest = copy.deepcopy(load(ROOT / "cluster" / "kuberay" / "rayjob.yaml"))
    spoil(manifest["spec"], cluster_of(manifest))
    found = faults(manifest, "RayJob", "RayJob")
    assert found and fault in found[0]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_have_no_rights_that_they_do_not_need(path):
    manifest = load(path)
    for name, pod in pod_templates(manifest).items():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["securityContext"]["runAsUser"], name
    for container in containers(manifest):
        context = container["securityContext"]
        assert not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    accounts = {name: pod["spec"].get("serviceAccountName") for name, pod in pod_templates(manifest).items()}
    assert accounts.pop("head") == "rayinterp-head" not in accounts.values()  # the head's may start and end pods
    head = cluster_of(manifest)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
    assert "LoadBalancer" not in path.read_text() and "NodePort" not in path.read_text()
    assert cluster_of(manifest)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_keys_come_from_secrets_and_the_llms_reach_the_head_alone(path):
    manifest, config = load(path), load_config(ROOT / "configs" / "gemma-2-9b.yaml")
    for container in containers(manifest):
        for variable in container.get("env", []):
            if variable == {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"}:
                continue
            assert set(variable) == {"name", "valueFrom"} and set(variable["valueFrom"]) == {"secretKeyRef"}
    keys = {config.llms[name].api_key_env for name in llms_used(config)}
    with_keys = {
        name
        for name, pod in pod_templates(manifest).items()
        if keys & {variable["name"] for container in pod["spec"]["containers"] for variable in container.get("env", [])}
    }
    assert with_keys == {"head"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_workers_go_to_spot_nodes_where_there_are_any_and_the_head_never(path):
    pods = pod_templates(load(path))
    (term,) = pods.pop("head")["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    shunned = {one["key"]: one["values"] for one in term["matchExpressions"] if one["operator"] == "NotIn"}
    pods.pop("submitter", None)
    for name, pod in pods.items():
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        assert "requiredDuringSchedulingIgnoredDuringExecution" not in affinity, (
            name
        )  # else nothing where spot is short
        liked = [
            one
            for preferred in affinity["preferredDuringSchedulingIgnoredDuringExecution"]
            for one in preferred["preference"]["matchExpressions"]
        ]
        assert {one["key"]: one["values"] for one in liked if one["operator"] == "In"} == shunned, name


def test_both_bring_the_same_cluster():
    job, service = (
        cluster_of(load(ROOT / "cluster" / "kuberay" / f"{name}.yaml")) for name in ("rayjob", "rayservice")
    )
    assert job == service


def test_the_job_runs_a_config_that_exists_and_goes_on_after_the_head_is_lost():
    spec = load(ROOT / "cluster" / "kuberay" / "rayjob.yaml")["spec"]
    python, script, config, run_dir = spec["entrypoint"].split()
    assert python == "python" and (ROOT / script).is_file() and (ROOT / config).is_file()
    assert run_dir.startswith("run_dir=s3://")  # of no cluster, so that the next one finds it
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]


def test_the_cluster_runs_the_pinned_ray():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for path in MANIFESTS:
        assert f"ray=={cluster_of(load(path))['rayVersion']}" in pins


def test_runs_find_the_simulator_that_the_service_keeps():
    spec = load(ROOT / "cluster" / "kuberay" / "rayservice.yaml")["spec"]
    served = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (app,) = served.applications
    module, builder = app.import_path.split(":")
    assert (module, builder) == ("rayinterp.simulate.serve", "build_simulator")
    assert app.route_prefix is None, "the proxies listen on every address of a pod"
    args = StandingSimulator.model_validate(app.args)
    config = load_config(ROOT / args.config, [*args.overrides, f"resources.standing=[{args.simulator}]"])
    first = next(name for name, arm in config.simulators.items() if isinstance(arm, LLMSimulatorConfig))
    assert args.simulator == first
    expected = service_name("simulator", args.simulator, config)
    assert app.name == expected, f"write name: {expected} in cluster/kuberay/rayservice.yaml"
