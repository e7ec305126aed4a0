import asyncio
import http.server
import json
import threading

import pytest
from pydantic import SecretStr

from rayinterp.config import LLMConfig
from rayinterp.errors import UserError
from rayinterp.explain.client import Ledger, LLMError, LLMReply, LLMRequest, api_key, endpoint_of, plain_question, price
from rayinterp.explain.endpoint import estimated, openai_client

REQUEST = LLMRequest("e", "m", ({"role": "user", "content": "hello"},), 0.7, 16, 1)
SECRET = "sk-very-secret"


class Endpoint(http.server.BaseHTTPRequestHandler):
    """An endpoint that answers with the statuses it is told to, then with success."""

    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        body = {"error": {"message": f"no, {SECRET}", "code": getattr(self.server, "code", None)}}
        if status == 200:
            message = {"role": "assistant", "content": "hi"}
            usage = getattr(self.server, "usage", {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4})
            choices = [{"index": 0, "message": message, "finish_reason": "length"}]
            choices = getattr(self.server, "choices", choices)
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": choices,
                "usage": usage,
            }
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.statuses, server.bodies = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.config = LLMConfig(
        provider="openai", model="m", base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key_env="TEST_KEY"
    )
    yield server
    server.shutdown()
    server.server_close()


async def test_an_endpoint_is_asked_and_answers(endpoint):
    reply = await openai_client(endpoint.config, SecretStr(SECRET))(REQUEST, "a/1")
    assert reply == LLMReply("hi", "length", 3, 1)
    (body,) = endpoint.bodies
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("m", 0.7, 16, 1)


async def test_a_plain_question_is_as_the_explainer_asks_but_short(endpoint):
    request = plain_question(endpoint.config, temperature=1.2)
    await openai_client(endpoint.config, SecretStr(SECRET))(request, "a/1")
    (body,) = endpoint.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 1.2, 16)
    assert len(str(body["messages"])) < 100 and request.endpoint == endpoint_of(endpoint.config)


async def test_transient_faults_are_retried(endpoint):
    endpoint.statuses += [429, 503]
    assert (await openai_client(endpoint.config, SecretStr(SECRET))(REQUEST, "a/1")).text == "hi"
    assert len(endpoint.bodies) == 3


async def test_other_faults_are_not_retried_and_show_no_secret(endpoint):
    endpoint.statuses += [401]
    with pytest.raises(LLMError) as error:
        await openai_client(endpoint.config, SecretStr(SECRET))(REQUEST, "a/1")
    assert len(endpoint.bodies) == 1
    assert "AuthenticationError 401" in str(error.value) and not error.value.transient
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None


def test_an_endpoint_that_does_not_count_is_billed_by_estimate():
    reply = estimated(
        LLMReply("x" * 30, "stop", 0, 0), REQUEST._replace(messages=({"role": "user", "content": "y" * 7},))
    )
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 10)


async def test_a_body_without_usage_is_counted(endpoint):
    endpoint.usage = None
    reply = await openai_client(endpoint.config, SecretStr(SECRET))(REQUEST, "a/1")
    assert reply.prompt_tokens > 0 and reply.completion_tokens > 0


async def test_a_success_without_an_answer_is_a_failure(endpoint):
    endpoint.choices = []
    with pytest.raises(LLMError, match="without choices"):
        await openai_client(endpoint.config, SecretStr(SECRET))(REQUEST, "a/1")


async def test_retries_end(endpoint):
    endpoint.statuses += [500] * 10
    with pytest.raises(LLMError, match="500"):
        await openai_client(endpoint.config.model_copy(update={"max_retries": 2}), SecretStr(SECRET))(REQUEST, "a/1")
    assert len(endpoint.bodies) == 3


def test_a_missing_key_is_named_before_anything_starts(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        api_key(LLMConfig(provider="openai", model="m", api_key_env="NO_SUCH_KEY"))


@pytest.mark.parametrize("key", ["two words", "Schl\u00fcssel", "a\nb"])
def test_a_key_that_no_header_may_hold_is_refused_without_being_shown(key, monkeypatch):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(UserError, match="TEST_KEY") as error:
        api_key(LLMConfig(provider="openai", model="m", api_key_env="TEST_KEY"))
    assert key not in str(error.value)


async def test_an_account_without_money_is_no_passing_fault(endpoint):
    endpoint.statuses += [429]
    endpoint.code = "insufficient_quota"
    with pytest.raises(LLMError) as error:
        await openai_client(endpoint.config.model_copy(update={"max_retries": 0}), SecretStr(SECRET))(REQUEST, "a/1")
    assert not error.value.transient


@pytest.mark.parametrize("field", LLMRequest._fields)
def test_every_part_of_a_request_is_in_its_hash(field):
    changed = {"messages": ({"role": "user", "content": "bye"},)}.get(field, "x")
    assert REQUEST._replace(**{field: changed}).hash != REQUEST.hash


def test_a_key_does_not_print(monkeypatch):
    monkeypatch.setenv("TEST_KEY", SECRET)
    key = api_key(LLMConfig(provider="openai", model="m", api_key_env="TEST_KEY"))
    assert key.get_secret_value() == SECRET
    assert SECRET not in repr(key) + str(key)


async def test_the_ledger_pays_once_and_remembers_across_runs():
    calls, rows = [], []

    async def generate(request, feature_key):
        calls.append(request)
        return LLMReply("answer", "stop", 1000, 100)

    async def write(row):
        rows.append(row)

    config = LLMConfig(
        provider="openai", model="m", usd_per_million_prompt_tokens=2.0, usd_per_million_completion_tokens=10.0
    )
    ledger = Ledger(generate, config, [], write)
    assert await ledger(REQUEST, "a/1") == (LLMReply("answer", "stop", 1000, 100), pytest.approx(0.003))
    await ledger(REQUEST, "a/1")
    again = Ledger(generate, config, rows, write)
    assert (await again(REQUEST, "a/1"))[0].text == "answer"
    await asyncio.gather(again(REQUEST._replace(seed=2), "a/1"))
    assert len(calls) == len(rows) == 2


def test_no_price_is_no_cost_not_zero():
    assert price(LLMConfig(provider="local", model="m"), LLMReply("", "stop", 1, 1)) is None


def test_endpoints_with_the_same_model_name_are_told_apart():
    one, two = (LLMConfig(provider="scripted", model="m", answers={"a/1": answer}) for answer in "xy")
    assert endpoint_of(one) != endpoint_of(two)
    assert endpoint_of(LLMConfig(provider="openai", model="m", base_url="https://host/v1")) == "https://host/v1"


def test_the_hash_of_a_request_without_a_format_is_that_of_before_there_were_formats():
    assert REQUEST.hash == "8d41d9ab72e3d44cf7ac4d7daa03a6a3"
