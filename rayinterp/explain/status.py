"""What a user sees of the explain stage while it runs: features, scores, calls, dollars, and the time left."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

POLL_SECONDS = 2.0
"""Between two looks at what the actors have spent."""


@dataclass
class Spent:
    """What searches have asked for."""

    calls: int = 0
    """LLM calls answered; those that the ledger remembered are not among them."""
    failed_calls: int = 0
    """After all retries."""
    usd: float = 0.0
    """Price of the calls."""
    pairs: int = 0
    """(rule, sequence) pairs simulated, or found in the memo."""
    simulated_tokens: int = 0
    """Their tokens."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


class Account:
    """Adds up what the actors say they have spent; one that was started anew counts from nothing again."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._before, self._now = [Spent() for _ in actors], [Spent() for _ in actors]
        self._asked: dict[Any, int] = {}
        """Questions under way, and the actor's place: a driver that waited for a busy actor would leave others idle."""
        self._asked_at = 0.0

    def read(self, at_once: bool = False) -> Spent:
        """The sum, as the actors last said; they are asked every `POLL_SECONDS`.

        Args:
            at_once: Ask now, and wait a moment for the answers.
        """
        if at_once or time.monotonic() - self._asked_at > POLL_SECONDS:
            waited_for = set() if at_once else set(self._asked.values())
            self._asked |= {a.spent.remote(): i for i, a in enumerate(self._actors) if i not in waited_for}
            self._asked_at = time.monotonic()
        if self._asked:
            timeout = POLL_SECONDS if at_once else 0
            for reference in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=timeout)[0]:
                self._take(self._asked.pop(reference), reference)
        return sum([*self._before, *self._now], Spent())

    def _take(self, i: int, reference: Any) -> None:
        try:
            spent: Any = ray.get(reference)
        except RayActorError:
            return
        if spent.pairs < self._now[i].pairs or spent.calls < self._now[i].calls:
            self._before[i] = self._before[i] + self._now[i]
        self._now[i] = spent


class Status:
    """Counts features and scores."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.failed = total, done, 0
        self.spent = Spent()
        self._before, self._start = done, time.monotonic()
        self._scores: list[float] = []

    def take(self, valid_scores: Sequence[float], finished: bool) -> None:
        """One feature has come to its end, or has failed for now."""
        self.done += finished
        self.failed += not finished
        for score in valid_scores:
            bisect.insort(self._scores, score)

    def figures(self, pending: int, running: int, stopped_by: str | None) -> dict[str, str]:
        """By name, for a table or a line."""
        elapsed, fresh = time.monotonic() - self._start, self.done - self._before
        shown = {
            "features": f"{pending} pending, {running} running, {self.done} done",
            "tried again": str(self.failed) if self.failed else "",
            "valid score": f"median {statistics.median(self._scores):.2f}, best {self._scores[-1]:.2f}"
            if self._scores
            else "",
            "LLM calls": f"{self.spent.calls:,}" if self.spent.calls else "",
            "cost": f"${self.spent.usd:,.2f}" if self.spent.usd else "",
            "simulated": f"{self.spent.simulated_tokens:,} tokens" if self.spent.simulated_tokens else "",
            "time left": f"{elapsed / fresh * (pending + running):,.0f} s" if fresh else "",
            "stopping": stopped_by or "",
        }
        return {name: figure for name, figure in shown.items() if figure}
