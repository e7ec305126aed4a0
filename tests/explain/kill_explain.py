"""`python -m tests.explain.kill_explain FOLDER LOG`: the planted explain stage in a process and a Ray of its own, to be
killed. FOLDER holds the planted records; LOG gets a line for each call that the LLM answers, on disk before its caller
hears of it: the bill as the endpoint would write it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import ray

from rayinterp.config import RunConfig
from rayinterp.explain.actor import Services
from rayinterp.explain.client import LLMReply, LLMRequest
from rayinterp.explain.runner import run_explain
from rayinterp.feature_id import FeatureId
from rayinterp.planted import FEATURES, RULES, OracleSimulator
from rayinterp.run import start_committer
from rayinterp.simulate.simulator import RuleRequest
from rayinterp.tables import Tables
from tests.conftest import planted_config
from tests.run_planted import start_cluster

SEARCH = "num_llm_roots: 2, width: 2, branching_factor: 2, stop_score: 1, strategy: best_first"
TREE = f"method: tree, llm: knows, simulator: oracle, {SEARCH}"
COMPARED = ("candidates", "explanations", "llm_calls")


class Billed:
    """Picklable: services whose LLM takes its time, answers the same to the same, and writes down what it answered."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, config: RunConfig, *others: Any) -> Services:
        oracle = OracleSimulator()

        async def simulate(requests: list[RuleRequest]) -> list[list[Any]]:
            return oracle.simulate(requests)

        async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
            rng = random.Random(request.hash)
            await asyncio.sleep(rng.uniform(0.2, 0.6))
            truth = [rule.activates_on for rule in FEATURES[FeatureId.parse(feature_key).index].truth]
            others = [rule for rule in list(RULES)[:4] if rule not in truth]
            said = [*truth, *rng.sample(others, 2)]  # never quite right, or the search would be over
            rules = [{"activates_on": rule, "strength": rng.randint(1, 5)} for rule in said]
            with self.log.open("a") as file:
                file.write(request.hash + "\n")
                file.flush()
                os.fsync(file.fileno())
            return LLMReply(json.dumps(rules), "stop", 10, 10)

        return Services({"oracle": lambda: simulate}, dict.fromkeys(config.llms, generate), None)


def explain(folder: Path, log: Path, depth: int = 6) -> Tables:
    """The stage, from where it stands to its end, with 12 + 24 x `depth` answers."""
    arms = f"explainers={{one: {{{TREE}, depth: {depth}}}, two: {{{TREE}, depth: {depth}, temperature: 0.7}}}}"
    config = planted_config(folder, arms, "resources.search.num_actors=1")
    tables = Tables(str(folder))
    committer = start_committer(tables)
    run_explain(config, tables, committer, connect=Billed(log))
    ray.kill(committer)
    return tables


def commit_often() -> None:
    """So that a part is durable whenever the kill comes, and a part is not."""
    import rayinterp.tables as tables

    tables.COMMIT_SECONDS = 0.5


if __name__ == "__main__":
    start_cluster(commit_often)
    explain(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
