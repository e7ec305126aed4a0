import pytest

from rayinterp import embedded
from rayinterp.config import LLMConfig
from rayinterp.explain.client import LLMRequest
from rayinterp.explain.local import LocalLLM, close_list
from rayinterp.explanation import parse_structured
from rayinterp.prompts import STRUCTURED_PREFILL

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


def test_a_framed_answer_ends_after_the_wanted_objects(llm):
    reply = llm.generate(LLMRequest("local", "m", MESSAGES, 0.0, 60, 1, STRUCTURED_PREFILL, 1))
    assert reply.text.startswith(STRUCTURED_PREFILL)
    if reply.finish_reason == "stop" and reply.text.endswith("}]"):
        assert reply.text.count("}") == 1
        assert reply.completion_tokens < 60


def test_closing_a_list():
    text = '[{"activates_on": "a", "strength": 1}, {"activates_on": "b", "strength": 2}, {"activates_on'
    assert len(parse_structured(close_list(text, 2), 5)) == 2
    assert len(parse_structured(close_list(text, 1), 5)) == 1
