"""What every further scorer has left to do: decided from tables and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rayinterp.config import IntruderConfig, JudgeConfig, RunConfig, ScorerConfig, scorer_id
from rayinterp.explanation import Explanation, wording
from rayinterp.feature_id import FeatureId
from rayinterp.grade_plan import (
    TRIED_AGAIN,
    Explained,
    Pools,
    count_records,
    count_rule_negatives,
    explained_by,
    first_of_each_sae,
    graded_sources,
    read_explained,
    score_row,
    settings_of,
    shuffled_explanations,
    standing,
)
from rayinterp.scorers.values import Graded
from rayinterp.simulate.simulator import CONTROL_NULLS
from rayinterp.sources import generator_for
from rayinterp.tables import Tables


class ScorerWork(NamedTuple):
    """What one scorer grades for one feature."""

    feature: FeatureId
    settings: str
    """From `grade_plan.settings_of`."""
    texts: dict[Graded, str]
    """The words of each explanation and control; one empty text where there is no explanation."""
    explanations: dict[str, Explanation]
    """By explainer arm id."""


class ScorerPlan(NamedTuple):
    """What one scorer has left to do."""

    name: str
    arm: str
    """Its name in the tables."""
    work: list[ScorerWork]
    unscored: list[dict[str, Any]]
    """Rows of `scores` for what is not graded."""
    num_finished: int
    """Features that have their scores."""


def plan_scorers(config: RunConfig, tables: Tables, explainers: list[str]) -> list[ScorerPlan]:
    """What every further scorer has left to do: decided from tables and config alone.

    Args:
        explainers: Explainer arm ids of this config.
    """
    return [plan_scorer(config, tables, name, explainers) for name in config.score.scorers]


def plan_scorer(config: RunConfig, tables: Tables, name: str, explainers: list[str]) -> ScorerPlan:
    """What one of them has left to do.

    `max_calls` counts calls whether or not they are remembered, so that a resumed run grades the same features.
    """
    scorer, arm = config.score.scorers[name], scorer_id(config, name)
    called_for = count_rule_negatives(config, tables)
    silent_alone = isinstance(scorer, IntruderConfig)
    num_records = count_records(tables, "test", called_for, scorer.max_records, silent_alone)
    stands = standing(config, tables, arm)
    by_feature = _to_grade(scorer, tables, explainers)
    pools = explained_by(by_feature)
    calls_left = config.llms[scorer.llm].max_calls if isinstance(scorer, JudgeConfig) else None
    plan = ScorerPlan(name, arm, [], [], 0)
    num_finished = 0
    for feature in first_of_each_sae(by_feature, scorer.num_features):
        key, settings = str(feature), settings_of(config, called_for[str(feature)])
        explained = by_feature[feature]
        for explainer, status in explained.failed.items():
            if stands.get((key, explainer)) != status:
                plan.unscored.extend(unscored_rows(config, plan, feature, settings, explainer, status))
        if calls_left is not None and isinstance(scorer, JudgeConfig):
            num_texts = len(texts_of(feature, by_feature, pools, explained.explanations, config))
            calls_left -= most_calls(scorer, num_records[key], num_texts)
        affordable = calls_left is None or calls_left >= 0
        left = {e: x for e, x in explained.explanations.items() if stands.get((key, e)) in (None, *TRIED_AGAIN)}
        if left and affordable:
            texts = texts_of(feature, by_feature, pools, left, config)
            plan.work.append(ScorerWork(feature, settings, texts, left if "" not in left else {}))
        elif left:
            for explainer in (e for e in left if stands.get((key, e)) != "no_budget"):
                plan.unscored.extend(unscored_rows(config, plan, feature, settings, explainer, "no_budget"))
        elif explained.explanations:
            num_finished += 1
    return plan._replace(num_finished=num_finished)


def _to_grade(scorer: ScorerConfig, tables: Tables, explainers: list[str]) -> dict[FeatureId, Explained]:
    """Explained features; for a scorer without explanations every live one, with an empty one of nobody."""
    if not isinstance(scorer, IntruderConfig):
        return read_explained(tables, explainers)
    live = tables.read("features", ["feature_key"], "status = 'live'")["feature_key"].to_pylist()
    return {FeatureId.parse(key): Explained({"": ()}, {}) for key in live}


def texts_of(
    feature: FeatureId,
    by_feature: Mapping[FeatureId, Explained],
    pools: Pools,
    explanations: Mapping[str, Explanation],
    config: RunConfig,
) -> dict[Graded, str]:
    """What is graded on one feature: explanations, of each explainer another feature's, and one null text.

    One control of each kind, since every text costs as many calls as an explanation; over features they are averaged.
    """
    if "" in explanations:
        return {Graded("", ""): ""}
    texts = {Graded(name, ""): wording(explanation) for name, explanation in explanations.items()}
    shuffled = shuffled_explanations(feature, by_feature, pools, config)
    texts |= {Graded(name, "shuffled"): wording(shuffled[name][0]) for name in explanations if name in shuffled}
    null = generator_for(config.seed, feature, "null text").integers(len(CONTROL_NULLS)) if texts else 0
    return texts | ({Graded("", "null"): CONTROL_NULLS[int(null)]} if texts else {})


def most_calls(scorer: JudgeConfig, num_records: int, num_texts: int) -> int:
    """LLM calls that one feature may take."""
    per_text = num_records if isinstance(scorer, IntruderConfig) else -(-num_records // scorer.num_shown)
    return per_text * num_texts * (1 + scorer.max_parse_retries)


def unscored_rows(
    config: RunConfig, plan: ScorerPlan, feature: FeatureId, settings: str, explainer: str, status: str
) -> list[dict[str, Any]]:
    """Rows that say why there is no score."""
    method = config.score.scorers[plan.name].method
    return [
        score_row(*(feature, explainer, "", plan.arm, method, source), num_records=0, status=status, settings=settings)
        for source in graded_sources(config)
    ]
