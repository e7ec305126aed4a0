"""One-shot explanations: records in, candidate explanation out; and the feedback from which one is revised.

Knows prompts and parsing, not search or Ray. A failed parse is an outcome that keeps the raw answer, never an
explanation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp.config import AnswerFormat, LLMConfig, OneShotConfig
from rayinterp.corpus import stable_hash
from rayinterp.explain.client import LLMError, LLMReply, LLMRequest, endpoint_of
from rayinterp.explanation import Explanation, ParseError, parse_string, parse_structured
from rayinterp.prompts import (
    AnswerForm,
    MarkedRecord,
    Message,
    TokenError,
    answer_form,
    as_rules_object,
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
MIN_ERROR = 0.5
"""What prediction and truth must differ by to be an error."""
UNFINISHED = ("length", "content_filter")
"""Reasons for which an answer ends before its end."""
MAX_NEEDED_SHOWN = 5
"""Tokens per record that the feature needs."""
MIN_FALL = 0.1
"""Share of the largest fall that a needed token's must reach."""


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


def first_messages(
    records: Sequence[ActivationRecord],
    config: OneShotConfig,
    holistic: Mapping[int, Float[np.ndarray, "seq"]] | None = None,
    answer_format: AnswerFormat = "text",
) -> list[Message]:
    """The conversation's beginning: the strongest train positives, and silent texts if asked for.

    Args:
        holistic: Holistic activations by sequence, from `read_holistic`; shown where the config asks for them.
        answer_format: That of the LLM.
    """
    positives = [record for record in records if record.source == "positive"][: config.num_records_shown]
    needed = (holistic or {}) if config.holistic else {}
    return explainer_messages(
        [_marked(record, needed.get(record.sequence.sequence_id)) for record in positives],
        [_marked(record) for record in _silent(records, config.num_negatives_shown)],
        _form(config, answer_format),
        config.few_shots,
        bool(needed),
    )


def _silent(records: Sequence[ActivationRecord], count: int) -> list[ActivationRecord]:
    """Complementary records without any activation: the first of each source, then the second of each."""
    by_source: dict[str, list[ActivationRecord]] = {}
    for record in records:
        if record.source != "positive" and not record.activations.any():
            by_source.setdefault(record.source, []).append(record)
    rounds = zip_longest(*by_source.values())
    return [record for of_round in rounds for record in of_round if record is not None][:count]


def _form(config: OneShotConfig, answer_format: AnswerFormat) -> AnswerForm:
    return answer_form(config.rule_cap, config.structured, answer_format != "text")


def _marked(record: ActivationRecord, holistic: Float[np.ndarray, "seq"] | None = None) -> MarkedRecord:
    return MarkedRecord(record.sequence.tokens, tuple(displayed(record.activations)), _needed(record, holistic))


def _needed(record: ActivationRecord, holistic: Float[np.ndarray, "seq"] | None) -> tuple[str, ...]:
    """Tokens whose removal lowers the mean activation most, in that order; small falls are left out as noise."""
    if holistic is None or holistic.max() <= 0:
        return ()
    order = np.argsort(-holistic, kind="stable")[:MAX_NEEDED_SHOWN]
    return tuple(record.sequence.tokens[i] for i in order if holistic[i] >= MIN_FALL * holistic.max())


def continue_messages(
    messages: list[Message],
    answer: str,
    feedback: str,
    config: OneShotConfig,
    answer_format: AnswerFormat = "text",
) -> list[Message]:
    """The conversation with one more answer and what became of it.

    Args:
        answer: A JSON list of rules, put into the object that the LLM would have written, or a sentence.
    """
    if config.structured and answer_format != "text":
        answer = as_rules_object(answer)
    return [*messages, *revision_messages(answer, feedback, _form(config, answer_format))]


async def ask(
    call: Call, llm: LLMConfig, messages: list[Message], config: OneShotConfig, seed: str, feature_key: str
) -> Outcome:
    """Asks until an answer parses, at most `max_parse_retries` times more.

    Args:
        seed: Names the node; equal names with equal messages are the same request, so its answer is shared.
    """
    outcome = Outcome(None, "llm_error", None, 0, 0, None)
    # A small model writes the same rule for ever; an endpoint is told the form if the config says so.
    enforced = config.structured and (llm.provider == "local" or llm.answer_format != "text")
    for attempt in range(config.max_parse_retries + 1):
        request = LLMRequest(
            endpoint_of(llm),
            llm.model,
            tuple(messages),
            config.temperature,
            config.max_tokens,
            stable_hash(f"{seed}/{attempt}") % 2**31,
            list_cap=config.rule_cap if enforced else 0,
            answer_format=llm.answer_format if enforced else "text",
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
        if reply.finish_reason in UNFINISHED:
            return None, "cut_off"
        return parse_string(reply.text), "ok"
    except ParseError:
        return None, "cut_off" if reply.finish_reason in UNFINISHED else "parse_error"


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
    """Tokens on which the two differ, in the text's order, the largest differences only; both shown alike. A prediction
    that is no number is no error of the explanation."""
    errors = np.abs(predicted - record.activations)
    actual, guess = displayed(record.activations), displayed(np.nan_to_num(predicted))
    differing = [i for i in range(len(actual)) if errors[i] >= MIN_ERROR and actual[i] != guess[i]]
    shown = sorted(sorted(differing, key=lambda i: -errors[i])[:MAX_ERRORS_SHOWN])
    return [TokenError(record.sequence.tokens[i], guess[i], actual[i]) for i in shown]
