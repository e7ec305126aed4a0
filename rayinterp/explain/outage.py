"""Whether an LLM is down, from what becomes of features: when to go on, when to wait, when to give up.

Knows neither Ray nor LLMs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_FAILURES = 5
"""Features in a row that fail without a call answered before an LLM is taken to be down."""
PAUSE_SECONDS = 20.0
"""Between two attempts while it is."""


class Outage:
    """Told of answers and failures as they come.

    Args:
        has_answered: Calls were answered in a run before this one.
        patience: Seconds that it may be down.
        clock: Seconds that only go up.
    """

    def __init__(self, has_answered: bool, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.has_answered = has_answered
        """Ever: an LLM that never did is not configured rightly, and waiting would not help."""
        self.resume_at = 0.0
        """Nothing should be tried before."""
        self._in_doubt: set[str] = set()
        """Features whose failure may pass, since the last answer."""
        self._patience, self._clock = patience, clock
        self._failures, self._last_answer = 0, clock()

    @property
    def doubted(self) -> bool:
        """A feature failed as it would in an outage, and no call was answered since."""
        return bool(self._in_doubt)

    @property
    def down(self) -> bool:
        return self._failures >= MAX_FAILURES

    def answered(self, num_calls: int) -> None:
        """Takes note of calls that were answered, if any were."""
        if num_calls > 0:
            self.has_answered, self._failures, self._last_answer = True, 0, self._clock()
            self._in_doubt.clear()

    def tolerates(self, feature: str) -> bool:
        """Whether a failure of this feature says something of it alone. In an outage its failed answers would stay."""
        return self.has_answered and not self.down and self._in_doubt <= {feature}

    def failed(self, feature: str, transient: bool) -> bool:
        """Takes note of a feature that failed; returns whether there is no point in going on."""
        self._failures += 1
        if transient:
            self._in_doubt.add(feature)
        if not self.down:
            return False
        self.resume_at = self._clock() + PAUSE_SECONDS
        too_long = self._clock() - self._last_answer > self._patience
        return too_long or not transient or not self.has_answered
