"""Questions, prompts and parsing of detection, fuzzing and intruder, without Ray."""

import asyncio
import re

import numpy as np
import pytest

from rayinterp.config import DetectionConfig, FuzzingConfig, IntruderConfig, LLMConfig
from rayinterp.explain.client import LLMError, LLMReply
from rayinterp.prompts import MarkedRecord, detection_messages, fuzzing_messages, intruder_messages
from rayinterp.scorers.intruder import find_intruders, intruder_questions, parse_choice
from rayinterp.scorers.judged import judge, marked, parse_verdicts, questions, wrong_marks
from rayinterp.scorers.values import each_once, fires
from tests.scorers.records import FEATURE, drawn, record

LLM = LLMConfig(provider="scripted", model="m")
RECORDS = each_once(drawn())


@pytest.mark.parametrize(
    "answer",
    [
        "[1, 0, 1]",
        "[1,0,1]\n",
        "```json\n[1, 0, 1,]\n```",
        '{"answers": ["1", "0", "1"]}',
        "Texts [1] and [3] fit. So: [true, false, true].",
        "[1.0, 0.0, 1.0] is my answer, that is [1, 0, 1]",
        "1, 0, 1",
        "1 0\n1",
    ],
)
def test_verdicts_in_any_wrapping(answer):
    assert parse_verdicts(answer, 3) == [True, False, True]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The first and the third text fit.",
        "[1, 0]",
        "[1, 0, 1, 1]",
        "[1, 0, 2]",
        "[1, 0, null]",
        "[1, 0, 0.5]",
        "[[1, 0, 1]",  # the inner list is whole
        "[1, 0, 1] or perhaps [1, 1, 1]",
        "[" * 5000,
        "1, 0, 1 and so on",
        '["yes", "no", "yes"]',
    ],
)
def test_what_holds_no_verdicts(answer):
    assert parse_verdicts(answer, 3) == ([True, False, True] if answer.startswith("[[1") else None)


@pytest.mark.parametrize("answer", ["3", " **3**.", "Text 3", '{"intruder": 3}', "1, 2 and 4 are ships.\nAnswer: 3"])
def test_a_choice_in_any_wrapping(answer):
    assert parse_choice(answer, 5) == 3


@pytest.mark.parametrize("answer", ["", "the third", "6", "0", "-3", "3.5", "Text 3 or text 4", "3\nor\n1 2"])
def test_what_holds_no_choice(answer):
    assert parse_choice(answer, 5) is None


def test_every_record_is_in_one_question_and_kinds_are_mixed():
    asked = questions(RECORDS, 5, FEATURE, seed=0)
    assert sorted(place for question in asked for place in question.places) == list(range(36))
    assert {len(question.places) for question in asked} == {4, 5} and len(asked) == 8
    kinds = [{fires(RECORDS[place]) for place in question.places} for question in asked]
    assert sum(len(kind) == 2 for kind in kinds) >= 5
    assert asked == questions(RECORDS, 5, FEATURE, seed=0) != questions(RECORDS, 5, FEATURE, seed=1)


def test_wrong_marks_look_like_right_ones():
    shown = marked(RECORDS, FEATURE, seed=0)
    for seen in shown:  # in silent ones too, where `ship` stands in the others
        assert np.flatnonzero(seen.strengths).tolist() == [4]
    longer = np.array([False, False, True, True, False, True])
    assert wrong_marks((" a", " b", " c", " d"), [longer], np.random.default_rng(0)).tolist() == [0, 0, 1, 1]
    # A mask that shows nothing here is passed over; where all do, a token that can be seen is marked.
    assert wrong_marks((" a", "\n"), [np.array([False, True])], np.random.default_rng(0)).tolist() == [1, 0]


def test_prompts_show_what_the_scorer_is_about_and_no_more():
    records = [MarkedRecord((" a", " ship", "\n", " sails"), (0, 5, 0, 0))]
    detection = detection_messages("words about\nships", records)[-1]["content"]
    assert "Description: words about ships\nText 1: a ship sails" in detection and "<<" not in detection
    assert "1 number, each 0 or 1" in detection
    assert "Text 1: a <<ship>> sails" in fuzzing_messages("words about ships", records)[-1]["content"]
    intruder = intruder_messages(records * 5)
    assert "Description" not in str(intruder) and "Text 5: a <<ship>> sails" in intruder[-1]["content"]
    for messages in (detection_messages("d", records), fuzzing_messages("d", records), intruder):
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert parse_verdicts(detection_messages("d", records)[1]["content"], 3) == [True, False, True]


