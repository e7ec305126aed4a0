"""Ratings: how abstract an LLM finds every explanation, and the measures that need no LLM. Writes `complexity`.

    explanations without a rating -> their rules, each once -> simulator service -> mean per explanation

A rule is rated on its own, so equal rules are asked for once; what is done is read from the table.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from rayinterp.complexity import RATING, Measure, complexity_rows, mean_rating, rows_of_words
from rayinterp.config import RunConfig, arm_id
from rayinterp.explanation import Explanation
from rayinterp.feature_id import FeatureId
from rayinterp.grade_plan import read_explained
from rayinterp.prompts import abstractness_messages
from rayinterp.simulate.client import SimulatorClient
from rayinterp.simulate.simulator import expected_value
from rayinterp.tables import Tables, sql_in

BATCH = 512
"""Rules in one request."""


def rater_id(config: RunConfig) -> str | None:
    """The rater as the table names it: its arm and the prompt; None where the config asks for none."""
    name = config.score.complexity.simulator
    return None if name is None else arm_id(name, config.simulators[name], abstractness_messages())


def unrated(config: RunConfig, tables: Tables, explainers: list[str]) -> dict[tuple[FeatureId, str], Explanation]:
    """Explanations that the rater has not seen, by feature and explainer arm id."""
    rater = rater_id(config)
    return {} if rater is None else _lacking(tables, explainers, f"measure = '{RATING}' and simulator = '{rater}'")


def run_complexity(config: RunConfig, tables: Tables, explainers: list[str]) -> None:
    """Writes what is missing of the measures that need no predictions; the rater must have been deployed."""
    new = _lacking(tables, explainers, "measure = 'num_words'")
    tables.append("complexity", [row for key, explanation in new.items() for row in rows_of_words(*key, explanation)])
    name, rater = config.score.complexity.simulator, rater_id(config)
    left = unrated(config, tables, explainers)
    if name is None or rater is None or not left:
        return
    client = SimulatorClient(name, config, tables, None)
    # In parts, so that what is rated stays rated.
    keys = list(left)
    for start in range(0, len(keys), BATCH):
        part = keys[start : start + BATCH]
        rules = list(dict.fromkeys(rule.activates_on for key in part for rule in left[key]))
        values = expected_value(np.asarray(asyncio.run(client.rate(rules))))
        ratings = dict(zip(rules, values.tolist(), strict=True))
        rows: list[dict[str, Any]] = []
        for feature, explainer in part:
            value = mean_rating(left[feature, explainer], ratings)
            measure = Measure(value, "ok") if np.isfinite(value) else Measure(None, "not_finite")
            rows += complexity_rows(feature, explainer, rater, {RATING: measure})
        tables.append("complexity", rows)


def _lacking(tables: Tables, explainers: list[str], where: str) -> dict[tuple[FeatureId, str], Explanation]:
    rows = tables.read("complexity", ["feature_key", "explainer"], f"{where} and {sql_in('explainer', explainers)}")
    done = {(row["feature_key"], row["explainer"]) for row in rows.to_pylist()}
    return {
        (feature, explainer): explanation
        for feature, explained in sorted(read_explained(tables, explainers).items())
        for explainer, explanation in explained.explanations.items()
        if (str(feature), explainer) not in done
    }
