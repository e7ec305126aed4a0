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


class Throughput:
    """Counts tokens of one stage since it started, and publishes what a progress bar shows as Ray metrics.

    `rayinterp_units_done`, `rayinterp_units_total`, `rayinterp_tokens_per_second` and `rayinterp_seconds_left`, each
    with the tags `run` and `stage`, stand on the dashboard and for Prometheus to scrape.
    """

    def __init__(self, run: str, stage: str, done: int, total: int) -> None:
        self._start, self._tokens = time.monotonic(), 0
        self._before, self._done, self._total = done, done, total
        tags = {"run": run, "stage": stage}
        self._gauges = {
            name: Gauge(f"rayinterp_{name}", description, tuple(tags)).set_default_tags(tags)
            for name, description in (
                ("units_done", "Shards or files finished."),
                ("units_total", "Shards or files in all."),
                ("tokens_per_second", "Tokens per second since the stage started."),
                ("seconds_left", "Estimate from the mean speed so far."),
            )
        }
        self._publish()

    def add(self, units: int, tokens: int) -> None:
        """Takes note of finished work."""
        self._done += units
        self._tokens += tokens
        self._publish()

    def report(self, progress: Progress) -> None:
        """Tells a progress display."""
        progress(self._done, self._total, f"{self.tokens_per_second:,.0f} tokens/s" if self._tokens else "")

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(time.monotonic() - self._start, 1e-9)

    def _publish(self) -> None:
        fresh = self._done - self._before
        elapsed = time.monotonic() - self._start
        self._gauges["units_done"].set(self._done)
        self._gauges["units_total"].set(self._total)
        self._gauges["tokens_per_second"].set(self.tokens_per_second)
        if fresh:
            self._gauges["seconds_left"].set(elapsed / fresh * (self._total - self._done))
