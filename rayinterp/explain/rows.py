"""What a search leaves in the tables: rows of `candidates` and `explanations`, and the names of arms in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from rayinterp.config import OneShotConfig, RunConfig, arm_id, content_of, simulators_of
from rayinterp.explain.search import Node, TreeSearch
from rayinterp.explanation import to_json
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord


def arm_ids(config: RunConfig, name: str) -> tuple[str, str]:
    """The explainer's and its simulator's names in the tables; the first covers all that an explanation depends on."""
    arm = config.explainers[name]
    simulator = config.simulators[arm.simulator]
    context = [
        {k: v for k, v in content_of(config.simulators[asked]).items() if k not in _GRADING}
        for asked in simulators_of(arm)
    ]
    if isinstance(arm, OneShotConfig):
        context.append(content_of(config.llms[arm.llm]))
    return arm_id(name, arm, *context), arm_id(arm.simulator, simulator)


_GRADING = {"num_features", "max_records", "max_pairs"}
"""Fields of a simulator arm that play no part in a search."""


def candidate_row(feature: FeatureId, ids: tuple[str, str], search: TreeSearch, node: Node) -> dict[str, Any]:
    """A node as it was scored first: it is handed over then, before a falsifier has it scored again."""
    return {
        "feature_key": str(feature),
        "explainer": ids[0],
        "simulator": ids[1],
        "node": node.node,
        "parent": node.parent,
        "depth": node.depth,
        "kind": node.kind,
        "explanation": None if node.explanation is None else to_json(node.explanation),
        "status": node.status,
        "cascade_score": node.looks[-1] if node.looks else None,
        "train_score": node.train_score,
        "valid_score": node.valid_score,
        "thought": node.thought,
        "feedback": None if node.parent is None else search.nodes[node.parent].feedback,
        "prompt_tokens": node.prompt_tokens,
        "completion_tokens": node.completion_tokens,
        "cost_usd": node.cost_usd,
    }


def explanation_row(
    feature: FeatureId,
    ids: tuple[str, str],
    search: TreeSearch | None,
    status: str | None = None,
    num_falsifiers: int = 0,
) -> dict[str, Any]:
    """The winner, or why there is none."""
    winner = search.winner() if search else None
    nodes = [node for node in search.nodes if node.status != "stopped"] if search else []
    costs = [node.cost_usd for node in nodes if node.prompt_tokens]
    return {
        "feature_key": str(feature),
        "sae": feature.sae,
        "feature": feature.index,
        "explainer": ids[0],
        "simulator": ids[1],
        "explanation": to_json(winner.explanation) if winner and winner.explanation else None,
        "train_score": winner.train_score if winner else None,
        "valid_score": _chosen_by(winner) if winner else None,
        "num_candidates": len(nodes),
        "num_falsifiers": num_falsifiers,
        "finalists": [node.node for node in nodes if node.final_score is not None],
        "final_scores": [node.final_score for node in nodes if node.final_score is not None],
        "status": status or _status(search, winner is not None),
        "cost_usd": None if any(cost is None for cost in costs) else sum(c for c in costs if c is not None),
    }


def _status(search: TreeSearch | None, has_winner: bool) -> str:
    """A search that a budget cut short, or that lacks answers, is tried again by a later run, also where it has a
    winner; one at the end of its time is not."""
    cut_by = search.cut_by if search else None
    if search and cut_by != "budget" and any(node.status == "llm_error" for node in search.nodes):
        return "llm_error"
    return cut_by or ("ok" if has_winner else "no_explanation")


def _chosen_by(winner: Node) -> float | None:
    return winner.valid_score if winner.final_score is None else winner.final_score


def why_not(records: dict[str, list[ActivationRecord]], over_budget: bool) -> str | None:
    """The status of an arm that cannot or may not be run on a feature; None where it can."""
    for split in ("train", "valid"):
        if not records[split]:
            return "no_records"
        if not any(record.activations.any() for record in records[split]):
            return "no_positives"
    return "no_budget" if over_budget else None


class NodeCommitter:
    """Hands each node of one search over as it comes to its end.

    From the first failed call on, all wait for the search to end: run again, it may get an answer.
    """

    def __init__(
        self, feature: FeatureId, ids: tuple[str, str], write: Callable[[list[dict[str, Any]]], Awaitable[None]]
    ) -> None:
        self._feature, self._ids, self._write = feature, ids, write
        self._written: set[int] = set()

    async def __call__(self, search: TreeSearch) -> None:
        if any(node.status == "llm_error" for node in search.nodes):
            return  # answered the next time, it would be another search
        new = [n for n in search.nodes if n.node not in self._written and n.status in _ENDED]
        self._written.update(node.node for node in new)
        if new:
            await self._write([candidate_row(self._feature, self._ids, search, node) for node in new])

    def rest(self, search: TreeSearch) -> list[dict[str, Any]]:
        """Rows of what has not been handed over, but for proposals that were never answered."""
        left = [n for n in search.nodes if n.node not in self._written and n.status != "stopped"]
        return [candidate_row(self._feature, self._ids, search, node) for node in left]


_ENDED = ("ok", "duplicate", "pruned", "undefined", "parse_error", "cut_off", "nothing_fires")
