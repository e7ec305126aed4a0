"""Grading: every explanation and its controls on test records. Writes `scores` and `predictions`.

    explanations, test records -> blocks of features (Ray tasks) -> simulator service -> scores per complementary source

The only stage that reads test records. What is graded is decided from tables and config before anything is simulated.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from rayinterp import rule_negatives
from rayinterp.config import LLMSimulatorConfig, RunConfig, arm_id
from rayinterp.controls import TokenLookupSimulator, shuffled_features
from rayinterp.explanation import Explanation, from_json
from rayinterp.progress import Progress, silent
from rayinterp.records import ActivationRecord, load_records
from rayinterp.score import SCORERS, WIDE_BELOW, Score, false_positives_per_sequence, score_all
from rayinterp.simulate.client import SimulatorClient
from rayinterp.simulate.simulator import CONTROL_NULLS, NULL_EXPLANATIONS, RuleRequest, combine
from rayinterp.sources import generator_for
from rayinterp.subject import FeatureId, interleave
from rayinterp.tables import Tables, sql_in

BLOCK = 4
"""Features per Ray task."""


class FeatureWork(NamedTuple):
    """What one simulator grades for one feature."""

    feature: FeatureId
    settings: str
    """From `settings_of`."""
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


def settings_of(config: RunConfig, num_rule_negatives: int) -> str:
    """What a feature's scores depend on besides arms and records: they are made again where it has changed."""
    score = config.score
    return f"bootstrap {score.num_bootstrap}, shuffled {score.num_shuffled}, rule negatives " + (
        f"{score.num_rule_negatives} an arm, {num_rule_negatives} in all" if score.num_rule_negatives else "0"
    )


def count_rule_negatives(config: RunConfig, tables: Tables) -> Counter[str]:
    """Test records by feature that its explanations called for, if they are graded on."""
    if not config.score.num_rule_negatives:
        return Counter()
    return Counter(tables.read("test_records", ["feature_key"])["feature_key"].to_pylist())


def graded_sources(config: RunConfig) -> tuple[str, ...]:
    """Complementary sources that explanations are graded on."""
    return (*config.records.complementary, *([rule_negatives.SOURCE] if config.score.num_rule_negatives else []))


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
    return Graded([{**row, "settings": work.settings} for row in scores], kept)


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


def count_test_records(tables: Tables, rule_negatives: Counter[str], max_records: int | None) -> Counter[str]:
    """Test records by feature, at most `max_records` of each source."""
    counts: Counter[str] = Counter()
    for row in tables.read("record_counts", ["feature_key", "found"], "split = 'test'").to_pylist():
        counts[row["feature_key"]] += row["found"] if max_records is None else min(row["found"], max_records)
    counts.update({key: n if max_records is None else min(n, max_records) for key, n in rule_negatives.items()})
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


def first_of_each_sae(features: Iterable[FeatureId], count: int | None) -> list[FeatureId]:
    """The first `count` features of every SAE, SAEs by turns; all of them for None."""
    taken: Counter[str] = Counter()
    kept = []
    for feature in interleave(sorted(features)):
        taken[feature.sae] += 1
        if count is None or taken[feature.sae] <= count:
            kept.append(feature)
    return kept


def plan_grading(
    config: RunConfig, tables: Tables, simulator: str, explainers: list[str]
) -> tuple[list[FeatureWork], list[dict[str, Any]]]:
    """What a simulator grades, and rows for what it does not: decided from tables and config alone.

    Budgets count pairs whether or not they are remembered, so that a resumed run grades the same features.
    """
    arm = config.simulators[simulator]
    llm = arm if isinstance(arm, LLMSimulatorConfig) else None
    pairs_left = llm.max_pairs if llm else None
    num_nulls = len(NULL_EXPLANATIONS) if llm and llm.calibration != "none" else 0
    called_for = count_rule_negatives(config, tables)
    num_records = count_test_records(tables, called_for, llm.max_records if llm else None)
    by_feature = read_explained(tables, explainers)
    work: list[FeatureWork] = []
    unscored: list[dict[str, Any]] = []

    def leave_out(feature: FeatureId, explainer: str, status: str) -> None:
        settings = settings_of(config, called_for[str(feature)])
        rows = unscored_rows(feature, explainer, "", arm_id(simulator, arm), graded_sources(config), status)
        unscored.extend({**row, "settings": settings} for row in rows)

    for feature in first_of_each_sae(by_feature, arm.num_features):
        explained = by_feature[feature]
        for explainer, status in explained.failed.items():
            leave_out(feature, explainer, status)
        if not explained.explanations:
            continue
        shuffled = shuffled_explanations(feature, by_feature, config)
        one = FeatureWork(feature, settings_of(config, called_for[str(feature)]), explained.explanations, shuffled)
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


