"""Grading: every explanation and its controls on test records. Writes `scores` and `predictions`.

    explanations, test records -> blocks of features (Ray tasks) -> simulator service -> scores per complementary source

The only stage that reads test records. What is graded is decided from tables and config before anything is simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray import serve

from rayinterp.config import RunConfig, TransformersSimulatorConfig, arm_id, service_name
from rayinterp.controls import shuffled_features, token_lookup
from rayinterp.explanation import Explanation, from_json
from rayinterp.progress import Progress, silent
from rayinterp.records import ActivationRecord, load_records
from rayinterp.score import SCORERS, WIDE_BELOW, Score, false_positives_per_sequence, score_all
from rayinterp.simulate.simulator import CONTROL_NULLS, NULL_EXPLANATIONS, RuleRequest, combine
from rayinterp.sources import generator_for
from rayinterp.subject import FeatureId, interleave
from rayinterp.tables import Tables, sql_in

BLOCK = 4
"""Features per Ray task."""


class FeatureWork(NamedTuple):
    """What one simulator grades for one feature."""

    feature: FeatureId
    explanations: dict[str, Explanation]
    """By explainer arm id."""
    shuffled: dict[str, list[Explanation]]
    """Explanations of other features, by explainer arm id."""

    def rules(self) -> list[str]:
        """Every rule to be simulated, once."""
        explanations = [*self.explanations.values(), *(e for group in self.shuffled.values() for e in group)]
        rules = [rule.activates_on for explanation in explanations for rule in explanation]
        return list(dict.fromkeys([*rules, *CONTROL_NULLS]))


class Graded(NamedTuple):
    """Rows that grading one feature gives."""

    scores: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


def grade(
    work: FeatureWork,
    simulator: str,
    records: dict[str, list[ActivationRecord]],
    simulated: dict[str, list[np.ndarray]],
    config: RunConfig,
) -> Graded:
    """Scores of a feature's explanations and controls under each complementary source.

    Args:
        records: Train (for the token lookup) and test.
        simulated: Prediction of every rule of `work` for every test record.
    """
    test = records["test"]
    explained = {name: combine(e, [simulated[r.activates_on] for r in e]) for name, e in work.explanations.items()}
    nulls = [simulated[text] for text in CONTROL_NULLS]
    shuffled = {
        name: [combine(e, [simulated[r.activates_on] for r in e]) for e in group]
        for name, group in work.shuffled.items()
    }
    predictions: list[tuple[str, str, list[list[np.ndarray]]]] = [
        *((name, "", [predicted]) for name, predicted in explained.items()),
        *((name, "shuffled", group) for name, group in shuffled.items()),
        ("", "null", nulls),
        ("", "token_lookup", [token_lookup(records["train"], test)]),
    ]
    scores = [
        row
        for source in config.records.complementary
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
    return Graded(scores, kept)


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
    each = [score_all(true, [p[i] for i in places], documents, generator, num_bootstrap, wide) for p in group]
    false_positives = [
        false_positives_per_sequence([test[i].activations for i in silent], [p[i] for i in silent]) for p in group
    ]
    rows = []
    for scorer in SCORERS:
        scores = [s[scorer] for s in each]
        values = [s.value for s in scores if s.value is not None]
        only = scores[0] if len(scores) == 1 else None
        value = float(np.mean(values)) if values else None
        status = only.status if only else _status_of_several(scores)
        rows.append(
            {
                "feature_key": str(feature),
                "sae": feature.sae,
                "feature": feature.index,
                "explainer": explainer,
                "control": control,
                "simulator": simulator,
                "scorer": scorer,
                "source": source,
                "split": "test",
                "value": value,
                "ci_low": only.low if only else None,
                "ci_high": only.high if only else None,
                "num_records": len(places),
                "false_positives_per_sequence": _mean_defined(false_positives),
                "status": status,
            }
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


def unscored_rows(
    feature: FeatureId, explainer: str, control: str, simulator: str, sources: Sequence[str], status: str
) -> list[dict[str, Any]]:
    """Rows that say why there is no score."""
    return [
        {
            "feature_key": str(feature),
            "sae": feature.sae,
            "feature": feature.index,
            "explainer": explainer,
            "control": control,
            "simulator": simulator,
            "scorer": scorer,
            "source": source,
            "split": "test",
            "num_records": 0,
            "status": status,
        }
        for scorer in SCORERS
        for source in sources
    ]


class Explained(NamedTuple):
    """What the explainers found for one feature."""

    explanations: dict[str, Explanation]
    """By explainer arm id."""
    failed: dict[str, str]
    """Status of the explainers that ran and found none."""


def read_explained(tables: Tables, explainers: list[str]) -> dict[FeatureId, Explained]:
    """Every feature that some explainer has finished with."""
    columns = ["feature_key", "explainer", "explanation", "status"]
    by_feature: dict[FeatureId, Explained] = {}
    for row in tables.read("explanations", columns, sql_in("explainer", explainers)).to_pylist():
        explained = by_feature.setdefault(FeatureId.parse(row["feature_key"]), Explained({}, {}))
        if row["explanation"] is None:
            explained.failed[row["explainer"]] = row["status"]
        else:
            explained.explanations[row["explainer"]] = from_json(row["explanation"])
    return by_feature


def count_test_records(tables: Tables, max_records: int | None) -> Counter[str]:
    """Test records by feature, at most `max_records` of each source."""
    counts: Counter[str] = Counter()
    for row in tables.read("record_counts", ["feature_key", "found"], "split = 'test'").to_pylist():
        counts[row["feature_key"]] += row["found"] if max_records is None else min(row["found"], max_records)
    return counts


def shuffled_explanations(
    feature: FeatureId, by_feature: dict[FeatureId, Explained], config: RunConfig
) -> dict[str, list[Explanation]]:
    """For each explainer that explained the feature, what it said of some other features."""
    shuffled = {}
    for name in by_feature[feature].explanations:
        others = [other for other, explained in by_feature.items() if name in explained.explanations]
        chosen = shuffled_features(feature, others, config.score.num_shuffled, config.seed)
        if chosen:
            shuffled[name] = [by_feature[other].explanations[name] for other in chosen]
    return shuffled


def plan_grading(
    config: RunConfig, tables: Tables, simulator: str, explainers: list[str]
) -> tuple[list[FeatureWork], list[dict[str, Any]]]:
    """What a simulator grades, and rows for what it does not: decided from tables and config alone.

    Budgets count pairs whether or not they are remembered, so that a resumed run grades the same features.
    """
    arm = config.simulators[simulator]
    llm = arm if isinstance(arm, TransformersSimulatorConfig) else None
    pairs_left = llm.max_pairs if llm else None
    num_nulls = len(NULL_EXPLANATIONS) if llm and llm.calibration != "none" else 0
    num_records = count_test_records(tables, llm.max_records if llm else None)
    by_feature = read_explained(tables, explainers)
    work: list[FeatureWork] = []
    unscored: list[dict[str, Any]] = []

    def leave_out(feature: FeatureId, explainer: str, status: str) -> None:
        sources = config.records.complementary
        unscored.extend(unscored_rows(feature, explainer, "", arm_id(simulator, arm), sources, status))

    taken: Counter[str] = Counter()
    for feature in interleave(sorted(by_feature)):
        if arm.num_features is not None and taken[feature.sae] >= arm.num_features:
            continue
        taken[feature.sae] += 1
        explained = by_feature[feature]
        for explainer, status in explained.failed.items():
            leave_out(feature, explainer, status)
        if not explained.explanations:
            continue
        shuffled = shuffled_explanations(feature, by_feature, config)
        one = FeatureWork(feature, explained.explanations, shuffled)
        if pairs_left is not None:
            pairs_left -= (len(one.rules()) + num_nulls) * num_records[str(feature)]
        if pairs_left is not None and pairs_left < 0:
            for explainer in explained.explanations:
                leave_out(feature, explainer, "no_budget")
        else:
            work.append(one)
    return work, unscored


def first_of_each_source(records: list[ActivationRecord], count: int | None) -> list[ActivationRecord]:
    """The first `count` records of every source; all of them for None."""
    seen: dict[str, int] = {}
    kept = []
    for record in records:
        seen[record.source] = seen.get(record.source, 0) + 1
        if count is None or seen[record.source] <= count:
            kept.append(record)
    return kept


def grade_block(block: list[FeatureWork], simulator: str, config: RunConfig, tables: Tables) -> Graded:
    """Grades some features: one request to the simulator service each."""
    handle = serve.get_app_handle(service_name("simulator", simulator, config.run_dir))
    arm = config.simulators[simulator]
    max_records = arm.max_records if isinstance(arm, TransformersSimulatorConfig) else None
    loaded = [load_records(tables, work.feature, ("train", "test")) for work in block]
    for records in loaded:
        records["test"] = first_of_each_source(records["test"], max_records)
    responses = [
        handle.simulate.remote([RuleRequest(rule, tuple(r.sequence for r in records["test"])) for rule in work.rules()])
        for work, records in zip(block, loaded, strict=True)
    ]
    scores: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    name = arm_id(simulator, arm)
    for work, records, response in zip(block, loaded, responses, strict=True):
        simulated = dict(zip(work.rules(), response.result(), strict=True))
        graded = grade(work, name, records, simulated, config)
        scores += graded.scores
        predictions += graded.predictions
    return Graded(scores, predictions)


class ScorePlan(NamedTuple):
    """What the stage has left to do."""

    blocks: list[tuple[str, list[FeatureWork]]]
    """(simulator, features) to grade."""
    unscored: list[dict[str, Any]]
    """Rows of `scores` for what is not graded."""
    num_finished: int
    """Features that have their scores, counted once per simulator."""


def plan_score(config: RunConfig, tables: Tables, explainers: list[str]) -> ScorePlan:
    """What every simulator of `score.simulators` has left to grade.

    Args:
        explainers: Explainer arm ids of this config.
    """
    plan = ScorePlan([], [], 0)
    for simulator in config.score.simulators:
        work, unscored = plan_grading(config, tables, simulator, explainers)
        finished = _finished(tables, arm_id(simulator, config.simulators[simulator]))
        left = [w for w in work if not {(str(w.feature), e) for e in w.explanations} <= finished]
        plan.blocks.extend((simulator, left[i : i + BLOCK]) for i in range(0, len(left), BLOCK))
        plan.unscored.extend(row for row in unscored if (row["feature_key"], row["explainer"]) not in finished)
        plan = plan._replace(num_finished=plan.num_finished + len(work) - len(left))
    return plan


def run_score(config: RunConfig, tables: Tables, plan: ScorePlan, progress: Progress = silent) -> dict[str, int]:
    """Grades what the plan names, in Ray tasks; the simulators it names must have been deployed."""
    task = ray.remote(grade_block).options(num_cpus=config.resources.score.num_cpus)
    tables.append("scores", plan.unscored)
    done = plan.num_finished
    total = done + sum(len(block) for _, block in plan.blocks)
    progress(done, total)
    waiting = {task.remote(block, simulator, config, tables): len(block) for simulator, block in plan.blocks}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        graded = ray.get(ready)
        # Scores go last: they mark the features as finished.
        tables.append("predictions", graded.predictions)
        tables.append("scores", graded.scores)
        done += waiting.pop(ready)
        progress(done, total)
    if plan.blocks:
        for table in ("scores", "predictions", "simulations"):
            tables.finish(table)
    statuses = tables.read("scores", ["status"], "control = '' and scorer = 'correlation'")["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def _finished(tables: Tables, simulator: str) -> set[tuple[str, str]]:
    where = f"simulator = '{simulator}' and control = ''"
    rows = tables.read("scores", ["feature_key", "explainer"], where)
    return set(zip(rows["feature_key"].to_pylist(), rows["explainer"].to_pylist(), strict=True))