def texts_of(request):
    """The texts that the last turn about a feature shows."""
    question = next(m["content"] for m in reversed(request.messages) if "Text 1:" in m["content"])
    return re.findall(r"Text \d+: (.*)", question)


class Judge:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    async def __call__(self, request, feature_key):
        self.asked.append(request)
        return LLMReply(self.answer(request), "stop", 1, 1), None


def by_ship(request):
    """Knows what the feature is about, and where the marks stand."""
    texts = texts_of(request)
    return str([int("ship" in text if "<<" not in text else "<<ship>>" in text) for text in texts])


def verdicts(answer, scorer=None, records=RECORDS):
    scorer, call = scorer or DetectionConfig(llm="l"), Judge(answer)
    asked = questions(records, scorer.num_shown, FEATURE, 0)
    return asyncio.run(judge(call, LLM, scorer, "ships", asked, FEATURE, 0)), call


@pytest.mark.parametrize("scorer", [DetectionConfig(llm="l"), FuzzingConfig(llm="l")])
def test_verdicts_come_back_to_their_records(scorer):
    answers, call = verdicts(by_ship, scorer)
    assert answers.values == tuple(float(fires(record)) for record in RECORDS)
    assert len(call.asked) == len({request.hash for request in call.asked}) == 8
    assert {(request.temperature, request.max_tokens, request.list_cap) for request in call.asked} == {(0, 100, 0)}


def test_an_answer_that_does_not_parse_is_asked_for_again_and_then_left_out():
    def second_time(request):
        return by_ship(request) if len(request.messages) > 3 else "I would say that most of them fit."

    answers, call = verdicts(second_time)
    assert None not in answers.values and len(call.asked) == 16
    assert "most of them fit" in call.asked[-1].messages[-2]["content"]
    answers, call = verdicts(lambda request: "")
    assert set(answers.values) == {None} and len(call.asked) == 16
    answers, call = verdicts(lambda request: "", DetectionConfig(llm="l", max_parse_retries=0))
    assert len(call.asked) == 8
    wrong_length = verdicts(lambda request: by_ship(request) if len(texts_of(request)) == 5 else "[1]")[0]
    assert 0 < sum(value is None for value in wrong_length.values) < 36


def test_a_call_that_fails_is_a_status():
    class Failing(Judge):
        async def __call__(self, request, feature_key):
            if len(self.asked) == 2:
                raise LLMError("RateLimitError 429 from m", True)
            return await super().__call__(request, feature_key)

    call = Failing(by_ship)
    asked = questions(RECORDS, 5, FEATURE, 0)
    answers = asyncio.run(judge(call, LLM, DetectionConfig(llm="l"), "ships", asked, FEATURE, 0))
    assert answers == ((), "llm_error")

    class Broken(Judge):
        async def __call__(self, request, feature_key):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(judge(Broken(by_ship), LLM, DetectionConfig(llm="l"), "ships", asked, FEATURE, 0))


def test_intruder_questions_hold_one_silent_text_each():
    asked = intruder_questions(RECORDS, 5, FEATURE, seed=0)
    assert [question.place for question in asked] == list(range(12, 36))
    for question in asked:
        silent = ["ship" not in "".join(shown.tokens) for shown in question.records]
        assert silent == [number == question.intruder for number in range(1, 6)]
        assert len({shown.tokens for shown in question.records}) == 5
    assert {question.intruder for question in asked} == {1, 2, 3, 4, 5}
    assert intruder_questions(RECORDS[9:], 5, FEATURE, 0) == []  # three that activate
    more = intruder_questions([*RECORDS, record(999, "a lime", "rule_negative")], 5, FEATURE, 0)
    assert more[: len(asked)] == asked


@pytest.mark.parametrize(("right", "expected"), [(True, 1.0), (False, 0.0)])
def test_the_number_is_compared_with_the_intruders(right, expected):
    def choose(request):
        number = 1 + ["ship" in text for text in texts_of(request)].index(False)
        return str(number if right else number % 5 + 1)

    asked = intruder_questions(RECORDS, 5, FEATURE, 0)
    scorer = IntruderConfig(llm="l")
    answers = asyncio.run(find_intruders(Judge(choose), LLM, scorer, asked, len(RECORDS), FEATURE, 0))
    assert answers.values[:12] == (None,) * 12 and set(answers.values[12:]) == {expected}
