"""Metrics: what the code defines is what the docs list, and what the dashboard asks for is what Ray exports."""

import ast
import asyncio
import json
import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import rayinterp
from rayinterp.config import LLMConfig
from rayinterp.explain.actor import metered
from rayinterp.explain.client import LLMError, LLMReply
from rayinterp.run import STAGES
from rayinterp.tables import Tables
from tests.conftest import planted_config, run_all
from tests.simulate.test_serve import (
    CANDIDATE,
    SimulatorReplica,
    local_committer,
    local_handle,
    tiny_client,
    tiny_config,
)

ROOT = Path(__file__).parent.parent
PANELS = json.loads((ROOT / "cluster" / "grafana" / "rayinterp.json").read_text())["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
NEED_A_GPU = {"ray_node_gpus_utilization", "ray_node_gram_used"}


def defined():
    """Type by name of every metric in the code, where each is made with a literal name."""
    found = {}
    for path in sorted(Path(rayinterp.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Gauge", "Counter", "Histogram"):
                if not (node.args and isinstance(node.args[0], ast.Constant)):
                    continue  # collections.Counter
                found[node.args[0].value] = ast.unparse(node.func).lower()
    return found


def documented():
    """Type and tags by name, from the table of docs/metrics.md."""
    rows = re.findall(r"^\| `(rayinterp_\w+)` \| (\w+) \| ([^|]+) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", tags))) for name, kind, tags in rows}


def exported_name(name, kind):
    """What Ray calls it."""
    return f"ray_{name}_total" if kind == "counter" else f"ray_{name}"


def asked_for():
    """Names of the dashboard's queries, without what Prometheus adds to a histogram's."""
    names = {name for query in QUERIES for name in re.findall(r"\bray_\w+", query)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def scrape():
    """Families of metrics that this machine's node exports, by name, and the labels of each."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = re.sub(r"_(bucket|sum|count)$", "", sample.name) if family.type == "histogram" else sample.name
            labels.setdefault(name, []).append(sample.labels)
    return labels


def test_the_docs_list_every_metric_and_no_other():
    assert {name: kind for name, (kind, _) in documented().items()} == defined()


def test_the_dashboard_shows_every_metric_of_ours():
    own = {exported_name(name, kind) for name, kind in defined().items()}
    assert {name for name in asked_for() if name.startswith("ray_rayinterp_")} == own


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in PANELS]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


async def count_what_the_planted_run_has_not(tmp_path):
    """A call that costs, one that fails, and pairs that a memo has: planted LLMs and simulators have none of these."""
    llm = LLMConfig(
        provider="scripted", model="m", usd_per_million_prompt_tokens=1, usd_per_million_completion_tokens=1
    )

    async def answers(request, feature_key):
        return LLMReply("text", "stop", 1000, 10)

    async def fails(request, feature_key):
        raise LLMError("no answer", transient=False)

    await metered(answers, "priced", "m", llm)(None, "planted/0")
    with pytest.raises(LLMError):
        await metered(fails, "priced", "m", llm)(None, "planted/0")
    arm = tiny_config(tmp_path / "model")
    handle = local_handle(SimulatorReplica("tiny", arm))
    simulate = tiny_client(tmp_path / "run", arm, handle, local_committer(Tables(str(tmp_path / "run")))).remembering()
    await simulate(CANDIDATE)
    await simulate(CANDIDATE)


class Scraper(threading.Thread):
    """Scrapes again and again: Ray soon forgets a gauge that is not set any more."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.exported: dict[str, list[dict[str, str]]] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(2):
            for name, labels in scrape().items():
                self.exported.setdefault(name, []).extend(labels)

    def wait_for(self, wanted: set[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while wanted - set(self.exported) and time.monotonic() < deadline:
            time.sleep(1)
        self.ended.set()
        self.join()


def test_ray_exports_what_the_dashboard_asks_for(ray_session, tmp_path):
    scraper = Scraper()
    scraper.start()
    config = planted_config(tmp_path / "run", "name=scraped", "corpus.num_sequences=1200", "harvest.min_sequences=5")
    run_all(config)
    asyncio.run(count_what_the_planted_run_has_not(tmp_path))
    wanted = asked_for() - NEED_A_GPU
    scraper.wait_for(wanted, seconds=60)
    exported = scraper.exported
    assert wanted - set(exported) == set()
    for name, (kind, tags) in documented().items():
        assert all(tags <= set(labels) for labels in exported[exported_name(name, kind)]), name
    stages = {labels["stage"] for labels in exported["ray_rayinterp_units_done"] if labels["run"] == config.name}
    assert stages == set(STAGES) - {"report"}
    callers = {labels["llm"] for labels in exported["ray_rayinterp_llm_calls_total"] if labels["run"] == config.name}
    assert callers == set(config.llms)
