"""Endpoints that speak the OpenAI protocol.

They are spoken to through the openai package, which also retries connection errors, timeouts, rate limits and 5xx
answers, and nothing else: twice the pause each time, or what `Retry-After` says. What the body holds is read here: an
endpoint may send anything, and all that comes of it is an `LLMReply` or an `LLMError`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from pydantic import BaseModel, Field, SecretStr, ValidationError

from rayinterp.config import LLMConfig
from rayinterp.explain.client import Generate, LLMError, LLMReply, LLMRequest
from rayinterp.explanation import rules_schema

MAX_ANSWER_CHARACTERS = 20_000
"""What is kept of an answer. The longest explanation has about 6,000; an endpoint gone wrong sends megabytes."""
MAX_QUOTED_CHARACTERS = 200
"""What an error quotes of a body that is no answer."""
CHARACTERS_A_TOKEN = 3
"""Where an endpoint does not count: few enough for a bill that is too high sooner than too low."""
LONGEST_PAUSE_SECONDS = 120
"""The longest Retry-After that the openai package waits for."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _Answer(BaseModel):
    """What is read of an endpoint's answer."""

    choices: list[_Choice]
    usage: _Usage | None = None


def openai_client(config: LLMConfig, key: SecretStr) -> Generate:
    """A client for any endpoint that speaks the OpenAI protocol."""
    client = openai.AsyncOpenAI(
        api_key=key.get_secret_value(),
        base_url=config.base_url,
        timeout=config.timeout_seconds,
        max_retries=config.max_retries,
    )
    # The package's timeout is between bytes: an endpoint that sends a blank now and then would never meet it.
    deadline = (config.max_retries + 1) * (config.timeout_seconds + LONGEST_PAUSE_SECONDS)

    async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
        try:
            async with asyncio.timeout(deadline):
                answer = await client.chat.completions.with_raw_response.create(
                    model=request.model,
                    messages=list(request.messages),  # type: ignore[arg-type]
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                    **_form(request),
                )
        except TimeoutError:
            failure = LLMError(f"no answer in {deadline:g} s from {request.model}", True)
        except openai.OpenAIError as error:
            # The error's own text may quote headers or the URL, so it is neither shown nor kept as a context.
            failure = _failure(error, request.model)
        else:
            reply = read_body(answer.text, request.model, key)
            return reply if reply.prompt_tokens else estimated(reply, request)
        raise failure

    return generate


def _form(request: LLMRequest) -> Any:
    """The form of the answer, as endpoints are told it."""
    if not request.list_cap or request.answer_format == "text":
        return {}
    form: dict[str, Any] = {"type": request.answer_format}
    if request.answer_format == "json_schema":
        form["json_schema"] = {"name": "rules", "strict": True, "schema": rules_schema(request.list_cap)}
    return {"response_format": form}


def _failure(error: openai.OpenAIError, model: str) -> LLMError:
    """What the package gave up on, by name and status."""
    status = getattr(error, "status_code", None)
    transient = isinstance(error, openai.APIConnectionError) or (status or 0) >= 500 or status in (408, 409, 429)
    if getattr(error, "code", None) == "insufficient_quota":  # said as a rate limit, but the account is empty
        transient = False
    return LLMError(f"{type(error).__name__}{f' {status}' if status else ''} from {model}", transient)


def read_body(body: str, model: str, key: SecretStr) -> LLMReply:
    """The reply in an endpoint's success.

    Raises:
        LLMError: the body is no answer, as proxies and overloaded servers send them; its beginning is quoted.
    """
    quoted = body.replace(key.get_secret_value(), str(key))[:MAX_QUOTED_CHARACTERS]
    try:
        answer = _Answer.model_validate_json(body)
    except ValidationError:
        answer = None
    if answer is None:
        raise LLMError(f"a malformed answer from {model}: {quoted!r}", True)
    if not answer.choices:  # some endpoints send an error as a success without any
        raise LLMError(f"an answer without choices from {model}: {quoted!r}", True)
    choice, usage = answer.choices[0], answer.usage or _Usage()
    text, finish_reason = choice.message.content or "", choice.finish_reason or ""
    if finish_reason == "error":
        raise LLMError(f"an answer that broke off from {model}: {quoted!r}", True)
    if len(text) > MAX_ANSWER_CHARACTERS:
        text, finish_reason = text[:MAX_ANSWER_CHARACTERS], "length"
    return LLMReply(text, finish_reason, usage.prompt_tokens, usage.completion_tokens)


def estimated(reply: LLMReply, request: LLMRequest) -> LLMReply:
    """With token counts, for endpoints that give none: unpriced calls would pass every budget."""
    asked = sum(len(message["content"]) for message in request.messages)
    prompt_tokens, completion_tokens = (-(-count // CHARACTERS_A_TOKEN) for count in (asked, len(reply.text)))
    return reply._replace(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
