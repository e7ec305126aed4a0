import json
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rayinterp import embedded
from rayinterp.config import LLMConfig
from rayinterp.explain.client import LLMError, LLMReply, LLMRequest
from rayinterp.explain.local import LocalLLM, characters_per_rule
from rayinterp.explain.served import served_client
from rayinterp.scorers.intruder import parse_choice
from rayinterp.scorers.judged import verdicts_form

MESSAGES = ({"role": "user", "content": "Name two kinds of trees as JSON with activates_on and strength."},)


@pytest.fixture(scope="module")
def llm():
    return LocalLLM(LLMConfig(provider="local", model=embedded.MODEL))


def test_an_answer_depends_on_its_seed_alone(llm):
    request = LLMRequest("local", "m", MESSAGES, 1.0, 12, 1)
    first = llm.generate(request)
    llm.generate(request._replace(seed=2))
    assert llm.generate(request) == first
    assert llm.generate(request._replace(seed=2)).text != first.text
    assert first.finish_reason == "length" and first.completion_tokens == 12


@pytest.mark.parametrize(("temperature", "seed", "rule_cap"), [(1.5, 1, 2), (1.5, 2, 3)])
def test_a_structured_answer_keeps_to_its_form(llm, temperature, seed, rule_cap):
    reply = llm.generate(LLMRequest("local", "m", MESSAGES, temperature, 100, seed, rule_cap))
    assert reply.finish_reason == "stop"
    rules = json.loads(reply.text)
    assert 1 <= len(rules) <= rule_cap
    assert [list(rule) for rule in rules] == [["activates_on", "strength"]] * len(rules)
    assert all(len(rule["activates_on"]) <= characters_per_rule(100, rule_cap) for rule in rules)
    assert llm.generate(LLMRequest("local", "m", MESSAGES, temperature, 100, seed, rule_cap)) == reply


def test_rules_are_as_long_as_the_answer_has_room_for():
    assert characters_per_rule(512, 5) == 200
    assert characters_per_rule(80, 3) == 33
    assert characters_per_rule(10, 10) == 30


def test_a_structured_answer_may_be_cut_off(llm):
    reply = llm.generate(LLMRequest("local", "m", MESSAGES, 1.5, 8, 1, 3))
    assert reply.finish_reason == "length" and reply.text.startswith('[{"activates_on": "')


def test_a_judges_answer_keeps_to_its_form(llm):
    request = LLMRequest("local", "m", MESSAGES, 0.0, 60, 1)
    verdicts = llm.generate(request._replace(answer_schema=json.dumps(verdicts_form(4).schema)))
    assert verdicts.finish_reason == "stop" and verdicts_form(4).parse(verdicts.text) is not None
    choice = llm.generate(request._replace(answer_schema=json.dumps({"enum": [1, 2, 3]})))
    assert choice.finish_reason == "stop" and parse_choice(choice.text, 3) is not None


async def test_what_fails_in_a_replica_is_a_failed_call_and_no_end_of_the_stage(monkeypatch):
    monkeypatch.setattr("rayinterp.explain.served.FIRST_PAUSE", 0.001)
    reply, said = LLMReply("text", "stop", 1, 1), []

    async def answer(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    outcomes = [
        RayTaskError("generate", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory", RuntimeError()),
        ActorDiedError(),
        reply,
    ]
    replica = SimpleNamespace(remote=lambda request: said.append(request) or answer(outcomes.pop(0)))
    monkeypatch.setattr("ray.serve.get_app_handle", lambda app: SimpleNamespace(generate=replica))
    request = LLMRequest("local", "m", MESSAGES, 1.0, 12, 1)
    generate = served_client("llm-x", 5)
    with pytest.raises(LLMError, match=r"llm-x failed on a request .*CUDA out of memory") as error:
        await generate(request, "a/1")
    assert error.value.transient
    assert await generate(request, "a/1") == reply and len(said) == 3
