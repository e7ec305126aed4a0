"""One-shot explanations: records in, candidate explanation out; and the feedback from which one is revised.

Knows prompts and parsing, not search or Ray. A failed parse is an outcome that keeps the raw answer, never an
explanation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp.config import LLMConfig, OneShotConfig
from rayinterp.corpus import stable_hash
from rayinterp.explain.client import LLMError, LLMReply, LLMRequest, endpoint_of
from rayinterp.explanation import MAX_STRENGTH, Explanation, ParseError, parse_string, parse_structured
from rayinterp.prompts import (
    STRUCTURED_PREFILL,
    MarkedRecord,
    Message,
    TokenError,
    explainer_messages,
    feedback_text,
    revision_messages,
)
from rayinterp.records import ActivationRecord, displayed
from rayinterp.score import leave_one_out

if TYPE_CHECKING:
    from jaxtyping import Float

Call = Callable[[LLMRequest, str], Awaitable["tuple[LLMReply, float | None]"]]
"""Makes or remembers one call: the reply and its price."""

MAX_ERRORS_SHOWN = 12
"""Tokens per record in feedback: the largest errors."""


class Outcome(NamedTuple):
    """What came of asking for an explanation."""

    explanation: Explanation | None
    status: str
    """ok, parse_error, cut_off or llm_error."""
    thought: str | None
    """The last raw answer, or the failure's name."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None


def first_messages(records: Sequence[ActivationRecord], config: OneShotConfig) -> list[Message]:
    """The conversation's beginning: the strongest train positives."""
    positives = [record for record in records if record.source == "positive"][: config.num_records_shown]
    return explainer_messages(
        [_marked(record) for record in positives], config.rule_cap, config.structured, config.few_shots
    )


def _marked(record: ActivationRecord) -> MarkedRecord:
    return MarkedRecord(record.sequence.tokens, tuple(displayed(record.activations)))


def continue_messages(messages: list[Message], answer: str, feedback: str, config: OneShotConfig) -> list[Message]:
    """The conversation with one more answer and what became of it."""
    return [*messages, *revision_messages(answer, feedback, config.structured)]


async def ask(
    call: Call, llm: LLMConfig, messages: list[Message], config: OneShotConfig, seed: str, feature_key: str
) -> Outcome:
    """Asks until an answer parses, at most `max_parse_retries` times more.

    Args:
        seed: Names the node; equal names with equal messages are the same request, so its answer is shared.
    """
    outcome = Outcome(None, "llm_error", None, 0, 0, None)
    # A small model writes the same rule for ever; in a frame it fills in the rules and no more.
    framed = llm.provider == "local" and config.structured
    for attempt in range(config.max_parse_retries + 1):
        request = LLMRequest(
            endpoint_of(llm),
            llm.model,
            tuple(messages),
            config.temperature,
            config.max_tokens,
            stable_hash(f"{seed}/{attempt}") % 2**31,
            STRUCTURED_PREFILL if framed else "",
            config.rule_cap if framed else 0,
        )
        try:
            reply, cost = await call(request, feature_key)
        except LLMError as error:
            return outcome._replace(status="llm_error", thought=str(error))
        explanation, status = read_answer(reply, config)
        outcome = Outcome(
            explanation,
            status,
            reply.text,
            outcome.prompt_tokens + reply.prompt_tokens,
            outcome.completion_tokens + reply.completion_tokens,
            cost if outcome.cost_usd is None else outcome.cost_usd + (cost or 0.0),
        )
        if explanation is not None:
            break
    return outcome


def read_answer(reply: LLMReply, config: OneShotConfig) -> tuple[Explanation | None, str]:
    """The explanation in an answer, and its status."""
    try:
        if config.structured:
            return parse_structured(reply.text, config.rule_cap), "ok"
        if reply.finish_reason == "length":
            return None, "cut_off"
        return parse_string(reply.text), "ok"
    except ParseError:
        return None, "cut_off" if reply.finish_reason == "length" else "parse_error"


def feedback(
    score: float | None,
    records: Sequence[ActivationRecord],
    predicted: Sequence[Float[np.ndarray, "seq"]],
    num_worst: int,
) -> str:
    """What an explainer is told: the train score, and the records whose removal would raise it most."""
    without = leave_one_out([record.activations for record in records], predicted)
    worst = np.argsort(-np.nan_to_num(without, nan=-np.inf), kind="stable")[:num_worst]
    return feedback_text(score, [(_marked(records[i]), _errors(records[i], predicted[i])) for i in worst])


def _errors(record: ActivationRecord, predicted: Float[np.ndarray, "seq"]) -> list[TokenError]:
    """Tokens on which the two differ, in the text's order, the largest differences only; both shown alike."""
    actual, guess = displayed(record.activations), [min(max(round(p), 0), MAX_STRENGTH) for p in predicted.tolist()]
    differing = [i for i in range(len(actual)) if actual[i] != guess[i]]
    shown = sorted(sorted(differing, key=lambda i: -abs(actual[i] - guess[i]))[:MAX_ERRORS_SHOWN])
    return [TokenError(record.sequence.tokens[i], guess[i], actual[i]) for i in shown]
