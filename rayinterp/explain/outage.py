"""Whether an LLM is down, from what becomes of features: when to go on, when to wait, when to give up.

Where a call fails, the LLM is asked a plain question too. If it answers that, it is up, and the feature's own prompt is
what it cannot take. Knows neither Ray nor LLMs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_FAILURES = 5
"""Features in a row that fail without a call answered before an LLM is taken to be down."""
MAX_TRIES = 3
"""Of a feature on which calls fail while the LLM answers a plain question; the last one goes on without the answers
that fail."""
PAUSE_SECONDS = 20.0
"""Between two attempts while it is."""


class Outage:
    """Told of answers, and of features that fail while an LLM answers nothing else either.

    Args:
        has_answered: Every explainer had answers in a run before this one.
        patience: Seconds that it may be down.
        clock: Seconds that only go up.
    """

    def __init__(self, has_answered: bool, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.has_answered = has_answered
        """About a feature, in this run or one before: an LLM that never did is not set up rightly, and waiting would
        not help."""
        self.resume_at = 0.0
        """Nothing should be tried before."""
        self._patience, self._clock = patience, clock
        self._failures, self._last_sign = 0, clock()

    @property
    def down(self) -> bool:
        return self._failures >= MAX_FAILURES

    def lets(self, any_under_way: bool) -> bool:
        """Whether a feature may be tried now: while the LLM is down one at a time, with pauses; and after a failure
        before the first answer once all under way have ended, whose answers may be the first."""
        in_doubt = self.down or (self._failures > 0 and not self.has_answered)
        return self._clock() >= self.resume_at and not (in_doubt and any_under_way)

    def wait(self) -> None:
        """Sleeps until one may be tried, a second at most."""
        time.sleep(min(max(self.resume_at - self._clock(), 0.0), 1.0))

    def answered(self, num_calls: int) -> None:
        """Takes note of calls about features that were answered, if any were."""
        if num_calls > 0:
            self.has_answered = True
            self.is_up()

    def is_up(self) -> None:
        """Takes note of a sign of life: an answer, if only to the plain question."""
        self._failures, self._last_sign = 0, self._clock()

    def failed(self, transient: bool) -> bool:
        """Takes note of a feature that failed as any would now; returns whether there is no point in going on."""
        self._failures += 1
        if not self.down:
            return False
        self.resume_at = self._clock() + PAUSE_SECONDS
        too_long = self._clock() - self._last_sign > self._patience
        return too_long or not transient or not self.has_answered
