"""Grading: every explanation and its controls on test records. Writes `scores` and `predictions`.

    explanations, test records -> blocks of features (Ray tasks) -> simulator service -> scores per complementary source

The only stage that reads test records; `grade_plan` says which.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import ray

from rayinterp import rule_negatives
from rayinterp.complexity import complexity_rows, measure_predictions
from rayinterp.config import LLMSimulatorConfig, RunConfig, arm_id
from rayinterp.controls import TokenLookupSimulator
from rayinterp.feature_id import FeatureId
from rayinterp.grade_plan import TRIED_AGAIN, FeatureWork, ScorePlan, graded_sources, score_row, unscored_rows
from rayinterp.progress import Progress, silent
from rayinterp.records import ActivationRecord, load_records
from rayinterp.score import (
    SCORERS,
    WIDE_BELOW,
    Score,
    false_negatives_per_sequence,
    false_positives_per_sequence,
    score_all,
)
from rayinterp.simulate.client import SimulatorClient
from rayinterp.simulate.simulator import CONTROL_NULLS, RuleRequest, combine
from rayinterp.sources import generator_for, spread
from rayinterp.tables import COMMIT_SECONDS, COMMITS_BETWEEN_COMPACTIONS, Tables, sql_in

GRADED_TABLES = ("scores", "complexity", "predictions")


class Graded(NamedTuple):
    """Rows that grading one feature gives."""

    scores: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    complexity: list[dict[str, Any]]


def grade(
    work: FeatureWork,
    simulator: str,
    records: dict[str, list[ActivationRecord]],
    simulated: dict[str, list[np.ndarray]],
    on_valid: dict[str, list[np.ndarray]],
    config: RunConfig,
) -> Graded:
    """Scores of a feature's explanations and controls under each complementary source, and complexity on valid.

    Args:
        records: Train (for the token lookup), valid and test.
        simulated: Prediction of every rule of `work` for every test record.
        on_valid: Prediction of every rule of its explanations for every valid record.
    """
    test = records["test"]
    explained = {name: combine(e, [simulated[r.activates_on] for r in e]) for name, e in work.explanations.items()}
    nulls = [simulated[text] for text in CONTROL_NULLS]
    shuffled = {
        name: [combine(e, [simulated[r.activates_on] for r in e]) for e in group]
        for name, group in work.shuffled.items()
    }
    any_rule = RuleRequest("", tuple(record.sequence for record in test))
    (looked_up,) = TokenLookupSimulator(records["train"]).simulate([any_rule])
    predictions: list[tuple[str, str, list[list[np.ndarray]]]] = [
        *((name, "", [predicted]) for name, predicted in explained.items()),
        *((name, "shuffled", group) for name, group in shuffled.items()),
        ("", "null", nulls),
        ("", "token_lookup", [looked_up]),
    ]
    scores = [
        row
        for source in graded_sources(config)
        for explainer, control, group in predictions
        for row in _score_rows(work.feature, explainer, control, simulator, source, test, group, config)
    ]
    kept = [
        {
            "feature_key": str(work.feature),
            "explainer": explainer,
            "simulator": simulator,
            "split": "test",
            "source": record.source,
            "sequence_id": record.sequence.sequence_id,
            "values": values,
        }
        for explainer, predicted in explained.items()
        for record, values in zip(test, predicted, strict=True)
    ]
    complexity = [
        row
        for explainer, explanation in work.explanations.items()
        for row in complexity_rows(
            work.feature, explainer, simulator, measure_predictions(explanation, records["valid"], on_valid)
        )
    ]
    return Graded([{**row, "settings": work.settings} for row in scores], kept, complexity)


def _score_rows(
    feature: FeatureId,
    explainer: str,
    control: str,
    simulator: str,
    source: str,
    test: list[ActivationRecord],
    group: list[list[np.ndarray]],
    config: RunConfig,
) -> list[dict[str, Any]]:
    """One row per scorer; a control of several texts gives the mean of those that are defined, without an interval."""
    places = [i for i, record in enumerate(test) if record.source in ("positive", source)]
    silent = [i for i in places if test[i].source == source]
    if not silent or len(silent) == len(places):
        return unscored_rows(feature, explainer, control, simulator, [source], "no_records")
    true, documents = [test[i].activations for i in places], [test[i].document_id for i in places]
    wide = min(len(places) - len(silent), len(silent)) < WIDE_BELOW
    generator = generator_for(config.seed, feature, "bootstrap", explainer, control, simulator, source)
    # Only a single text's interval is kept.
    num_bootstrap = config.score.num_bootstrap if len(group) == 1 else 1
    kinds = [test[i].source for i in places]
    each = [score_all(true, [p[i] for i in places], documents, generator, num_bootstrap, wide, kinds) for p in group]
    false_positives = [
        false_positives_per_sequence([test[i].activations for i in silent], [p[i] for i in silent]) for p in group
    ]
    positive = [i for i in places if test[i].source == "positive"]
    false_negatives = [
        false_negatives_per_sequence([test[i].activations for i in positive], [p[i] for i in positive]) for p in group
    ]
    rows = []
    for scorer in SCORERS:
        scores = [s[scorer] for s in each]
        values = [s.value for s in scores if s.value is not None]
        only = scores[0] if len(scores) == 1 else None
        value = float(np.mean(values)) if values else None
        status = only.status if only else _status_of_several(scores)
        rows.append(
            score_row(
                *(feature, explainer, control, simulator, scorer, source),
                value=value,
                ci_low=only.low if only else None,
                ci_high=only.high if only else None,
                num_records=len(places),
                false_positives_per_sequence=_mean_defined(false_positives),
                false_negatives_per_sequence=_mean_defined(false_negatives),
                status=status,
            )
        )
    return rows


def _status_of_several(scores: list[Score]) -> str:
    defined = [score.status for score in scores if score.value is not None]
    if defined:
        return defined[0]
    return scores[0].status if scores else "no_explanation"


def _mean_defined(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def some_of_each_source(records: list[ActivationRecord], count: int | None) -> list[ActivationRecord]:
    """At most `count` records of every source, spread over its ranks; all of them for None.

    The first of a source would be its easiest positives or its hardest silent records alone.

    Args:
        records: Those of a source in rank order.
    """
    by_source: dict[str, list[ActivationRecord]] = {}
    for record in records:
        by_source.setdefault(record.source, []).append(record)
    return [record for of_source in by_source.values() for record in spread(of_source, count)]


def grade_block(block: list[FeatureWork], simulator: str, config: RunConfig, tables: Tables, committer: Any) -> Graded:
    """Grades some features: one request to the simulator service each."""
    arm = config.simulators[simulator]
    client = SimulatorClient(simulator, config, tables, committer)
    max_records = arm.max_records if isinstance(arm, LLMSimulatorConfig) else None
    loaded = [load_records(tables, work.feature, ("train", "valid", "test")) for work in block]
    called_for = rule_negatives.load_rule_negatives(tables, [work.feature for work in block], max_records)
    for work, records in zip(block, loaded, strict=True):
        test = some_of_each_source(records["test"], max_records)
        records["test"] = test + (called_for[work.feature] if config.score.num_rule_negatives else [])
        records["valid"] = some_of_each_source(records["valid"], max_records)

    async def simulate(rules: list[str], on: list[ActivationRecord]) -> dict[str, list[np.ndarray]]:
        sequences = tuple(dict.fromkeys(record.sequence for record in on))
        if not sequences:
            return {rule: [] for rule in rules}
        predictions = await client.remembering()([RuleRequest(rule, sequences) for rule in rules])
        place = {sequence: index for index, sequence in enumerate(sequences)}
        return {
            rule: [of_rule[place[record.sequence]] for record in on]
            for rule, of_rule in zip(rules, predictions, strict=True)
        }

    async def simulate_all() -> list[dict[str, list[np.ndarray]]]:
        asked = [
            simulate(rules, records[split])
            for work, records in zip(block, loaded, strict=True)
            for split, rules in (("test", work.rules()), ("valid", work.own_rules()))
        ]
        return await asyncio.gather(*asked)

    simulated = asyncio.run(simulate_all())
    name = arm_id(simulator, arm)
    graded = [
        grade(*one, config)
        for one in zip(block, [name] * len(block), loaded, simulated[::2], simulated[1::2], strict=True)
    ]
    return Graded(*([row for of_feature in rows for row in of_feature] for rows in zip(*graded, strict=True)))


def run_score(
    config: RunConfig, tables: Tables, plan: ScorePlan, committer: Any, progress: Progress = silent
) -> dict[str, int]:
    """Grades what the plan names, in Ray tasks; the simulators it names must have been deployed.

    What is graded is committed in groups, and whatever ends the stage, what was graded by then.
    """
    task = ray.remote(grade_block).options(num_cpus=config.resources.score.num_cpus)
    replace_scores(tables, plan.unscored)
    done = plan.num_finished
    total = done + sum(len(block) for _, block in plan.blocks)
    progress(done, total)
    left, running = deque(plan.blocks), {}
    graded: list[Graded] = []
    num_graded, num_commits, last_commit = 0, 0, time.monotonic()
    # A request waits behind those before it, and its time runs: no more than keep the replicas busy.
    in_flight = 2 * max(config.resources.simulator.most_actors, 1)
    try:
        while left or running:
            while left and len(running) < in_flight:
                simulator, block = left.popleft()
                running[task.remote(block, simulator, config, tables, committer)] = len(block)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=COMMIT_SECONDS)
            for reference in ready:
                graded.append(ray.get(reference))
                num_graded += running.pop(reference)
            committer.tick.remote()
            if graded and (not (left or running) or time.monotonic() - last_commit > COMMIT_SECONDS):
                write_graded(tables, graded)
                done, num_graded, graded, last_commit = done + num_graded, 0, [], time.monotonic()
                progress(done, total)
                num_commits += 1
                if num_commits % COMMITS_BETWEEN_COMPACTIONS == 0:
                    for table in GRADED_TABLES:
                        tables.finish(table, in_use=True)
    finally:
        try:
            if graded:
                write_graded(tables, graded)
        finally:
            if plan.blocks:
                ray.get(committer.flush.remote())
    for table in (*GRADED_TABLES, "simulations") if plan.blocks else ():
        tables.finish(table)
    statuses = tables.read("scores", ["status"], "control = '' and scorer = 'correlation'")["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def write_graded(tables: Tables, graded: list[Graded]) -> None:
    """Commits rows of several blocks. Scores go last: they mark their features as finished."""
    predictions, complexity, scores = (
        [row for one in graded for row in getattr(one, name)] for name in ("predictions", "complexity", "scores")
    )
    tables.append("predictions", predictions)
    tables.append("complexity", complexity)
    replace_scores(tables, scores)


def replace_scores(tables: Tables, rows: list[dict[str, Any]]) -> None:
    """Appends scores in place of those of the same feature, explainer and simulator that are outdated: made by other
    settings, or by a run that had to leave them to the next."""
    explainers: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        explainers.setdefault((row["simulator"], row["settings"], row["feature_key"]), set()).add(row["explainer"])
    features: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (simulator, settings, feature), of_feature in explainers.items():
        features.setdefault((simulator, settings, tuple(sorted(of_feature))), []).append(feature)
    for (simulator, settings, arms), keys in features.items():
        same = f"simulator = '{simulator}' and {sql_in('explainer', arms)} and {sql_in('feature_key', keys)}"
        outdated = f"{same} and (settings != '{settings}' or {sql_in('status', TRIED_AGAIN)})"
        if tables.count("scores", outdated):
            tables.delete("scores", outdated)
    tables.append("scores", rows)
