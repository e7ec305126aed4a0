"""Scores: how well simulated activations agree with the true ones, with intervals.

Everything is pooled over the tokens of all records of one (feature, complementary source), on the one scale of
explanations (5 = the feature's largest activation on train documents). Undefined is None with a reason, never a number.

Functions of arrays: `grade` applies them to every explanation, the search to its candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp.explanation import Explanation
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import combine

if TYPE_CHECKING:
    from jaxtyping import Float

FALSE_POSITIVE_ABOVE = 1.0
"""A silent token predicted above this counts as a false positive."""
WIDE_BELOW = 30
"""Fewer positive or complementary records than this give an interval too wide to lean on."""


MAX_AUROC_WEIGHTS = 4_000_000
"""Weights held at a time: 32 MB, and a few copies of it."""


class Score(NamedTuple):
    """One score of one explanation."""

    value: float | None
    low: float | None
    high: float | None
    status: str
    """ok, wide, or why there is no value."""


class Interval(NamedTuple):
    """A mean over features with its 95 % bootstrap interval; None where there is nothing to average."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def _moments(true: np.ndarray, predicted: np.ndarray, groups: np.ndarray) -> Float[np.ndarray, "groups 8"]:
    """Sums per document from which every metric but AUROC follows, so that a resample is a weighted sum of rows."""
    columns = np.stack(
        [
            np.ones_like(true),
            true,
            predicted,
            true * true,
            predicted * predicted,
            true * predicted,
            np.abs(true - predicted),
            np.abs(true),
        ],
        axis=1,
    )
    sums = np.zeros((int(groups.max()) + 1, columns.shape[1]))
    np.add.at(sums, groups, columns)
    return sums


def _correlation(m: np.ndarray) -> np.ndarray:
    """Pearson correlation from summed moments; nan where a side is constant."""
    n, t, p, tt, pp, tp = (m[..., i] for i in range(6))
    var_t, var_p = tt - t * t / n, pp - p * p / n
    # Rounding leaves a constant side with a variance of some 1e-16 of its square.
    constant = (var_t <= 1e-10 * np.maximum(tt, 1e-30)) | (var_p <= 1e-10 * np.maximum(pp, 1e-30))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(constant, np.nan, (tp - t * p / n) / np.sqrt(var_t * var_p))


def _r2(m: np.ndarray) -> np.ndarray:
    """1 - residual over centred total sum of squares."""
    n, t, _, tt, pp, tp = (m[..., i] for i in range(6))
    return _one_minus_ratio(tt - 2 * tp + pp, tt - t * t / n)


def _r2_uncentered(m: np.ndarray) -> np.ndarray:
    """1 - residual over raw sum of squares (Bills et al. 2023, Language models can explain neurons)."""
    return _one_minus_ratio(m[..., 3] - 2 * m[..., 5] + m[..., 4], m[..., 3])


def _abs_dev_explained(m: np.ndarray) -> np.ndarray:
    """1 - mean absolute error over mean absolute truth (Bills et al. 2023)."""
    return _one_minus_ratio(m[..., 6], m[..., 7])


def _one_minus_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole <= 1e-12, np.nan, 1 - part / whole)


_FROM_MOMENTS = {
    "correlation": _correlation,
    "r2": _r2,
    "r2_uncentered": _r2_uncentered,
    "abs_dev_explained": _abs_dev_explained,
}
SCORERS = (*_FROM_MOMENTS, "auroc")


