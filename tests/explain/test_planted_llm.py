"""The planted language's LLM reads the prompts that explainers write, and knows no more than they say."""

import json

import numpy as np
import pytest

from rayinterp.config import LLMConfig, OneShotConfig
from rayinterp.explain.client import LLMRequest, endpoint_of
from rayinterp.explain.explainer import ask, continue_messages, feedback, first_messages
from rayinterp.explain.planted_llm import Firing, Guesser, blind_answer, planted_client, read_firings
from rayinterp.explanation import Rule, to_json
from rayinterp.planted_language import COVERS, FEATURES, OR, VOCABULARY, activations, encode, parts
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence

LLM = LLMConfig(provider="planted", model="blind")
ARM = OneShotConfig(llm="blind", simulator="oracle")


def record(number, text, feature=("layer_2", 0)):
    tokens = tuple(f" {word}" for word in text.split())
    truth = FEATURES[feature[0]][feature[1]]
    values = 5 * activations(truth, encode([tokens]))[0] / 5
    source = "positive" if values.any() else "random_negative"
    return ActivationRecord(TokenSequence(number, tokens), number, source, tuple(range(len(tokens))), values)


@pytest.fixture
def context_feature():
    """A word on which a feature fires after another, and that other word."""
    (rule,) = FEATURES["layer_2"][0]
    target, context = parts(rule.activates_on)
    return tuple(VOCABULARY[int(np.argmax(COVERS[term]))] for term in (target, context))


def records_of(target, context):
    return [
        *(record(i, f"the {context} of {target} a the") for i in range(4)),
        *(record(10 + i, f"the {target} of {context} a the") for i in range(4)),
    ]


def test_a_prompt_is_read_as_it_was_written(context_feature):
    target, context = context_feature
    records = records_of(target, context)
    (message,) = first_messages(records, ARM.model_copy(update={"few_shots": False}))
    firings = read_firings(message["content"])
    assert [(f.word, f.before) for f in firings] == [(target, ("the", context, "of"))] * 4
    assert all(f.activation >= 3 and f.needed == () for f in firings)
    holistic = {r.sequence.sequence_id: np.array([0, 1.0, 0, 1.0, 0, 0]) for r in records}
    arm = ARM.model_copy(update={"few_shots": True, "holistic": True})
    shown = first_messages(records, arm, holistic)[-1]["content"]
    assert [f.needed for f in read_firings(shown)] == [(context,)] * 4


async def test_it_answers_in_the_form_that_is_asked_and_the_same_again(context_feature):
    target, context = context_feature
    records = records_of(target, context)
    for structured in (True, False):
        arm = ARM.model_copy(update={"structured": structured, "rule_cap": 2})
        messages = first_messages(records, arm)
        outcomes = []
        for _ in range(2):

            async def call(request, key):
                return await planted_client("blind")(request, key), None

            outcomes.append(await ask(call, LLM, messages, arm, "root", "layer_2/0"))
        assert outcomes[0] == outcomes[1] and outcomes[0].status == "ok"
        assert len(outcomes[0].explanation) <= (2 if structured else 1)


@pytest.mark.parametrize("model", ["truth", "broad"])
async def test_who_knows_the_truth_says_it_in_either_form(model):
    for index, truth in enumerate(FEATURES["layer_3"]):
        for asked, expected in (("Answer with a JSON list", to_json(truth)), ("one sentence", None)):
            request = LLMRequest(endpoint_of(LLM), model, ({"role": "user", "content": asked},), 1.0, 100, 0)
            said = (await planted_client(model)(request, f"layer_3/{index}")).text
            if model == "truth":
                assert said == (expected or OR.join(rule.activates_on for rule in truth))
            else:
                assert said != expected and "soon after" not in said


def test_a_revision_heeds_what_was_wrong(context_feature):
    target, context = context_feature
    records = records_of(target, context)
    messages = first_messages(records, ARM)
    explanation = (Rule(f"the word '{target}'"),)
    predicted = [np.array([5.0 if token.strip() == target else 0.0 for token in r.sequence.tokens]) for r in records]
    said = feedback(0.5, records, predicted, 1)
    conversation = [m["content"] for m in continue_messages(messages, to_json(explanation), said, ARM)]
    answers = [blind_answer(conversation, np.random.default_rng(seed)) for seed in range(200)]
    found = [a for a in answers if any("soon after" in r.activates_on and f"'{target}'" in r.activates_on for r in a)]
    assert 10 < len(found) < 190
    sentence = [m["content"] for m in continue_messages(messages, f"the word '{target}'", said, ARM)]
    assert blind_answer(sentence, np.random.default_rng(0))


def test_silent_texts_and_needed_tokens_move_the_guesses():
    firings = [Firing("toolora", ("lampora",), 5.0), Firing("toololin", ("lampora",), 5.0)]
    needed = [f._replace(needed=("lampora",)) for f in firings]

    def share(guesser, part):
        guesses = [guesser.root(np.random.default_rng(seed)) for seed in range(300)]
        return np.mean([part in rule.activates_on for guess in guesses for rule in guess])

    plain = Guesser(firings)
    assert share(Guesser(needed), "soon after") > 2 * share(plain, "soon after")
    assert share(Guesser(firings, silent=["toolnra"] * 8), "for tools") < 0.5 * share(plain, "for tools")


def test_equal_rules_are_one_rule_and_the_cap_holds():
    guesser = Guesser([Firing("toolora", (), 5.0)], rule_cap=1)
    for seed in range(50):
        guess = guesser.root(np.random.default_rng(seed))
        assert len(guess) == 1
        assert json.loads(to_json(guess))[0]["strength"] == 5
