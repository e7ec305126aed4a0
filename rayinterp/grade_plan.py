"""What is to be graded: decided from tables and config before anything is simulated.

explanations, counts of test records -> budgets -> blocks of `FeatureWork`, and rows for what is left out
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rayinterp.complexity import OF_PREDICTIONS
from rayinterp.config import LLMSimulatorConfig, RunConfig, arm_id
from rayinterp.controls import by_sae, shuffled_features
from rayinterp.explanation import Explanation, from_json
from rayinterp.feature_id import FeatureId, interleave
from rayinterp.retrieve import RULE_NEGATIVE
from rayinterp.score import SCORERS
from rayinterp.simulate.simulator import CONTROL_NULLS, NULL_EXPLANATIONS
from rayinterp.tables import Tables, sql_in

BLOCK = 4
"""Features per Ray task."""
TRIED_AGAIN = ("llm_error", "no_budget")
"""Statuses that another run may change."""


class FeatureWork(NamedTuple):
    """What one simulator grades for one feature."""

    feature: FeatureId
    settings: str
    """From `settings_of`."""
    explanations: dict[str, Explanation]
    """By explainer arm id."""
    shuffled: dict[str, list[Explanation]]
    """Explanations of other features, by explainer arm id."""

    def own_rules(self) -> list[str]:
        """Those of the feature's explanations, which are simulated on valid records too."""
        return list(dict.fromkeys(rule.activates_on for e in self.explanations.values() for rule in e))

    def rules(self) -> list[str]:
        """Every rule to be simulated, once."""
        explanations = [*self.explanations.values(), *(e for group in self.shuffled.values() for e in group)]
        rules = [rule.activates_on for explanation in explanations for rule in explanation]
        return list(dict.fromkeys([*rules, *CONTROL_NULLS]))


class ScorePlan(NamedTuple):
    """What the stage has left to do."""

    blocks: list[tuple[str, list[FeatureWork]]]
    """(simulator, features) to grade."""
    unscored: list[dict[str, Any]]
    """Rows of `scores` for what is not graded."""
    num_finished: int
    """Features that have their scores, counted once per simulator."""

    def explanations(self) -> dict[FeatureId, dict[str, Explanation]]:
        """Of the features that are left, by explainer arm id."""
        return {work.feature: work.explanations for _, block in self.blocks for work in block}


def plan_score(config: RunConfig, tables: Tables, explainers: list[str]) -> ScorePlan:
    """What every simulator of `score.simulators` has left to grade.

    Args:
        explainers: Explainer arm ids of this config.
    """
    plan = ScorePlan([], [], 0)
    for simulator in config.score.simulators:
        work, unscored = plan_grading(config, tables, simulator, explainers)
        stands = standing(config, tables, arm_id(simulator, config.simulators[simulator]))
        finished = {pair for pair, status in stands.items() if status not in TRIED_AGAIN}
        complete = finished & _measured(config, tables, simulator)
        left = [w for w in work if not {(str(w.feature), e) for e in w.explanations} <= complete]
        plan.blocks.extend((simulator, left[i : i + BLOCK]) for i in range(0, len(left), BLOCK))
        kept = finished | _with_a_value(config, tables, simulator)
        plan.unscored.extend(
            row
            for row in unscored
            if (pair := (row["feature_key"], row["explainer"])) not in kept and stands.get(pair) != row["status"]
        )
        plan = plan._replace(num_finished=plan.num_finished + len(work) - len(left))
    return plan


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
    num_records = count_records(tables, "test", called_for, llm.max_records if llm else None)
    num_valid = count_records(tables, "valid", Counter(), llm.max_records if llm else None)
    by_feature = read_explained(tables, explainers)
    pools = explained_by(by_feature)
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
        shuffled = shuffled_explanations(feature, by_feature, pools, config)
        one = FeatureWork(feature, settings_of(config, called_for[str(feature)]), explained.explanations, shuffled)
        if pairs_left is not None:
            pairs_left -= (len(one.rules()) + num_nulls) * num_records[str(feature)]
            pairs_left -= (len(one.own_rules()) + num_nulls) * num_valid[str(feature)]
        if pairs_left is not None and pairs_left < 0:
            for explainer in explained.explanations:
                leave_out(feature, explainer, "no_budget")
        else:
            work.append(one)
    return work, unscored


def settings_of(config: RunConfig, num_rule_negatives: int) -> str:
    """What a feature's scores depend on besides arms and records: they are made again where it has changed."""
    score = config.score
    resampled = f"studentised bootstrap {score.num_bootstrap}, shuffled {score.num_shuffled}, caps over all ranks"
    return f"{resampled}, rule negatives " + (
        f"{score.num_rule_negatives} an arm, {num_rule_negatives} in all" if score.num_rule_negatives else "0"
    )


def count_rule_negatives(config: RunConfig, tables: Tables) -> Counter[str]:
    """Test records by feature that its explanations called for, if they are graded on."""
    if not config.score.num_rule_negatives:
        return Counter()
    return Counter(tables.read("test_records", ["feature_key"])["feature_key"].to_pylist())


