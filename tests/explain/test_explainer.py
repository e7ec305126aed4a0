import json

import numpy as np
import pytest

from rayinterp.config import LLMConfig, OneShotConfig
from rayinterp.explain.client import LLMError, LLMReply
from rayinterp.explain.explainer import ask, continue_messages, feedback, first_messages
from rayinterp.explanation import Rule, parse_structured
from rayinterp.prompts import answer_form
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence

ARM = OneShotConfig(llm="l", simulator="s", num_records_shown=2, max_parse_retries=2)
LLM = LLMConfig(provider="openai", model="m")
GOOD = '[{"activates_on": "trees", "strength": 5}]'


def record(text, activations, source="positive", sequence_id=0):
    tokens = tuple(" " + word for word in text.split())
    return ActivationRecord(
        TokenSequence(sequence_id, tokens), 0, source, tuple(range(len(tokens))), np.array(activations)
    )


def scripted(*answers):
    """A call that gives the answers in turn, and keeps the requests."""
    left, requests = list(answers), []

    async def call(request, feature_key):
        requests.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, LLMReply) else LLMReply(answer, "stop", 10, 5), 0.5

    return call, requests


async def asked(*answers, arm=ARM, llm=LLM):
    call, requests = scripted(*answers)
    return await ask(call, llm, [{"role": "user", "content": "?"}], arm, "seed", "a/1"), requests


async def test_a_parsed_answer_is_an_explanation():
    outcome, requests = await asked(GOOD)
    assert outcome == ((Rule("trees", 5),), "ok", GOOD, 10, 5, 0.5)
    assert (requests[0].list_cap, requests[0].answer_format) == (0, "text")


async def test_a_bad_answer_is_asked_again_with_another_seed_and_all_calls_are_billed():
    outcome, requests = await asked("I would say trees.", GOOD)
    assert outcome.status == "ok"
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.cost_usd) == (20, 10, 1.0)
    assert requests[0].seed != requests[1].seed


async def test_retries_are_bounded_and_the_raw_answer_is_kept_as_no_explanation():
    outcome, requests = await asked(*["I would say trees."] * 3)
    assert (outcome.explanation, outcome.status, outcome.thought) == (None, "parse_error", "I would say trees.")
    assert len(requests) == 3


async def test_an_answer_cut_off_says_so():
    cut = LLMReply('[{"activates_on": "tre', "length", 10, 5)
    outcome, _ = await asked(cut, cut, cut)
    assert outcome.status == "cut_off"
    text_arm = ARM.model_copy(update={"structured": False})
    outcome, _ = await asked(*[LLMReply("names of", "length", 1, 1)] * 3, arm=text_arm)
    assert (outcome.explanation, outcome.status) == (None, "cut_off")


async def test_a_draft_within_a_thought_that_is_cut_off_is_no_explanation():
    arm = ARM.model_copy(update={"max_parse_retries": 0})
    outcome, _ = await asked(LLMReply(f"<think>\nPerhaps {GOOD}, or", "length", 10, 5), arm=arm)
    assert (outcome.explanation, outcome.status) == (None, "cut_off")


async def test_a_failed_call_is_a_status():
    outcome, _ = await asked(LLMError("APITimeoutError from m"))
    assert (outcome.explanation, outcome.status, outcome.thought) == (None, "llm_error", "APITimeoutError from m")


@pytest.mark.parametrize(
    ("llm", "structured", "list_cap", "answer_format"),
    [
        (LLMConfig(provider="local", model="m"), True, ARM.rule_cap, "text"),
        (LLMConfig(provider="local", model="m"), False, 0, "text"),
        (LLM.model_copy(update={"answer_format": "json_schema"}), True, ARM.rule_cap, "json_schema"),
        (LLM.model_copy(update={"answer_format": "json_schema"}), False, 0, "text"),
    ],
)
async def test_the_form_is_enforced_where_it_can_be(llm, structured, list_cap, answer_format):
    _, requests = await asked(*[GOOD] * 3, llm=llm, arm=ARM.model_copy(update={"structured": structured}))
    assert (requests[0].list_cap, requests[0].answer_format) == (list_cap, answer_format)


