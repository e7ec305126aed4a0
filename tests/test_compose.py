"""The image and what is composed around it: files that exist, ports on this machine alone, a list that Ray writes."""

import json
import re
import tomllib
from pathlib import Path

import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
COMPOSE = yaml.safe_load((CLUSTER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def mounts(service):
    """Source, target and whether it may be written, of every volume of a service."""
    for volume in SERVICES[service]["volumes"]:
        source, target, *mode = volume.split(":")
        yield source, target, mode != ["ro"]


def mounted_at(service, target):
    (source,) = (source for source, place, _ in mounts(service) if place == target)
    return CLUSTER / source


def test_every_port_is_on_this_machine_alone():
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(ports) == len(SERVICES)
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)
    assert not any({"network_mode", "privileged", "cap_add"} & set(service) for service in SERVICES.values())


def test_what_is_mounted_exists_and_the_files_are_not_written_to():
    named = set()
    for service in SERVICES:
        for source, _, writable in mounts(service):
            if source.startswith("."):
                assert (CLUSTER / source).is_file() and not writable, source
            else:
                named.add(source)
    assert named == set(COMPOSE["volumes"])


def test_the_head_is_built_from_the_dockerfile_and_owns_its_volumes():
    build = SERVICES["head"]["build"]
    context = (CLUSTER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).samefile(CLUSTER / "Dockerfile")
    (made,) = re.findall(r"^RUN mkdir --parents (.+)$", DOCKERFILE, re.MULTILINE)
    (home,) = re.findall(r"^WORKDIR (.+)$", DOCKERFILE, re.MULTILINE)
    assert {str(Path(home, folder)) for folder in made.split()} == {target for _, target, _ in mounts("head")}


def test_what_the_image_copies_and_installs_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = [line.split()[2:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY --chown=ray ")]
    assert copied and all((ROOT / source).exists() for sources in copied for source in sources)
    extras = re.findall(r"EXTRAS=(\S+)", DOCKERFILE)
    assert extras and all(
        extra in project["project"]["optional-dependencies"] for one in extras for extra in one.split(",")
    )
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = re.findall(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"torch=={torch}" in pins
    user = DOCKERFILE.index("USER ray")
    assert "USER root" not in DOCKERFILE and DOCKERFILE.index("pip install") > user


def test_prometheus_reads_the_list_of_nodes_that_ray_writes():
    config = yaml.safe_load(mounted_at("prometheus", "/etc/prometheus/prometheus.yml").read_text())
    assert set(config) == {"global", "scrape_configs"}
    (job,) = config["scrape_configs"]
    assert set(job) == {"job_name", "file_sd_configs"}
    (discovery,) = job["file_sd_configs"]
    (file,) = discovery["files"]
    assert Path(file).name == PROMETHEUS_SERVICE_DISCOVERY_FILE
    volumes = {source: target for source, target, _ in mounts("prometheus")}
    assert str(Path(file).parent) == volumes["ray"] == next(t for source, t, _ in mounts("head") if source == "ray")


def test_grafana_finds_prometheus_and_the_dashboard():
    (source,) = yaml.safe_load(
        mounted_at("grafana", "/etc/grafana/provisioning/datasources/rayinterp.yaml").read_text()
    )["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert host in SERVICES and SERVICES[host]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load(
        mounted_at("grafana", "/etc/grafana/provisioning/dashboards/rayinterp.yaml").read_text()
    )["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == provider["options"]["path"]
    dashboard = json.loads(mounted_at("grafana", home).read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"}
    assert used == {source["uid"]}