def graded_sources(config: RunConfig) -> tuple[str, ...]:
    """Complementary sources that explanations are graded on."""
    return (*config.records.complementary, *([RULE_NEGATIVE] if config.score.num_rule_negatives else []))


class Explained(NamedTuple):
    """What the explainers found for one feature."""

    explanations: dict[str, Explanation]
    """By explainer arm id."""
    failed: dict[str, str]
    """Status of the explainers that ran and found none."""


Pools = dict[str, dict[str, list[FeatureId]]]
"""Explained features in order, by explainer and SAE."""


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


def count_records(
    tables: Tables, split: str, rule_negatives: Counter[str], max_records: int | None, silent_alone: bool = False
) -> Counter[str]:
    """Records of a split by feature, at most `max_records` of each source; without positives where `silent_alone`."""
    counts: Counter[str] = Counter()
    where = f"split = '{split}'" + (" and source != 'positive'" if silent_alone else "")
    for row in tables.read("record_counts", ["feature_key", "found"], where).to_pylist():
        counts[row["feature_key"]] += row["found"] if max_records is None else min(row["found"], max_records)
    counts.update({key: n if max_records is None else min(n, max_records) for key, n in rule_negatives.items()})
    return counts


def explained_by(by_feature: Mapping[FeatureId, Explained]) -> Pools:
    """Features that each explainer has explained, by its arm id."""
    features: dict[str, list[FeatureId]] = {}
    for feature, explained in by_feature.items():
        for name in explained.explanations:
            features.setdefault(name, []).append(feature)
    return {name: by_sae(of_name) for name, of_name in features.items()}


def shuffled_explanations(
    feature: FeatureId, by_feature: Mapping[FeatureId, Explained], pools: Pools, config: RunConfig
) -> dict[str, list[Explanation]]:
    """For each explainer that explained the feature, what it said of some other features.

    Args:
        pools: As `explained_by` gives them.
    """
    shuffled = {}
    for name in by_feature[feature].explanations:
        chosen = shuffled_features(feature, pools[name], config.score.num_shuffled, config.seed)
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


def score_row(
    feature: FeatureId, explainer: str, control: str, simulator: str, scorer: str, source: str, **values: Any
) -> dict[str, Any]:
    """A row of `scores`: what was graded, and what came of it."""
    return {
        "feature_key": str(feature),
        "sae": feature.sae,
        "feature": feature.index,
        "explainer": explainer,
        "control": control,
        "simulator": simulator,
        "scorer": scorer,
        "source": source,
        "split": "test",
        **values,
    }


def unscored_rows(
    feature: FeatureId, explainer: str, control: str, simulator: str, sources: Sequence[str], status: str
) -> list[dict[str, Any]]:
    """Rows that say why there is no score."""
    return [
        score_row(feature, explainer, control, simulator, scorer, source, num_records=0, status=status)
        for scorer in SCORERS
        for source in sources
    ]


def _with_a_value(config: RunConfig, tables: Tables, simulator: str) -> set[tuple[str, str]]:
    """(feature, explainer) that were graded, under whatever settings: a budget does not take that away."""
    arm = arm_id(simulator, config.simulators[simulator])
    where = f"simulator = '{arm}' and control = '' and value is not null"
    rows = tables.read("scores", ["feature_key", "explainer"], where).to_pylist()
    return {(row["feature_key"], row["explainer"]) for row in rows}


def standing(config: RunConfig, tables: Tables, arm: str) -> dict[tuple[str, str], str]:
    """By (feature, explainer) that have rows under every source and the present settings: their status, the one that
    asks for another try first.

    Args:
        arm: Of a simulator or a further scorer, as in the tables.
    """
    sources, called_for = graded_sources(config), count_rule_negatives(config, tables)
    columns = ["feature_key", "explainer", "control", "source", "settings", "status"]
    where = f"simulator = '{arm}' and {sql_in('source', sources)} and (control = '' or {sql_in('status', TRIED_AGAIN)})"
    under: dict[tuple[str, str], dict[str, str]] = {}
    again: dict[tuple[str, str], str] = {}
    for row in tables.read("scores", columns, where).to_pylist():
        if row["settings"] != settings_of(config, called_for[row["feature_key"]]):
            continue
        pair = row["feature_key"], row["explainer"]
        if not row["control"]:
            under.setdefault(pair, {})[row["source"]] = row["status"]
        if row["status"] in TRIED_AGAIN:
            again[pair] = row["status"]
    whole = {pair: next(iter(of_pair.values())) for pair, of_pair in under.items() if of_pair.keys() >= set(sources)}
    # A null text that failed is every explainer's.
    return {pair: again.get(pair) or again.get((pair[0], "")) or status for pair, status in whole.items()}


def _measured(config: RunConfig, tables: Tables, simulator: str) -> set[tuple[str, str]]:
    """(feature, explainer) whose complexity was measured with the simulator."""
    arm = arm_id(simulator, config.simulators[simulator])
    where = f"simulator = '{arm}' and measure = '{OF_PREDICTIONS[-1]}'"
    rows = tables.read("complexity", ["feature_key", "explainer"], where).to_pylist()
    return {(row["feature_key"], row["explainer"]) for row in rows}