async def test_a_text_that_a_filter_ended_is_no_sentence():
    text_arm = ARM.model_copy(update={"structured": False, "max_parse_retries": 0})
    outcome, _ = await asked(LLMReply("names of", "content_filter", 1, 1), arm=text_arm)
    assert (outcome.explanation, outcome.status) == (None, "cut_off")


def test_the_prompt_shows_train_positives_only_with_their_strengths():
    records = [
        record("the old oak fell", [0, 0, 5.2, 0.1]),
        record("a birch grew", [0, 4.4, 0]),
        record("one too many", [3, 0, 0]),
        record("nothing fires here", [0, 0, 0], "similar_negative"),
    ]
    shown = first_messages(records, ARM)[-1]["content"]
    assert "the old <<oak>> <<fell>>" in shown
    assert '"oak" 5, "fell" 1' in shown
    assert "birch" in shown
    assert "one too many" not in shown and "nothing fires" not in shown


RECORDS = [
    record("the old oak fell", [0, 0, 5, 0], sequence_id=1),
    record("a birch grew", [0, 4.4, 0], sequence_id=2),
    record("my oak table", [0, 0.1, 0], "similar", sequence_id=3),
    record("the branch was closed", [0, 0, 0, 0], "similar", sequence_id=4),
    record("a row of lamps", [0, 0, 0, 0], "random_negative", sequence_id=5),
    record("one too many", [0, 0, 0], "similar", sequence_id=6),
]
HOLISTIC = {1: np.array([0.01, 0.6, 2.0, -1.0]), 2: np.array([-0.1, 0.0, -0.1])}


@pytest.mark.parametrize("few_shots", [True, False])
@pytest.mark.parametrize("num_negatives_shown", [0, 2])
@pytest.mark.parametrize("holistic", [True, False])
@pytest.mark.parametrize("answer_format", ["text", "json_object", "json_schema"])
def test_the_forms_of_answer_differ_in_the_form_alone(few_shots, num_negatives_shown, holistic, answer_format):
    arm = ARM.model_copy(
        update={"few_shots": few_shots, "num_negatives_shown": num_negatives_shown, "holistic": holistic}
    )
    written = []
    for structured, as_object in ((True, answer_format != "text"), (False, False)):
        of_form = arm.model_copy(update={"structured": structured})
        messages = first_messages(RECORDS, of_form, HOLISTIC, answer_format)
        messages = continue_messages(messages, "", "worse", of_form, answer_format)
        form = answer_form(arm.rule_cap, structured, as_object)
        assert ("JSON" in form.asked + form.asked_again) == structured
        text = "\n".join(m["content"] for m in messages if m["content"] not in (form.example, "", '{"rules": }'))
        written.append(text.replace(form.asked, "FORM").replace(form.asked_again, "FORM"))
        assert any(m["content"] == form.example for m in messages) == few_shots
    assert written[0] == written[1] and written[0].count("FORM") == 2


def test_an_object_is_described_shown_and_continued_as_one():
    messages = first_messages(RECORDS, ARM, answer_format="json_schema")
    messages = continue_messages(messages, GOOD, "worse", ARM, "json_schema")
    assert 'JSON object {"rules": [...]}' in messages[0]["content"]
    for answer in (messages[1], messages[3]):
        assert parse_structured(answer["content"], 5) and json.loads(answer["content"])["rules"]
    assert "JSON object" in messages[-1]["content"]


def test_silent_texts_are_shown_source_by_source_and_never_a_text_that_fires():
    (only,) = first_messages(RECORDS, ARM.model_copy(update={"few_shots": False, "num_negatives_shown": 2}))
    shown = only["content"].splitlines()[-2:]
    assert shown == ["Silent text 1: the branch was closed", "Silent text 2: a row of lamps"]
    assert "oak table" not in only["content"]
    assert "silent" not in first_messages(RECORDS[:3], ARM.model_copy(update={"num_negatives_shown": 2}))[-1]["content"]


