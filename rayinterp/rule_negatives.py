"""Rule negatives: silent test sequences that sound like the explanations that are compared. Writes `test_records`.

    explanations of a feature, of all arms -> `Retriever` -> their union, on which every arm is graded

An arm that joins later may add to a feature's union; what was graded on the smaller one is then graded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.util import ActorPool

from rayinterp.config import RunConfig
from rayinterp.corpus import load_tokenizer, stable_hash
from rayinterp.explanation import Explanation, claims
from rayinterp.feature_id import FeatureId
from rayinterp.progress import Progress, silent
from rayinterp.records import ActivationRecord, read_sequences
from rayinterp.retrieve import Found, Retriever, SilentRequest, silent_record
from rayinterp.sources import Ranked, spread
from rayinterp.tables import Tables, sql_in

BLOCK = 64
"""Features whose explanations share one pass over the vectors."""

Explained = Mapping[FeatureId, Mapping[str, Explanation]]
"""Explanations by explainer arm id, by feature."""


class CalledFor(NamedTuple):
    """A silent sequence, and the arm that called for it first."""

    arm: str
    rank: int
    hit: Found


def union(found: Mapping[str, Sequence[Found]]) -> list[CalledFor]:
    """What each arm called for, every sequence once: the best of every arm, then the second best, and so on."""
    merged: dict[int, CalledFor] = {}
    for rank in range(max(map(len, found.values()), default=0)):
        for arm in sorted(found):
            for hit in found[arm][rank : rank + 1]:
                merged.setdefault(hit.sequence_id, CalledFor(arm, rank, hit))
    return list(merged.values())


class RuleNegatives:
    """Finds them for blocks of features: run as a Ray actor."""

    def __init__(self, config: RunConfig, tables: Tables) -> None:
        self._config, self._tables = config, tables
        self._tokenizer = load_tokenizer(config)
        self._retriever: Retriever | None = None

    def rows(self, block: Explained) -> list[dict[str, Any]]:
        """Rows of `test_records` that are not there yet."""
        # Made here, for a refusal to reach the user as what it is: one from the constructor is a dead actor.
        self._retriever = self._retriever or Retriever(self._config, self._tables)
        count = self._config.score.num_rule_negatives
        arms = [(feature, arm) for feature, explanations in block.items() for arm in sorted(explanations)]
        requests = [SilentRequest(feature, claims(block[feature][arm]), "test", count) for feature, arm in arms]
        found: dict[FeatureId, dict[str, list[Found]]] = {feature: {} for feature in block}
        for (feature, arm), hits in zip(arms, self._retriever.silent(requests), strict=True):
            found[feature][arm] = hits
        there = self._tables.read(
            "test_records", ["feature_key", "sequence_id"], sql_in("feature_key", map(str, block))
        )
        known: dict[str, set[int]] = {str(feature): set() for feature in block}
        for row in there.to_pylist():
            known[row["feature_key"]].add(row["sequence_id"])
        new = {
            feature: [called for called in union(of_arms) if called.hit.sequence_id not in known[str(feature)]]
            for feature, of_arms in found.items()
        }
        wanted = {called.hit.sequence_id for of_feature in new.values() for called in of_feature}
        sequences = read_sequences(self._tables, wanted, self._tokenizer)
        return [
            {
                "feature_key": str(feature),
                "sae": feature.sae,
                "feature": feature.index,
                "explainer": called.arm,
                "similarity": called.hit.similarity,
                "rank": called.rank,
                **sequences[called.hit.sequence_id],
                "activations": [0.0] * len(sequences[called.hit.sequence_id]["token_ids"]),
            }
            for feature, of_feature in new.items()
            for called in of_feature
        ]


def add_rule_negatives(config: RunConfig, tables: Tables, explained: Explained, progress: Progress = silent) -> None:
    """Adds what these explanations call for, in Ray actors, a block of features at a time."""
    if not explained or not config.score.num_rule_negatives:
        return
    features = sorted(explained)
    blocks = [
        {feature: explained[feature] for feature in features[start : start + BLOCK]}
        for start in range(0, len(features), BLOCK)
    ]
    resources = config.resources.index
    actor = ray.remote(RuleNegatives).options(
        num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=-1, max_task_retries=-1
    )
    actors: list[Any] = [actor.remote(config, tables) for _ in range(min(resources.num_actors, len(blocks)))]
    done = 0
    progress(done, len(features))
    pool = ActorPool(actors)
    for rows in pool.map_unordered(lambda actor, block: actor.rows.remote(block), blocks):
        tables.append("test_records", rows)
        done = min(done + BLOCK, len(features))
        progress(done, len(features))
    for one in actors:
        ray.kill(one)


def load_rule_negatives(
    tables: Tables, features: Sequence[FeatureId], count: int | None = None
) -> dict[FeatureId, list[ActivationRecord]]:
    """Rule negatives of some features, or `count` of each feature's: the nearest of every arm first, as in `union`."""
    by_arm: dict[FeatureId, dict[str, list[dict[str, Any]]]] = {feature: {} for feature in features}
    rows = tables.read("test_records", where=sql_in("feature_key", map(str, features))).to_pylist()
    for row in sorted(rows, key=lambda row: row["rank"]):
        by_arm[FeatureId.parse(row["feature_key"])].setdefault(row["explainer"], []).append(row)
    records = {}
    for feature, of_arms in by_arm.items():
        kept = some_of_each_arm(feature, of_arms, count)
        kept.sort(key=lambda row: (row["rank"], row["explainer"]))
        records[feature] = [silent_record(row) for row in kept]
    return records


def some_of_each_arm(feature: FeatureId, of_arms: Mapping[str, Sequence[Ranked]], count: int | None) -> list[Ranked]:
    """`count` rule negatives of a feature, from its arms by turns, spread over the ranks of each; all of them for None.

    Which arms come first, and are alone heard where there are more arms than `count`, differs from feature to feature.
    """
    arms = sorted(of_arms, key=lambda arm: stable_hash(f"{feature}/{arm}"))
    turns = sorted((turn, place) for place, arm in enumerate(arms) for turn in range(len(of_arms[arm])))
    shares = Counter(place for _, place in turns[:count])
    return [one for place, arm in enumerate(arms) for one in spread(of_arms[arm], shares[place])]
