"""What every benchmark reports, and how it times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    name: str
    ours: float | None
    """None where it could not be run."""
    baseline: float | None
    ratio: float | None
    """How many times better ours is; above 1 is better."""
    unit: str
    target: float | None
    """The ratio aimed at."""
    met: bool | None


def compare(
    name: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    work: float,
    unit: str,
    target: float,
    repeats: int = 3,
) -> Row:
    """Throughput of both on the same work, taken in turn, medians of several repeats."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for times, call in zip(seconds, (ours, baseline), strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    ours_rate, baseline_rate = (work / statistics.median(times) for times in seconds)
    ratio = ours_rate / baseline_rate
    return Row(name, ours_rate, baseline_rate, ratio, unit, target, ratio >= target)
