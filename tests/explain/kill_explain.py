"""`python -m tests.explain.kill_explain FOLDER LOG`: the planted explain stage in a process and a Ray of its own, to be
killed. FOLDER holds the planted records; LOG gets a line for each call that the LLM answers, on disk before its caller
hears of it: the bill as the endpoint would write it."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from rayinterp.explain.runner import run_explain
from rayinterp.run import start_committer
from rayinterp.tables import Tables
from tests.conftest import planted_config
from tests.explain.fakes import Billed
from tests.run_planted import start_cluster

SEARCH = "num_llm_roots: 2, width: 2, branching_factor: 2, stop_score: 1, strategy: best_first"
TREE = f"method: tree, llm: knows, simulator: oracle, {SEARCH}"
COMPARED = ("candidates", "explanations", "llm_calls")


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