def test_tokens_that_the_feature_needs_are_shown_by_their_effect():
    arm = ARM.model_copy(update={"few_shots": False, "holistic": True})
    lines = first_messages(RECORDS, arm, HOLISTIC)[-1]["content"].splitlines()
    assert [line for line in lines if line.startswith("Fires less")] == ['Fires less without: "oak", "old"']
    for unasked in (first_messages(RECORDS, arm), first_messages(RECORDS, ARM, HOLISTIC)):
        assert "less" not in "".join(m["content"] for m in unasked)


@pytest.mark.parametrize("num_negatives_shown", [0, 1])
@pytest.mark.parametrize("holistic", [True, False])
def test_the_worked_example_has_the_parts_that_the_question_has(num_negatives_shown, holistic):
    arm = ARM.model_copy(update={"num_negatives_shown": num_negatives_shown, "holistic": holistic})
    worked, _, asked_for = (m["content"] for m in first_messages(RECORDS, arm, HOLISTIC))
    for part, shown in (("\nSilent text 1", num_negatives_shown > 0), ("\nFires less without", holistic)):
        assert (part in worked) == (part in asked_for) == shown


def test_the_worked_example_can_be_left_out():
    records = [record("the old oak fell", [0, 0, 5, 0])]
    (only,) = first_messages(records, ARM.model_copy(update={"few_shots": False}))
    assert "birch" not in only["content"] and "oak" in only["content"]


def test_feedback_shows_the_record_whose_removal_helps_most():
    records = [
        record("oak tree falls", [5, 0, 0]),
        record("my wooden table", [0, 0, 0]),
        record("an elm stands", [0, 5, 0]),
    ]
    predicted = [np.array([5.0, 0, 0]), np.array([0, 5.0, 0]), np.array([0, 5.0, 0])]
    said = feedback(0.6, records, predicted, 1)
    assert "0.60" in said
    assert '"wooden": predicted 5, actual 0' in said
    assert "oak" not in said and "elm" not in said
    assert "could not be computed" in feedback(None, records, predicted, 1)


def test_feedback_lists_what_is_off_and_looks_it():
    def said(activation, prediction):
        lines = feedback(0.6, [record("an oak fell", [0, activation, 5])], [np.array([0, prediction, 5.0])], 1)
        return [line for line in lines.splitlines() if line.startswith('"')]

    assert said(0.3, 0.3) == []  # a weak activation is shown as 1
    assert said(0.3, 0.0) == [] and said(1.6, 2.4) == [] and said(7.0, 5.0) == []
    assert said(0.3, 1.9) == ['"oak": predicted 2, actual 1']
    assert said(5.0, 0.1) == ['"oak": predicted 1, actual 5']
    assert said(5.0, np.nan) == []


def test_feedback_shows_the_largest_errors_as_they_are_and_not_as_they_look():
    tokens = " ".join(f"w{i}" for i in range(13))
    lines = feedback(0.6, [record(tokens, [*[1.4] * 12, 1.6])], [np.array([*[2.6] * 12, 3.4])], 1)
    assert '"w12": predicted 3, actual 2' in lines
    assert '"w10": predicted 3, actual 1' in lines and '"w11"' not in lines


def test_a_conversation_continues_with_answer_and_feedback():
    messages = continue_messages([{"role": "user", "content": "?"}], GOOD, "worse", ARM)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == GOOD
    assert "worse" in messages[2]["content"]


@pytest.mark.parametrize("token", ["\n", "\t", '"'])
def test_awkward_tokens_stay_on_one_line(token):
    records = [ActivationRecord(TokenSequence(0, ("a", token, "b")), 0, "positive", (1, 2, 3), np.array([0, 3.0, 0]))]
    line = next(x for x in first_messages(records, ARM)[-1]["content"].splitlines() if x.startswith("Fires on"))
    assert line.endswith(" 3")
