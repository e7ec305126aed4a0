"""Detection and fuzzing: an LLM says of a few texts at a time which of them fit an explanation.

    records -> questions (the same for every text that is graded) -> LLM -> a list of 0 and 1 -> a verdict per record

Knows prompts and parsing, not Ray. An answer that cannot be read, asked for again, is no verdict on any of its texts.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from rayinterp.config import DetectionConfig, FuzzingConfig, JudgeConfig, LLMConfig
from rayinterp.corpus import stable_hash
from rayinterp.explain.client import LLMError, LLMRequest, endpoint_of
from rayinterp.explain.explainer import Call
from rayinterp.feature_id import FeatureId
from rayinterp.prompts import MarkedRecord, Message, asked_again, detection_messages, fuzzing_messages, verdicts_again
from rayinterp.records import ActivationRecord, displayed
from rayinterp.scorers.values import Answers, fires
from rayinterp.sources import generator_for

if TYPE_CHECKING:
    from jaxtyping import Bool

Answer = TypeVar("Answer")

MESSAGES: dict[str, Callable[[str, list[MarkedRecord]], list[Message]]] = {
    "detection": detection_messages,
    "fuzzing": fuzzing_messages,
}


class Form(NamedTuple, Generic[Answer]):
    """What a question's answer looks like."""

    parse: Callable[[str], Answer | None]
    """None where it cannot be read."""
    schema: dict[str, Any]
    """A model of our own is held to it; an endpoint is asked, in the prompt."""
    again: str
    """What the LLM is told of an answer that cannot be read."""


def verdicts_form(count: int) -> Form[list[bool]]:
    schema = {"type": "array", "items": {"enum": [0, 1]}, "minItems": count, "maxItems": count}
    return Form(lambda answer: parse_verdicts(answer, count), schema, verdicts_again(count))


class Question(NamedTuple):
    """Texts that are shown together."""

    places: tuple[int, ...]
    """Of their records."""
    records: tuple[MarkedRecord, ...]


def questions(records: Sequence[ActivationRecord], num_shown: int, feature: FeatureId, seed: int) -> list[Question]:
    """Records of all kinds in an order that chance decides, as evenly as may be in questions of `num_shown` at most."""
    if not records:
        return []
    shown = marked(records, feature, seed)
    order = generator_for(seed, feature, "questions").permutation(len(records))
    parts = np.array_split(order, -(-len(records) // num_shown))
    return [Question(tuple(part.tolist()), tuple(shown[i] for i in part)) for part in parts]


def marked(records: Sequence[ActivationRecord], feature: FeatureId, seed: int) -> list[MarkedRecord]:
    """Records with the tokens marked that fire; in silent ones, as many tokens in places like those.

    What is marked in a silent record are the places that are marked in one of the others, so that neither their number
    nor whether they stand together gives it away.
    """
    masks = [record.activations > 0 for record in records if fires(record)]
    shown = []
    for record in records:
        strengths = displayed(record.activations)
        if not any(strengths):
            generator = generator_for(seed, feature, "marks", str(record.sequence.sequence_id))
            strengths = wrong_marks(record.sequence.tokens, masks, generator).astype(int).tolist()
        shown.append(MarkedRecord(record.sequence.tokens, tuple(strengths)))
    return shown


def wrong_marks(
    tokens: Sequence[str], masks: Sequence[Bool[np.ndarray, "_"]], generator: np.random.Generator
) -> Bool[np.ndarray, "seq"]:
    """A mask of another record, drawn by chance among those that mark something that can be seen here."""
    visible = np.array([bool(token.strip()) for token in tokens])
    for index in generator.permutation(len(masks)):
        mask = np.zeros(len(tokens), dtype=bool)
        length = min(len(tokens), len(masks[index]))
        mask[:length] = masks[index][:length]
        if (mask & visible).any():
            return mask
    mask = np.zeros(len(tokens), dtype=bool)
    if visible.any():
        mask[generator.choice(np.flatnonzero(visible))] = True
    return mask


def parse_verdicts(answer: str, count: int) -> list[bool] | None:
    """`count` verdicts from an LLM's answer, strict about meaning and lenient about wrapping; None where it has none.

    Code fences, prose around the list, an object that holds it, trailing commas, true and false, "1" and 1.0 are
    accepted, and so are bare numbers with nothing else. A list of another length is not, nor are two that differ.
    """
    bare = re.fullmatch(r"[01](?:[\s,]+[01])*", answer.strip())
    lists = ["[" + ",".join(re.findall("[01]", answer)) + "]"] if bare else re.findall(r"\[[^\[\]]*\]", answer)
    found = {tuple(verdicts) for text in lists if (verdicts := _verdicts(text)) and len(verdicts) == count}
    return list(found.pop()) if len(found) == 1 else None


def _verdicts(text: str) -> list[bool] | None:
    """A list of 0 and 1 and nothing else."""
    try:
        values = json.loads(re.sub(r",\s*\]", "]", text))
    except ValueError:
        return None
    known = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}
    verdicts = [known.get(str(value).strip().lower()) for value in values]
    return None if None in verdicts else [bool(verdict) for verdict in verdicts]


async def ask(
    call: Call,
    llm: LLMConfig,
    scorer: JudgeConfig,
    messages: list[Message],
    form: Form[Answer],
    feature: FeatureId,
    seed: int,
) -> Answer | None:
    """Asks until an answer parses, at most `max_parse_retries` times more; None where none does.

    Raises:
        LLMError: a call failed for good.
    """
    for attempt in range(scorer.max_parse_retries + 1):
        request = LLMRequest(
            endpoint_of(llm),
            llm.model,
            tuple(messages),
            scorer.temperature,
            scorer.max_tokens,
            # Of no arm: explainers that say the same are judged once.
            stable_hash(f"{seed}/{feature}/{attempt}") % 2**31,
            answer_schema=json.dumps(form.schema) if llm.provider == "local" else "",
        )
        reply, _ = await call(request, str(feature))
        answer = form.parse(reply.text)
        if answer is not None:
            return answer
        messages = asked_again(messages, reply.text, form.again)
    return None


async def all_or_failure(asked: Iterable[Awaitable[Answer]]) -> list[Answer] | None:
    """What comes of all of them; None where a call failed. The others are waited for, since they are paid for."""
    results: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, LLMError):
            raise result
    return None if any(isinstance(result, LLMError) for result in results) else results


async def judge(
    call: Call,
    llm: LLMConfig,
    scorer: DetectionConfig | FuzzingConfig,
    description: str,
    asked: Sequence[Question],
    feature: FeatureId,
    seed: int,
) -> Answers:
    """Verdicts on all records by one description."""

    def one(question: Question) -> Awaitable[list[bool] | None]:
        messages = MESSAGES[scorer.method](description, list(question.records))
        return ask(call, llm, scorer, messages, verdicts_form(len(question.records)), feature, seed)

    answers = await all_or_failure(map(one, asked))
    if answers is None:
        return Answers((), "llm_error")
    values: list[float | None] = [None] * sum(len(question.places) for question in asked)
    for question, verdicts in zip(asked, answers, strict=True):
        for place, verdict in zip(question.places, verdicts or [None] * len(question.places), strict=True):
            values[place] = None if verdict is None else float(verdict)
    return Answers(tuple(values))
