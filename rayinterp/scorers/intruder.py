"""Intruder: an LLM finds the silent text among activating ones, without any explanation.

    a silent record, some activating ones -> marked, in an order of chance -> LLM -> a number -> found or not

What it measures is the feature, not an explanation: whether what activates it has anything in common that can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Sequence
from typing import NamedTuple

from rayinterp.config import IntruderConfig, LLMConfig
from rayinterp.explain.explainer import Call
from rayinterp.feature_id import FeatureId
from rayinterp.prompts import MarkedRecord, intruder_again, intruder_messages
from rayinterp.records import ActivationRecord
from rayinterp.scorers.judged import Form, all_or_failure, ask, marked
from rayinterp.scorers.values import Answers, fires
from rayinterp.sources import generator_for


class IntruderQuestion(NamedTuple):
    """One silent text among activating ones."""

    place: int
    """Of the intruder's record."""
    intruder: int
    """Its number among the texts shown, from 1."""
    records: tuple[MarkedRecord, ...]


def intruder_questions(
    records: Sequence[ActivationRecord], num_shown: int, feature: FeatureId, seed: int
) -> list[IntruderQuestion]:
    """One for every silent record; none where too few records activate the feature.

    A question depends on its intruder and the activating records alone, so that silent records which join later do not
    change the others'.
    """
    shown = marked(records, feature, seed)
    active = [index for index, record in enumerate(records) if fires(record)]
    if len(active) < num_shown - 1:
        return []
    asked = []
    for place, record in enumerate(records):
        if fires(record):
            continue
        generator = generator_for(seed, feature, "intruder", str(record.sequence.sequence_id))
        texts = [shown[active[i]] for i in generator.permutation(len(active))[: num_shown - 1]]
        number = int(generator.integers(num_shown))
        asked.append(IntruderQuestion(place, number + 1, (*texts[:number], shown[place], *texts[number:])))
    return asked


def parse_choice(answer: str, count: int) -> int | None:
    """The number of a text from an LLM's answer: the only one in it, or the only one in its last line.

    Several are no answer: whether the last of them is meant is a guess.
    """
    lines = [line for line in answer.splitlines() if re.search(r"\d", line)]
    for text in (answer, *lines[-1:]):
        numbers = set(re.findall(r"-?\d+(?:\.\d+)?", text))
        if len(numbers) == 1:
            number = numbers.pop()
            return int(number) if number.isdigit() and 1 <= int(number) <= count else None
    return None


async def find_intruders(
    call: Call,
    llm: LLMConfig,
    scorer: IntruderConfig,
    asked: Sequence[IntruderQuestion],
    num_records: int,
    feature: FeatureId,
    seed: int,
) -> Answers:
    """1 for every intruder that is found and 0 for every other one; nothing for activating records."""
    count = scorer.num_shown
    schema = {"enum": list(range(1, count + 1))}
    form = Form(lambda answer: parse_choice(answer, count), schema, intruder_again(count))

    def one(question: IntruderQuestion) -> Awaitable[int | None]:
        return ask(call, llm, scorer, intruder_messages(list(question.records)), form, feature, seed)

    answers = await all_or_failure(map(one, asked))
    if answers is None:
        return Answers((), "llm_error")
    if not asked:
        return Answers((), "no_records")
    values: list[float | None] = [None] * num_records
    for question, choice in zip(asked, answers, strict=True):
        values[question.place] = None if choice is None else float(choice == question.intruder)
    return Answers(tuple(values))
