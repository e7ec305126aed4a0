"""Surprisal: what an explanation in front of it takes off a language model's loss on a text.

description + text, no description + text -> loss per token of each -> their difference -> activating against silent
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayinterp.prompts import NO_DESCRIPTION
from rayinterp.records import ActivationRecord
from rayinterp.scorers.values import Answers
from rayinterp.simulate.simulator import RuleRequest

if TYPE_CHECKING:
    from jaxtyping import Float

TokenLosses = Callable[[list[RuleRequest]], Awaitable["list[list[np.ndarray]]"]]
"""Negative log-likelihoods of the tokens of every text behind a description."""


def loss_drops(
    without: Sequence[Float[np.ndarray, "_"]], behind: Sequence[Float[np.ndarray, "_"]]
) -> tuple[float | None, ...]:
    """For each text, nats per token that the description saves; None for a text without tokens."""
    return tuple(
        float(np.mean(base) - np.mean(losses)) if len(losses) else None
        for base, losses in zip(without, behind, strict=True)
    )


async def surprisal(
    losses: TokenLosses, descriptions: Sequence[str], records: Sequence[ActivationRecord]
) -> dict[str, Answers]:
    """The drop of every record's loss by description."""
    sequences = tuple(record.sequence for record in records)
    without, *behind = await losses([RuleRequest(text, sequences) for text in (NO_DESCRIPTION, *descriptions)])
    return {text: Answers(loss_drops(without, of_text)) for text, of_text in zip(descriptions, behind, strict=True)}
