import numpy as np
import pytest

from rayinterp.config import LLMConfig, OneShotConfig
from rayinterp.explain.client import LLMError, LLMReply
from rayinterp.explain.explainer import ask, continue_messages, feedback, first_messages
from rayinterp.explanation import Rule
from rayinterp.prompts import STRUCTURED_PREFILL
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence

ARM = OneShotConfig(llm="l", simulator="s", num_records_shown=2, max_parse_retries=2)
LLM = LLMConfig(provider="openai", model="m")
GOOD = '[{"activates_on": "trees", "strength": 5}]'


def record(text, activations, source="positive"):
    tokens = tuple(" " + word for word in text.split())
    return ActivationRecord(TokenSequence(0, tokens), 0, source, tuple(range(len(tokens))), np.array(activations))


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
    assert (requests[0].prefill, requests[0].list_cap) == ("", 0)


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


async def test_a_failed_call_is_a_status():
    outcome, _ = await asked(LLMError("APITimeoutError from m"))
    assert (outcome.explanation, outcome.status, outcome.thought) == (None, "llm_error", "APITimeoutError from m")


async def test_our_own_models_are_given_the_beginning_of_the_answer():
    _, requests = await asked(GOOD, llm=LLMConfig(provider="local", model="m"))
    assert (requests[0].prefill, requests[0].list_cap) == (STRUCTURED_PREFILL, ARM.rule_cap)


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


def test_the_two_forms_of_answer_differ_in_the_form_alone():
    records = [record("the old oak fell", [0, 0, 5, 0])]
    structured, string = (first_messages(records, ARM.model_copy(update={"structured": s})) for s in (True, False))
    assert structured[-1] == string[-1]
    assert structured[0]["content"].splitlines()[0] == string[0]["content"].splitlines()[0]
    assert "JSON" in structured[0]["content"] and "JSON" not in string[0]["content"]


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