def grade_block(block: list[FeatureWork], simulator: str, config: RunConfig, tables: Tables, committer: Any) -> Graded:
    """Grades some features: one request to the simulator service each."""
    arm = config.simulators[simulator]
    client = SimulatorClient(simulator, config, tables, committer)
    max_records = arm.max_records if isinstance(arm, LLMSimulatorConfig) else None
    loaded = [load_records(tables, work.feature, ("train", "test")) for work in block]
    called_for = rule_negatives.load_rule_negatives(tables, [work.feature for work in block])
    for work, records in zip(block, loaded, strict=True):
        test = records["test"] + (called_for[work.feature] if config.score.num_rule_negatives else [])
        records["test"] = first_of_each_source(test, max_records)

    async def simulate(work: FeatureWork, test: list[ActivationRecord]) -> dict[str, list[np.ndarray]]:
        sequences = tuple(dict.fromkeys(record.sequence for record in test))
        rules = work.rules()
        predict = await client.remembering(sequences)
        predictions = await predict([RuleRequest(rule, sequences) for rule in rules])
        place = {sequence: index for index, sequence in enumerate(sequences)}
        return {
            rule: [of_rule[place[record.sequence]] for record in test]
            for rule, of_rule in zip(rules, predictions, strict=True)
        }

    async def simulate_all() -> list[dict[str, list[np.ndarray]]]:
        return await asyncio.gather(*(simulate(w, r["test"]) for w, r in zip(block, loaded, strict=True)))

    scores: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    name = arm_id(simulator, arm)
    for work, records, simulated in zip(block, loaded, asyncio.run(simulate_all()), strict=True):
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
        finished = _finished(config, tables, simulator)
        left = [w for w in work if not {(str(w.feature), e) for e in w.explanations} <= finished]
        plan.blocks.extend((simulator, left[i : i + BLOCK]) for i in range(0, len(left), BLOCK))
        plan.unscored.extend(row for row in unscored if (row["feature_key"], row["explainer"]) not in finished)
        plan = plan._replace(num_finished=plan.num_finished + len(work) - len(left))
    return plan


def run_score(
    config: RunConfig, tables: Tables, plan: ScorePlan, committer: Any, progress: Progress = silent
) -> dict[str, int]:
    """Grades what the plan names, in Ray tasks; the simulators it names must have been deployed."""
    task = ray.remote(grade_block).options(num_cpus=config.resources.score.num_cpus)
    _replace_scores(tables, plan.unscored)
    done = plan.num_finished
    total = done + sum(len(block) for _, block in plan.blocks)
    progress(done, total)
    left, waiting = list(plan.blocks), {}
    # A request waits behind those before it, and its time runs: no more than keep the replicas busy.
    in_flight = 2 * max(config.resources.simulator.most_actors, 1)
    while left or waiting:
        while left and len(waiting) < in_flight:
            simulator, block = left.pop(0)
            waiting[task.remote(block, simulator, config, tables, committer)] = len(block)
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        graded = ray.get(ready)
        # Scores go last: they mark the features as finished.
        tables.append("predictions", graded.predictions)
        _replace_scores(tables, graded.scores)
        done += waiting.pop(ready)
        progress(done, total)
    if plan.blocks:
        ray.get(committer.flush.remote())
        for table in ("scores", "predictions", "simulations"):
            tables.finish(table)
    statuses = tables.read("scores", ["status"], "control = '' and scorer = 'correlation'")["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def _finished(config: RunConfig, tables: Tables, simulator: str) -> set[tuple[str, str]]:
    """(feature, explainer) that have a score, or a reason why not, under every source and the present settings."""
    sources, called_for = graded_sources(config), count_rule_negatives(config, tables)
    arm = arm_id(simulator, config.simulators[simulator])
    where = f"simulator = '{arm}' and control = '' and {sql_in('source', sources)}"
    under: dict[tuple[str, str], set[str]] = {}
    for row in tables.read("scores", ["feature_key", "explainer", "source", "settings"], where).to_pylist():
        if row["settings"] == settings_of(config, called_for[row["feature_key"]]):
            under.setdefault((row["feature_key"], row["explainer"]), set()).add(row["source"])
    return {pair for pair, found in under.items() if found >= set(sources)}


def _replace_scores(tables: Tables, rows: list[dict[str, Any]]) -> None:
    """Appends scores in place of those of the same feature, explainer and simulator that other settings made."""
    by_settings: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        by_settings.setdefault((row["simulator"], row["settings"]), set()).add(row["feature_key"])
    explainers = sorted({row["explainer"] for row in rows})
    for (simulator, settings), features in by_settings.items():
        same = f"simulator = '{simulator}' and {sql_in('explainer', explainers)}"
        outdated = f"{same} and {sql_in('feature_key', sorted(features))} and settings != '{settings}'"
        if tables.count("scores", outdated):
            tables.delete("scores", outdated)
    tables.append("scores", rows)


def ungraded(config: RunConfig, tables: Tables, explainers: list[str]) -> dict[FeatureId, dict[str, Explanation]]:
    """Features that some simulator has still to grade, with all of their explanations."""
    by_feature = read_explained(tables, explainers)
    found: dict[FeatureId, dict[str, Explanation]] = {}
    for simulator in config.score.simulators:
        arm = config.simulators[simulator]
        finished = _finished(config, tables, simulator)
        for feature in first_of_each_sae(by_feature, arm.num_features):
            explanations = by_feature[feature].explanations
            if not {(str(feature), explainer) for explainer in explanations} <= finished:
                found[feature] = explanations
    return found
