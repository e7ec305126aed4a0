"""How often the 95 % interval of a score holds the true one: ours, and quantiles of resampled documents, on the same
draws. Ratio: how much nearer to 95 % ours comes."""

from __future__ import annotations

import numpy as np

from rayinterp.score import SCORERS, correlation
from tests.benchmarks.measure import Row
from tests.sparse_scores import draw_records, measure_coverage, true_scores

NAME = "coverage"
NUM_REPEATS, NUM_BOOTSTRAP = 1000, 1000
MOST_OFF = 0.03
"""A coverage from 0.92 to 0.98 is what is aimed at."""


def plain_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """Every scorer but AUROC by its definition, on pooled tokens."""
    wrong = ((true - predicted) ** 2).sum()
    return {
        "correlation": correlation(true, predicted),
        "r2": float(1 - wrong / ((true - true.mean()) ** 2).sum()),
        "r2_uncentered": float(1 - wrong / (true**2).sum()),
        "abs_dev_explained": float(1 - np.abs(true - predicted).sum() / np.abs(true).sum()),
        "auroc": plain_auroc(true, predicted),
    }


def plain_auroc(true: np.ndarray, predicted: np.ndarray) -> float:
    silent = np.sort(predicted[true == 0])
    below = np.searchsorted(silent, predicted[true > 0], "left") + np.searchsorted(silent, predicted[true > 0], "right")
    return float(below.mean() / 2 / len(silent))


def percentile_coverage(num_repeats: int, num_bootstrap: int) -> dict[str, tuple[float, float]]:
    """Share covered and median width of the interval between two quantiles of scores of resampled documents."""
    truth = true_scores()
    found: dict[str, list[tuple[bool, float]]] = {name: [] for name in SCORERS}
    for repeat in range(num_repeats):
        rng = np.random.default_rng([8, repeat])
        draw = draw_records(rng)
        num_documents = draw.document_ids.max() + 1
        of_document = [np.flatnonzero(draw.document_ids == document) for document in range(num_documents)]
        resampled: dict[str, list[float]] = {name: [] for name in SCORERS}
        for _ in range(num_bootstrap):
            rows = np.concatenate([of_document[i] for i in rng.integers(0, num_documents, num_documents)])
            for name, value in plain_scores(draw.true[rows].ravel(), draw.predicted[rows].ravel()).items():
                assert value is not None
                resampled[name].append(value)
        for name, values in resampled.items():
            low, high = np.quantile(values, (0.025, 0.975))
            found[name].append((bool(low <= truth[name] <= high), float(high - low)))
    return {
        name: (float(np.mean([f[0] for f in rows])), float(np.median([f[1] for f in rows])))
        for name, rows in found.items()
    }


def run() -> list[Row]:
    ours = measure_coverage(NUM_REPEATS, NUM_BOOTSTRAP)
    plain = percentile_coverage(NUM_REPEATS // 2, NUM_BOOTSTRAP // 4)
    rows = []
    for name in SCORERS:
        off, plain_off = (abs(coverage[0] - 0.95) for coverage in (ours[name], plain[name]))
        what = f"{name}: median width {ours[name].width:.2f}, of quantiles {plain[name][1]:.2f}"
        ratio = plain_off / max(off, 1 / NUM_REPEATS)
        rows.append(Row(what, ours[name].covered, plain[name][0], ratio, "share covered", None, off <= MOST_OFF))
    return rows
