"""Complexity: how much an explanation says, and how its rules share the work. Functions; rows of `complexity`.

num_rules, num_words   of the explanation itself
num_rules_95           fewest rules, best first, that reach 95 % of the whole explanation's correlation
rule_removal           mean fall of the correlation when one rule is taken out
rule_overlap           how far two rules predict the same tokens, mean over pairs
rating                 how abstract the rules sound to an LLM, 0 to 5 (asked by `rating`)

Those in the middle depend on a simulator. They are measured on valid records, which chose the explanation, so that
nothing about test enters them; a score says how good an explanation is, these say of what kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from rayinterp.explanation import MAX_STRENGTH, Explanation
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord
from rayinterp.score import evaluate

ENOUGH = 0.95
"""Share of the whole explanation's correlation at which fewer rules will do."""
OF_WORDS = ("num_rules", "num_words")
OF_PREDICTIONS = ("num_rules_95", "rule_removal", "rule_overlap")
RATING = "rating"
MEASURES = (*OF_WORDS, *OF_PREDICTIONS, RATING)

Simulated = Mapping[str, list[np.ndarray]]
"""What each rule predicts for each valid record, by the rule's words."""


class Measure(NamedTuple):
    """One measure of one explanation."""

    value: float | None
    status: str
    """ok, or why there is no value."""


def num_words(explanation: Explanation) -> int:
    """Words of all rules, as white space parts them."""
    return sum(len(rule.activates_on.split()) for rule in explanation)


def measure_predictions(
    explanation: Explanation, records: Sequence[ActivationRecord], simulated: Simulated
) -> dict[str, Measure]:
    """Every measure that takes predictions."""
    if not records:
        return dict.fromkeys(OF_PREDICTIONS, Measure(None, "no_records"))

    def correlate(rules: Explanation) -> float | None:
        return evaluate(rules, records, dict(simulated))[0]

    whole = correlate(explanation)
    return {
        "num_rules_95": num_rules_95(explanation, whole, correlate),
        "rule_removal": rule_removal(explanation, whole, correlate),
        "rule_overlap": rule_overlap(explanation, simulated),
    }


def num_rules_95(
    explanation: Explanation, whole: float | None, correlate: Callable[[Explanation], float | None]
) -> Measure:
    """Rules are added one at a time, each time the one that gains most, until the correlation is 95 % of the whole's.

    A greedy order need not be the best of all, but finds a single rule that will do wherever there is one.
    """
    if whole is None:
        return Measure(None, "undefined")
    if whole <= 0:
        return Measure(None, "not_positive")
    chosen: Explanation = ()
    left = list(explanation)
    while left:
        reached = [-np.inf if (r := correlate((*chosen, rule))) is None else r for rule in left]
        best = int(np.argmax(reached))
        chosen = (*chosen, left.pop(best))
        if reached[best] >= ENOUGH * whole:
            break
    return Measure(float(len(chosen)), "ok")


def rule_removal(
    explanation: Explanation, whole: float | None, correlate: Callable[[Explanation], float | None]
) -> Measure:
    """Mean over rules of what the correlation falls by when that rule alone is taken out; below 0 if they do harm.

    Undefined where nothing is left to predict with: for one rule, or when what the others predict is constant.
    """
    if len(explanation) == 1:
        return Measure(None, "one_rule")
    without = [correlate(explanation[:i] + explanation[i + 1 :]) for i in range(len(explanation))]
    left = [value for value in without if value is not None]
    if whole is None or len(left) < len(without):
        return Measure(None, "undefined")
    return Measure(float(np.mean([whole - value for value in left])), "ok")


def rule_overlap(explanation: Explanation, simulated: Simulated) -> Measure:
    """Mean over pairs of rules of sum(min) / sum(max) of what they predict, each at its strength: 1 where two predict
    the same, 0 where they never meet. Pairs that predict nothing at all are left out."""
    if len(explanation) == 1:
        return Measure(None, "one_rule")
    predicted = [rule.strength / MAX_STRENGTH * np.concatenate(simulated[rule.activates_on]) for rule in explanation]
    either = [(np.minimum(a, b).sum(), np.maximum(a, b).sum()) for a, b in combinations(predicted, 2)]
    shares = [both / any_ for both, any_ in either if any_ > 0]
    return Measure(float(np.mean(shares)), "ok") if shares else Measure(None, "silent")


def mean_rating(explanation: Explanation, ratings: Mapping[str, float]) -> float:
    """Of an explanation: the mean over its rules, weighted by strength.

    A maximum would grow with the number of rules though no rule is more abstract; that number is a measure of its own.
    """
    weights = [rule.strength for rule in explanation]
    return float(
        np.average([ratings[rule.activates_on] for rule in explanation], weights=weights if any(weights) else None)
    )


def complexity_rows(
    feature: FeatureId, explainer: str, simulator: str, measures: Mapping[str, Measure]
) -> list[dict[str, Any]]:
    """Rows of `complexity`; `simulator` is empty for what takes none."""
    return [
        {
            "feature_key": str(feature),
            "sae": feature.sae,
            "feature": feature.index,
            "explainer": explainer,
            "simulator": simulator,
            "measure": name,
            "value": measure.value,
            "status": measure.status,
        }
        for name, measure in measures.items()
    ]


def rows_of_words(feature: FeatureId, explainer: str, explanation: Explanation) -> list[dict[str, Any]]:
    """Rows for what the words alone say."""
    measures = {
        "num_rules": Measure(float(len(explanation)), "ok"),
        "num_words": Measure(float(num_words(explanation)), "ok"),
    }
    return complexity_rows(feature, explainer, "", measures)