def correlation(true: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"]) -> float | None:
    """Pearson correlation; None where either side is constant."""
    m = _moments(true.astype(np.float64), predicted.astype(np.float64), np.zeros(len(true), dtype=int))
    return _defined(_correlation(m[0]))


def _defined(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def auroc(
    true: np.ndarray, predicted: np.ndarray, weights: Float[np.ndarray, "resamples n"]
) -> Float[np.ndarray, "resamples"]:
    """Chance that a firing token is predicted above a silent one, ties counting half; nan without both kinds."""
    order = np.argsort(predicted, kind="stable")
    starts = np.flatnonzero(np.diff(predicted[order], prepend=np.nan) != 0)
    fired = (true > 0)[order]
    positive = np.add.reduceat(weights[:, order] * fired, starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~fired, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    total = positive.sum(1) * negative.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total == 0, np.nan, (positive * (below + negative / 2)).sum(1) / total)


def score_all(
    true: Sequence[Float[np.ndarray, "seq"]],
    predicted: Sequence[Float[np.ndarray, "seq"]],
    document_ids: Sequence[int],
    generator: np.random.Generator,
    num_bootstrap: int,
    wide: bool,
) -> dict[str, Score]:
    """Every scorer with its 95 % interval, from resampling documents (records of one document stand together)."""
    t, p = np.concatenate(true).astype(np.float64), np.concatenate(predicted).astype(np.float64)
    lengths = [len(activations) for activations in true]
    documents, group = np.unique(np.asarray(document_ids), return_inverse=True)
    groups = np.repeat(group, lengths)
    draws = generator.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), num_bootstrap)
    sums = _moments(t, p, groups)
    resampled = draws @ sums
    scores = {
        name: _score(metric(sums.sum(0)), metric(resampled), t, p, wide) for name, metric in _FROM_MOMENTS.items()
    }
    whole = auroc(t, p, np.ones((1, len(t))))[0]
    # In parts: weights for all resamples and tokens at once would be gigabytes for long sequences.
    parts = np.array_split(draws, max(1, num_bootstrap * len(t) // MAX_AUROC_WEIGHTS))
    resampled_auroc = np.concatenate([auroc(t, p, part[:, groups]) for part in parts])
    return {**scores, "auroc": _score(whole, resampled_auroc, t, p, wide)}


def _score(value: np.ndarray, resampled: np.ndarray, true: np.ndarray, predicted: np.ndarray, wide: bool) -> Score:
    if np.isnan(value):
        return Score(None, None, None, undefined_because(true, predicted))
    return with_interval(value, resampled, wide)


def with_interval(value: np.ndarray, resampled: Float[np.ndarray, "resamples"], wide: bool) -> Score:
    """A value and the interval of its resamples, those left out in which it is undefined."""
    defined = resampled[~np.isnan(resampled)]
    low, high = np.quantile(defined, (0.025, 0.975)) if len(defined) else (None, None)
    return Score(
        float(value),
        None if low is None else float(low),
        None if high is None else float(high),
        "wide" if wide else "ok",
    )


def undefined_because(true: np.ndarray, predicted: np.ndarray) -> str:
    """Why a correlation has no value."""
    if np.ptp(true) == 0:
        return "constant_truth"
    return "constant_prediction" if np.ptp(predicted) == 0 else "undefined"


def false_positives_per_sequence(
    true: Sequence[Float[np.ndarray, "seq"]], predicted: Sequence[Float[np.ndarray, "seq"]]
) -> float | None:
    """Silent tokens predicted to fire, per complementary record; None without records."""
    if not true:
        return None
    return float(np.mean([np.sum((p > FALSE_POSITIVE_ABOVE) & (t == 0)) for t, p in zip(true, predicted, strict=True)]))


def mean_interval(values: Float[np.ndarray, "n"], seed: int, num_bootstrap: int = 1000) -> Interval:
    """Mean with a 95 % interval from resampling features; nan values must have been set aside by the caller."""
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0)
    picks = np.random.default_rng(seed).integers(0, n, (num_bootstrap, n))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), n)


def evaluate(
    explanation: Explanation, records: Sequence[ActivationRecord], simulated: dict[str, list[np.ndarray]]
) -> tuple[float | None, list[np.ndarray]]:
    """Correlation over all records, and the prediction per record, from each rule's simulation of them."""
    predicted = combine(explanation, [simulated[rule.activates_on] for rule in explanation])
    true = np.concatenate([record.activations for record in records])
    return correlation(true, np.concatenate(predicted)), predicted


def leave_one_out(
    true: Sequence[Float[np.ndarray, "seq"]], predicted: Sequence[Float[np.ndarray, "seq"]]
) -> Float[np.ndarray, "records"]:
    """Correlation without each record, from running sums; nan where it is undefined."""
    groups = np.repeat(np.arange(len(true)), [len(t) for t in true])
    sums = _moments(np.concatenate(true).astype(np.float64), np.concatenate(predicted).astype(np.float64), groups)
    return _correlation(sums.sum(0) - sums)
