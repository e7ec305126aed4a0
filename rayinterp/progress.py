"""How far a stage is: told to whoever draws it, and to Ray's metrics."""

from __future__ import annotations

import time
from typing import Protocol

from ray.util.metrics import Gauge


class Progress(Protocol):
    """What a stage calls as its work becomes visible in the tables."""

    def __call__(self, done: int, total: int, note: str | dict[str, str] = "") -> None:
        """`note` is one short figure, such as a rate, or several by name."""
        ...


def silent(done: int, total: int, note: str | dict[str, str] = "") -> None:
    """Progress that nobody watches."""


class Published:
    """A stage's progress, which Ray's metrics are told too, with the tags `run` and `stage`.

    A stage may count units of one kind after those of another: the time left is that of the kind it is at.
    """

    def __init__(self, run: str, stage: str, progress: Progress) -> None:
        self._progress = progress
        self._start, self._before, self._done, self._total = 0.0, 0, 0, -1
        tags = {"run": run, "stage": stage}
        self._units_done = Gauge("rayinterp_units_done", "Units of work finished.", tuple(tags))
        self._units_total = Gauge("rayinterp_units_total", "Units of work in all.", tuple(tags))
        self._seconds_left = Gauge("rayinterp_seconds_left", "Estimate from the mean speed so far.", tuple(tags))
        for gauge in (self._units_done, self._units_total, self._seconds_left):
            gauge.set_default_tags(tags)

    def __call__(self, done: int, total: int, note: str | dict[str, str] = "") -> None:
        if total != self._total or done < self._done:
            self._start, self._before = time.monotonic(), done
        self._done, self._total = done, total
        self._units_done.set(done)
        self._units_total.set(total)
        if done == total:
            self._seconds_left.set(0)
        elif done > self._before:
            elapsed = time.monotonic() - self._start
            self._seconds_left.set(elapsed / (done - self._before) * (total - done))
        self._progress(done, total, note)


class Throughput:
    """Counts the units and tokens of a stage since it started; `rayinterp_tokens_per_second` is its metric."""

    def __init__(self, run: str, stage: str, done: int, total: int) -> None:
        self._start, self._tokens = time.monotonic(), 0
        self._done, self._total = done, total
        tags = {"run": run, "stage": stage}
        self._rate = Gauge("rayinterp_tokens_per_second", "Tokens per second since the stage started.", tuple(tags))
        self._rate.set_default_tags(tags)

    def add(self, units: int, tokens: int) -> None:
        """Takes note of finished work."""
        self._done += units
        self._tokens += tokens
        self._rate.set(self.tokens_per_second)

    def report(self, progress: Progress) -> None:
        """Tells a progress display."""
        progress(self._done, self._total, f"{self.tokens_per_second:,.0f} tokens/s" if self._tokens else "")

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(time.monotonic() - self._start, 1e-9)
