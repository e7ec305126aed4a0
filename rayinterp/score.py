"""Scores: how well simulated activations agree with the true ones, with intervals.

Everything is pooled over the tokens of all records of one (feature, complementary source), on the one scale of
explanations (5 = the feature's largest activation on train documents). Undefined is None with a reason, never a number.

Functions of arrays: `grade` applies them to every explanation, the search to its candidates.
"""

from __future__ import annotations

import math
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
FALSE_NEGATIVE_ABOVE = 1.0
"""A token that fires above this and is predicted at most `FALSE_POSITIVE_ABOVE` counts as a false negative.

The line is that of false positives: a prediction counts as firing above it, on silent and on firing tokens alike. True
activations below it are weaker than the weakest that a rule can name, since strengths are whole numbers."""
WIDE_BELOW = 30
"""Fewer positive or complementary records than this give an interval too wide to lean on."""
NOT_FINITE = "not_finite"
"""Status where an activation or a prediction is not a number, or infinite: nothing is computed from such a pair."""
NO_DOUBT = 1e-9
"""A standard error below this is rounding: every document agrees."""
MAX_LEFT_OUT = 500_000
"""Sums held at a time while documents are left out of resamples, times eight: 32 MB, and a few copies of it."""


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


def _moments(
    true: np.ndarray, predicted: np.ndarray, groups: np.ndarray, num_groups: int
) -> Float[np.ndarray, "groups 8"]:
    """Sums per group of tokens from which every metric but AUROC follows: a resample is a weighted sum of rows."""
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
    sums = np.zeros((num_groups, columns.shape[1]))
    np.add.at(sums, groups, columns)
    return sums


def _correlation(m: np.ndarray) -> np.ndarray:
    """Pearson correlation from summed moments; nan where a side is constant."""
    n, t, p, tt, pp, tp = (m[..., i] for i in range(6))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (tp - t * p / n) / np.sqrt(_varying(n, t, tt) * _varying(n, p, pp))


