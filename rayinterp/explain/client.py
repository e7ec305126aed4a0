"""One LLM call: what is asked, what comes back, and the clients that make it.

Endpoints are spoken to through the openai package, which also retries connection errors, rate limits and 5xx answers,
and nothing else. Answers pass through `Ledger`, the disk cache and the bill in one: the same request is paid for once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

import openai
from pydantic import SecretStr

from rayinterp.config import LLMConfig
from rayinterp.errors import UserError
from rayinterp.prompts import Message


class LLMRequest(NamedTuple):
    """Everything that an answer depends on."""

    endpoint: str
    """Who answers, from `endpoint_of`: two endpoints may give different models the same name."""
    model: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    seed: int
    prefill: str = ""
    """Beginning of the answer, for models that we run ourselves; endpoints take none."""
    list_cap: int = 0
    """Likewise: the answer is a JSON list, ended after this many objects; 0 leaves the end to the model."""

    @property
    def hash(self) -> str:
        content = json.dumps(self._asdict(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class LLMReply(NamedTuple):
    text: str
    finish_reason: str
    """stop, or length where the answer was cut off."""
    prompt_tokens: int
    completion_tokens: int


class LLMError(RuntimeError):
    """The call failed; the message names the kind of failure and holds no secret."""

    def __init__(self, message: str, transient: bool = False) -> None:
        """
        Args:
            transient: The same request may be answered later: the network, a rate limit, a server in trouble.
        """
        super().__init__(message)
        self.transient = transient


class Generate(Protocol):
    """Makes one call, for one feature."""

    def __call__(self, request: LLMRequest, feature_key: str) -> Awaitable[LLMReply]: ...


def endpoint_of(config: LLMConfig) -> str:
    """Names the answerer in requests: URLs without their query, which may hold secrets."""
    if config.provider == "scripted":
        answers = json.dumps(config.answers, sort_keys=True)
        return f"scripted:{hashlib.sha256(answers.encode()).hexdigest()[:8]}"
    return "local" if config.provider == "local" else (config.base_url or "openai").partition("?")[0]


def api_key(config: LLMConfig) -> SecretStr:
    """The key from the environment, in a wrapper that prints as stars.

    Raises:
        UserError: the variable is not set.
    """
    key = os.environ.get(config.api_key_env)
    if not key:
        raise UserError(
            f"environment variable {config.api_key_env} (llms.*.api_key_env) is not set; export the key of "
            f"{config.base_url or 'the OpenAI API'}, or name another variable"
        )
    return SecretStr(key)


def openai_client(config: LLMConfig, key: SecretStr) -> Generate:
    """A client for any endpoint that speaks the OpenAI protocol."""
    client = openai.AsyncOpenAI(
        api_key=key.get_secret_value(),
        base_url=config.base_url,
        timeout=config.timeout_seconds,
        max_retries=config.max_retries,
    )

    async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
        try:
            answer = await client.chat.completions.create(
                model=request.model,
                messages=list(request.messages),  # type: ignore[arg-type]
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                seed=request.seed,
            )
        except openai.OpenAIError as error:
            # The error's own text may quote headers or the URL.
            status = getattr(error, "status_code", None)
            raise LLMError(f"{type(error).__name__}{f' {status}' if status else ''} from {request.model}") from None
        if not answer.choices:  # some endpoints send an error as a success without any
            raise LLMError(f"an answer without choices from {request.model}")
        choice, usage = answer.choices[0], answer.usage
        return LLMReply(
            choice.message.content or "",
            choice.finish_reason,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )

    return generate


def scripted_client(config: LLMConfig) -> Generate:
    """Answers each feature with what the config says: for tests, and for trying a config without a model."""

    async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
        text = config.answers.get(feature_key, "")
        return LLMReply(text, "stop", sum(len(m["content"].split()) for m in request.messages), len(text.split()))

    return generate


class Ledger:
    """A client that remembers: answers found in `llm_calls` cost nothing, new ones are written there."""

    def __init__(
        self,
        generate: Generate,
        config: LLMConfig,
        remembered: list[dict[str, Any]],
        write: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """
        Args:
            remembered: Rows of `llm_calls` that may be asked for again.
            write: Takes a new row.
        """
        self._generate, self._config, self._write = generate, config, write
        self._rows = {row["request_hash"]: row for row in remembered}

    async def __call__(self, request: LLMRequest, feature_key: str) -> tuple[LLMReply, float | None]:
        """The answer, and what it costs or once cost in dollars (None without a price)."""
        row = self._rows.get(request.hash)
        if row is None:
            start = time.monotonic()
            reply = await self._generate(request, feature_key)
            row = {
                "request_hash": request.hash,
                "feature_key": feature_key,
                "model": request.model,
                "request": json.dumps(request._asdict(), ensure_ascii=False),
                "response": reply.text,
                "finish_reason": reply.finish_reason,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                "cost_usd": price(self._config, reply),
                "seconds": time.monotonic() - start,
            }
            self._rows[request.hash] = row
            await self._write(row)
        reply = LLMReply(row["response"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"])
        return reply, row["cost_usd"]


def price(config: LLMConfig, reply: LLMReply) -> float | None:
    """Dollars by the config's price table; None where it holds no price."""
    prompt, completion = config.usd_per_million_prompt_tokens, config.usd_per_million_completion_tokens
    if prompt is None or completion is None:
        return None
    return (prompt * reply.prompt_tokens + completion * reply.completion_tokens) / 1e6
