"""Clients and explainers against an endpoint that misbehaves."""

import asyncio
import json
import logging
import traceback
from collections import Counter

import openai
import pytest
from pydantic import SecretStr

from rayinterp.config import LLMConfig, OneShotConfig
from rayinterp.explain.client import Ledger, LLMError, LLMRequest, limited
from rayinterp.explain.endpoint import MAX_ANSWER_CHARACTERS, MAX_QUOTED_CHARACTERS, openai_client, read_body
from rayinterp.explain.explainer import ask
from rayinterp.explanation import Rule, parse_structured
from tests.explain.faulty_endpoint import FAULTS, WRONG_SHAPES, completion, faulty_endpoint

CANARY = "sk-canary-5d1f"
KEY = SecretStr(CANARY)
ANSWER = '{"rules": [{"activates_on": "trees", "strength": 5}]}'
REQUEST = LLMRequest("e", "m", ({"role": "user", "content": "hello"},), 0.7, 16, 1)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)


def config_of(url, **values):
    return LLMConfig(provider="openai", model="m", base_url=url, **{"timeout_seconds": 30, "max_retries": 2, **values})


async def outcomes_of(url, count, config, arm):
    rows = []

    async def write(row):
        rows.append(row)

    ledger = Ledger(limited(openai_client(config, KEY), 4), config, [], write)
    messages = [{"role": "user", "content": "?"}]
    asked = [ask(ledger, config, messages, arm, str(i), f"a/{i}") for i in range(count)]
    return await asyncio.gather(*asked), rows


@pytest.mark.parametrize("max_retries", [0, 4])
async def test_nothing_is_an_explanation_that_was_not_parsed(max_retries):
    arm = OneShotConfig(llm="l", simulator="s", max_parse_retries=1)
    seen = []
    with faulty_endpoint(1, 0.3, ANSWER, seen=seen) as url:
        outcomes, rows = await outcomes_of(url, 250, config_of(url, timeout_seconds=0.5, max_retries=max_retries), arm)
    assert set(FAULTS) <= {fault for fault, _ in seen}
    statuses = Counter(outcome.status for outcome in outcomes)
    assert set(statuses) <= {"ok", "parse_error", "cut_off", "llm_error"}
    for outcome in outcomes:
        assert (outcome.explanation is not None) == (outcome.status == "ok")
        assert outcome.thought is not None and len(outcome.thought) <= MAX_ANSWER_CHARACTERS
        if outcome.status == "ok":
            assert outcome.explanation == (Rule("trees", 5),) == parse_structured(outcome.thought, arm.rule_cap)
        elif outcome.status == "llm_error":
            assert outcome.thought.endswith("from m") or "answer" in outcome.thought
    assert all(row["response"] == ANSWER or not row["response"].startswith("{") for row in rows)
    # Faults that are not retried: a malformed answer of the endpoint ends the call, a bad text is asked for again.
    assert statuses["ok"] > (150 if max_retries == 0 else 190)
    assert statuses["llm_error"] > 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("rate_limit", "RateLimitError 429"),
        ("server_error", "InternalServerError 50"),
        ("hang", "APITimeoutError"),
        ("disconnect", "APIConnectionError"),
        ("malformed", "malformed answer"),
        ("truncated", "malformed answer"),
        ("wrong_shape", "answer"),
    ],
)
async def test_each_fault_is_named_and_transient(fault, says):
    retried = fault not in ("malformed", "truncated", "wrong_shape")
    seen = []
    with faulty_endpoint(1, 1.0, ANSWER, (fault,), seen=seen) as url, pytest.raises(LLMError, match=says) as error:
        await openai_client(config_of(url, timeout_seconds=0.5 if fault == "hang" else 30), KEY)(REQUEST, "a/1")
    assert error.value.transient
    assert len(seen) == (3 if retried else 1)


async def test_an_empty_or_huge_answer_is_a_reply_whose_text_is_kept_within_bounds():
    for fault in ("empty", "huge"):
        with faulty_endpoint(1, 1.0, ANSWER, (fault,)) as url:
            reply = await openai_client(config_of(url), KEY)(REQUEST, "a/1")
        assert len(reply.text) <= MAX_ANSWER_CHARACTERS
        assert reply.finish_reason == ("length" if fault == "huge" else "stop")