def _varying(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Sum of squares about the mean; nan where the side is constant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        around = squares - total * total / n
    # Rounding leaves a constant side with some 1e-16 of its square.
    return np.where(around <= 1e-10 * np.maximum(squares, 1e-30), np.nan, around)


def _r2(m: np.ndarray) -> np.ndarray:
    """1 - residual over centred total sum of squares."""
    n, t, _, tt, pp, tp = (m[..., i] for i in range(6))
    return _one_minus_ratio(tt - 2 * tp + pp, _varying(n, t, tt))


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
    """Pearson correlation; None where either side is constant, or not finite."""
    if not _are_finite([true], [predicted]):
        return None
    m = _moments(true.astype(np.float64), predicted.astype(np.float64), np.zeros(len(true), dtype=int), 1)
    return _defined(_correlation(m[0]))


def _defined(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


class _Sums(NamedTuple):
    """What every scorer needs of the documents, kinds of records apart."""

    num_records: Float[np.ndarray, "kinds documents"]
    moments: Float[np.ndarray, "kinds documents 8"]
    fired: Float[np.ndarray, "kinds documents"]
    """Tokens that fire."""
    silent: Float[np.ndarray, "kinds documents"]
    above: Float[np.ndarray, "kinds documents kinds documents"]
    """Pairs of a token that fires (first) and a silent one (second) predicted in this order; ties are halves."""


def _sum_up(
    true: Sequence[np.ndarray], predicted: Sequence[np.ndarray], kinds: np.ndarray, documents: np.ndarray
) -> _Sums:
    """
    Args:
        kinds, documents: Of each record, as numbers from 0 without gaps.
    """
    shape = (int(kinds.max()) + 1, int(documents.max()) + 1)
    num_cells = shape[0] * shape[1]
    cells = kinds * shape[1] + documents
    t, p = np.concatenate(true).astype(np.float64), np.concatenate(predicted).astype(np.float64)
    of_token = np.repeat(cells, [len(activations) for activations in true])
    moments = _moments(t, p, of_token, num_cells)
    fires = t > 0
    above = np.zeros((num_cells, num_cells))
    for cell in np.unique(of_token[~fires]):
        silent = np.sort(p[(of_token == cell) & ~fires])
        below = np.searchsorted(silent, p[fires], "left") + np.searchsorted(silent, p[fires], "right")
        above[:, cell] = np.bincount(of_token[fires], below / 2, num_cells)
    return _Sums(
        np.bincount(cells, minlength=num_cells).reshape(shape).astype(np.float64),
        moments.reshape(*shape, -1),
        np.bincount(of_token[fires], minlength=num_cells).reshape(shape).astype(np.float64),
        np.bincount(of_token[~fires], minlength=num_cells).reshape(shape).astype(np.float64),
        above.reshape(*shape, *shape),
    )


class _Resampled(NamedTuple):
    """One scorer on weighted documents."""

    values: Float[np.ndarray, "resamples"]
    errors: Float[np.ndarray, "resamples"]
    """Standard errors, by leaving out one document at a time."""


def _score_resamples(sums: _Sums, weights: Float[np.ndarray, "resamples documents"]) -> dict[str, _Resampled]:
    """Every scorer on the documents so often as `weights` say.

    Each kind of records is scaled to the number that there are: that was fixed by design, and is no source of doubt.
    """
    wanted = sums.num_records.sum(1)
    size = weights @ sums.num_records.T
    left_size = size[:, :, None] - sums.num_records
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(size > 0, wanted / size, np.nan)
        left_scale = np.where(left_size > 0, wanted[:, None] / left_size, np.nan)
    by_kind = np.einsum("bd,kdm->bkm", weights, sums.moments)
    moments = np.einsum("bk,bkm->bm", scale, by_kind)
    left_moments = sum(
        left_scale[:, kind, :, None] * (by_kind[:, kind, None] - sums.moments[kind]) for kind in range(len(wanted))
    )
    scores = {
        name: _Resampled(metric(moments), _jackknife(metric(np.asarray(left_moments)), weights))
        for name, metric in _FROM_MOMENTS.items()
    }
    values, left = _auroc(sums, weights, scale, left_scale)
    return {**scores, "auroc": _Resampled(values, _jackknife(left, weights))}


def _auroc(
    sums: _Sums,
    weights: Float[np.ndarray, "resamples documents"],
    scale: Float[np.ndarray, "resamples kinds"],
    left_scale: Float[np.ndarray, "resamples kinds documents"],
) -> tuple[Float[np.ndarray, "resamples"], Float[np.ndarray, "resamples documents"]]:
    """Chance that a firing token is predicted above a silent one, and the same without each document.

    Ties count half; nan without both kinds of tokens.
    """
    fired, silent = weights @ sums.fired.T, weights @ sums.silent.T
    in_order, left_in_order = np.zeros(len(weights)), np.zeros(weights.shape)
    for i, j in np.ndindex(scale.shape[1], scale.shape[1]):
        above = sums.above[i, :, j]
        of_fired, of_silent = weights @ above.T, weights @ above
        pairs = (of_fired * weights).sum(1)
        in_order += scale[:, i] * scale[:, j] * pairs
        left = pairs[:, None] - of_fired - of_silent + np.diagonal(above)
        left_in_order += left_scale[:, i] * left_scale[:, j] * left
    with np.errstate(divide="ignore", invalid="ignore"):
        num_pairs = (scale * fired).sum(1) * (scale * silent).sum(1)
        left_fired = (left_scale * (fired[:, :, None] - sums.fired)).sum(1)
        left_silent = (left_scale * (silent[:, :, None] - sums.silent)).sum(1)
        left_pairs = left_fired * left_silent
        values = np.where(num_pairs > 0, in_order / num_pairs, np.nan)
        return values, np.where(left_pairs > 0, left_in_order / left_pairs, np.nan)


def _jackknife(
    left_out: Float[np.ndarray, "resamples documents"], weights: Float[np.ndarray, "resamples documents"]
) -> Float[np.ndarray, "resamples"]:
    """Standard error from the values without each document; documents without which there is none are passed over."""
    defined = np.isfinite(left_out) & (weights > 0)
    weights, values = np.where(defined, weights, 0), np.where(defined, left_out, 0)
    n = np.maximum(weights.sum(1), 1)
    off = values - ((weights * values).sum(1) / n)[:, None]
    return np.sqrt((n - 1) / n * (weights * off * off).sum(1))


def score_all(
    true: Sequence[Float[np.ndarray, "seq"]],
    predicted: Sequence[Float[np.ndarray, "seq"]],
    document_ids: Sequence[int],
    generator: np.random.Generator,
    num_bootstrap: int,
    wide: bool,
    kinds: Sequence[str] | None = None,
) -> dict[str, Score]:
    """Every scorer with its 95 % interval, from resampling documents (records of one document stand together).

    Args:
        kinds: Of each record, why it was chosen; records of a kind were drawn in a fixed number. Left out, all are of
            one kind.
    """
    t, p = np.concatenate(true), np.concatenate(predicted)
    if not _are_finite(true, predicted):
        return dict.fromkeys(SCORERS, Score(None, None, None, NOT_FINITE))
    documents, places = np.unique(np.asarray(document_ids), return_inverse=True)
    of_kind = np.unique(np.asarray(kinds), return_inverse=True)[1] if kinds else np.zeros(len(true), dtype=int)
    sums = _sum_up(true, predicted, of_kind, places)
    whole = _score_resamples(sums, np.ones((1, len(documents))))
    has_doubt = bool(((sums.num_records > 0).sum(1) > 1).all())
    draws = generator.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), num_bootstrap)
    # In parts: every document left out of every resample at once would be gigabytes for many documents.
    parts = np.array_split(draws, max(1, num_bootstrap * len(documents) // MAX_LEFT_OUT)) if has_doubt else []
    resampled = [_score_resamples(sums, part.astype(np.float64)) for part in parts]
    scores = {}
    for name in SCORERS:
        (value,), (error,) = whole[name]
        if np.isnan(value):
            scores[name] = Score(None, None, None, undefined_because(t, p))
            continue
        low, high = _interval(name, value, error, [part[name] for part in resampled])
        scores[name] = Score(float(value), low, high, "wide" if wide else "ok")
    return scores


def _interval(
    name: str, value: float, error: float, resampled: Sequence[_Resampled]
) -> tuple[float, float] | tuple[None, None]:
    """A studentised bootstrap interval with jackknife errors over documents (Davison and Hinkley 1997, Bootstrap
    Methods and their Application, 5.2).

    Each resample says by how many of its own standard errors it misses the whole. For most scorers 95 % of them miss by
    less than what the interval reaches to either side (Hall 1988, On symmetric bootstrap confidence intervals). The
    interval of an AUROC, which stands close to its largest value, must reach further down: each side has its 2.5 %.
    Correlations are compared on Fisher's scale, where an error depends less on the value. (Quantiles of the resampled
    values themselves are too narrow: a few documents hold most of what fires.)
    """
    if not resampled:
        return None, None
    if error < NO_DOUBT:
        return float(value), float(value)
    values, errors = (np.concatenate(column) for column in zip(*resampled, strict=True))
    on_fishers = name == "correlation"
    with np.errstate(divide="ignore", invalid="ignore"):
        if on_fishers:
            errors, error = errors / (1 - values * values), error / (1 - value * value)
            values, value = np.arctanh(values), np.arctanh(value)
        misses = (values - value) / errors
    # A resample of documents that all agree has no error to compare with.
    misses = misses[np.isfinite(misses) & (errors >= NO_DOUBT)]
    if not len(misses):
        return None, None
    if name == "auroc":
        up, down = np.quantile(misses, (0.025, 0.975))
        return float(max(value - max(down, 0) * error, 0)), float(min(value - min(up, 0) * error, 1))
    reach = np.quantile(np.abs(misses), 0.95) * error
    low, high = value - reach, value + reach
    return (float(np.tanh(low)), float(np.tanh(high))) if on_fishers else (float(low), float(min(high, 1)))


def undefined_because(true: np.ndarray, predicted: np.ndarray) -> str:
    """Why a correlation has no value."""
    if not _are_finite([true], [predicted]):
        return NOT_FINITE
    if np.ptp(true) == 0:
        return "constant_truth"
    return "constant_prediction" if np.ptp(predicted) == 0 else "undefined"


def false_positives_per_sequence(
    true: Sequence[Float[np.ndarray, "seq"]], predicted: Sequence[Float[np.ndarray, "seq"]]
) -> float | None:
    """Silent tokens predicted to fire, per complementary record; None without records, or where one is not finite."""
    if not true or not _are_finite(true, predicted):
        return None
    return float(np.mean([np.sum((t == 0) & (p > FALSE_POSITIVE_ABOVE)) for t, p in zip(true, predicted, strict=True)]))


def false_negatives_per_sequence(
    true: Sequence[Float[np.ndarray, "seq"]], predicted: Sequence[Float[np.ndarray, "seq"]]
) -> float | None:
    """Firing tokens predicted to be silent, per positive record; None without records, or where one is not finite."""
    if not true or not _are_finite(true, predicted):
        return None
    missed = [
        np.sum((t > FALSE_NEGATIVE_ABOVE) & (p <= FALSE_POSITIVE_ABOVE)) for t, p in zip(true, predicted, strict=True)
    ]
    return float(np.mean(missed))


def _are_finite(true: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> bool:
    return all(bool(np.isfinite(values).all()) for values in (*true, *predicted))


def mean_interval(values: Float[np.ndarray, "n"], seed: int, num_bootstrap: int = 1000) -> Interval:
    """Mean with a 95 % interval from resampling features, none of a single one; nan values must have been set aside.

    The order of the values is that of a table's rows, in which runs differ, and does not matter.
    """
    n, values = len(values), np.sort(values)
    if n < 2:
        return Interval(float(values[0]) if n else None, None, None, n)
    picks = np.random.default_rng(seed).integers(0, n, (num_bootstrap, n))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), n)


def share_interval(hits: Float[np.ndarray, "n"]) -> Interval:
    """Share of ones with Wilson's 95 % interval, which has a width also where all are alike.

    Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    n, z = len(hits), 1.959964
    if n == 0:
        return Interval(None, None, None, 0)
    share = float(hits.mean())
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return Interval(share, max(low, 0.0), min(high, 1.0), n)


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
    if not _are_finite(true, predicted):
        return np.full(len(true), np.nan)
    groups = np.repeat(np.arange(len(true)), [len(t) for t in true])
    sums = _moments(
        np.concatenate(true).astype(np.float64), np.concatenate(predicted).astype(np.float64), groups, len(true)
    )
    return _correlation(sums.sum(0) - sums)