async def test_a_body_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("rayinterp.explain.endpoint.LONGEST_PAUSE_SECONDS", 0)
    with faulty_endpoint(1, 1.0, ANSWER, ("dribble",)) as url, pytest.raises(LLMError, match="no answer in") as error:
        await openai_client(config_of(url, timeout_seconds=0.3, max_retries=0), KEY)(REQUEST, "a/1")
    assert error.value.transient and error.value.__context__ is None


@pytest.mark.parametrize("body", [*map(json.dumps, WRONG_SHAPES), "", "[" * 100_000, '{"choices": [{"message":'])
def test_a_body_that_is_no_answer_is_quoted_in_short(body):
    with pytest.raises(LLMError) as error:
        read_body(body + " " * 1000, "m", KEY)
    assert len(str(error.value)) < MAX_QUOTED_CHARACTERS + 60
    assert error.value.__context__ is None


def test_a_broken_off_answer_is_a_failure_and_an_answer_without_a_reason_is_none_of_length():
    broken = completion("names of")
    broken["choices"][0]["finish_reason"] = "error"
    with pytest.raises(LLMError, match="broke off"):
        read_body(json.dumps(broken), "m", KEY)
    del broken["choices"][0]["finish_reason"], broken["usage"]
    assert read_body(json.dumps(broken), "m", KEY) == ("names of", "", 0, 0)


@pytest.mark.parametrize(
    ("answer_format", "type_sent"), [("text", None), ("json_object", "json_object"), ("json_schema", "json_schema")]
)
async def test_endpoints_are_told_the_form(answer_format, type_sent):
    seen = []
    with faulty_endpoint(1, 0.0, ANSWER, seen=seen) as url:
        config = config_of(url, answer_format=answer_format)
        arm = OneShotConfig(llm="l", simulator="s", rule_cap=3)
        for structured in (True, False):
            await outcomes_of(url, 1, config, arm.model_copy(update={"structured": structured}))
    (_, structured), (_, string) = seen
    assert "response_format" not in string
    assert structured.get("response_format", {}).get("type") == type_sent
    if answer_format == "json_schema":
        schema = structured["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["rules"]["maxItems"] == 3


async def test_calls_at_once_are_limited():
    under_way, most = 0, 0

    async def generate(request, feature_key):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1

    both = limited(generate, 3)
    await asyncio.gather(*(both(REQUEST, "a/1") for _ in range(20)))
    assert most == 3


async def test_calls_per_minute_are_limited_from_the_first_on():
    times = []

    async def generate(request, feature_key):
        times.append(asyncio.get_running_loop().time())

    slow = limited(generate, 10, requests_per_minute=60 / 0.05)
    await asyncio.gather(*(slow(REQUEST, "a/1") for _ in range(5)))
    assert len(times) == 5
    assert times[-1] - times[0] >= 4 * 0.05 - 0.02


@pytest.mark.parametrize("faults", [("rate_limit",), ("malformed",), ("wrong_shape",), ("disconnect",), ("hang",)])
async def test_a_key_is_nowhere_but_in_the_request(faults, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    arm = OneShotConfig(llm="l", simulator="s", max_parse_retries=0)
    with faulty_endpoint(2, 0.6, ANSWER, faults) as url:
        config = config_of(url, max_retries=1, timeout_seconds=0.2)
        generate = openai_client(config, KEY)
        outcomes, rows = await outcomes_of(url, 8, config, arm)
    with pytest.raises(LLMError) as error:  # nobody answers there any more
        await generate(REQUEST, "a/1")
    assert error.value.__context__ is None and error.value.__cause__ is None
    said = [
        *("".join(traceback.format_exception(error.value)), repr(generate), str(generate), repr(KEY)),
        *(repr(outcomes), json.dumps(rows), config.model_dump_json()),
        *(f"{record.getMessage()} {record.args!r} {record.exc_text}" for record in caplog.records),
    ]
    assert any(record.name.startswith("openai") for record in caplog.records)
    assert not [text for text in said if CANARY in text]


async def test_a_key_that_an_endpoint_sends_back_is_starred(caplog):
    caplog.set_level(logging.DEBUG)
    for body in (f"no such key: {CANARY}", json.dumps({"error": {"message": CANARY}, "choices": []})):
        with pytest.raises(LLMError) as error:
            read_body(body, "m", KEY)
        assert CANARY not in str(error.value) and "***" in str(error.value)
