"""One LLM call: what is asked, what comes back, and what stands before every client.

Ledger (answers and bill on disk) -> limited (calls at once, calls a minute) -> a client, as of `endpoint`
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from aiolimiter import AsyncLimiter
from pydantic import SecretStr

from rayinterp.config import AnswerFormat, LLMConfig
from rayinterp.errors import UserError
from rayinterp.prompts import PLAIN_QUESTION, Message

PLAIN_TOKENS = 16
"""Of its answer: the fewest that all endpoints allow."""


class LLMRequest(NamedTuple):
    """Everything that an answer depends on."""

    endpoint: str
    """Who answers, from `endpoint_of`: two endpoints may give different models the same name."""
    model: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    seed: int
    list_cap: int = 0
    """Where the form of the answer is enforced, the rules that it may have; 0 leaves the form to the model."""
    answer_format: AnswerFormat = "text"
    """How an endpoint is told the form."""
    answer_schema: str = ""
    """JSON schema that a model of our own is held to, where the answer is not a list of rules."""

    @property
    def hash(self) -> str:
        # So that answers of before requests had a format, and when they had a prefill, are found again.
        content: dict[str, Any] = {"prefill": "", **self._asdict()}
        if self.answer_format == "text":
            del content["answer_format"]
        if not self.answer_schema:
            del content["answer_schema"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


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


def plain_question(config: LLMConfig, temperature: float) -> LLMRequest:
    """What any LLM answers that is up and set up rightly, for next to nothing: whether it does tells an outage from a
    prompt that it cannot take."""
    return LLMRequest(endpoint_of(config), config.model, (PLAIN_QUESTION,), temperature, PLAIN_TOKENS, seed=0)


def endpoint_of(config: LLMConfig) -> str:
    """Names the answerer in requests."""
    if config.provider == "scripted":
        answers = json.dumps(config.answers, sort_keys=True)
        return f"scripted:{hashlib.sha256(answers.encode()).hexdigest()[:8]}"
    return config.provider if config.provider in ("local", "planted") else config.base_url or "openai"


def api_key(config: LLMConfig) -> SecretStr:
    """The key from the environment, in a wrapper that prints as stars.

    Raises:
        UserError: the variable is not set, or holds what no HTTP header may.
    """
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"environment variable {config.api_key_env} (llms.*.api_key_env) is not set; export the key of "
            f"{config.base_url or 'the OpenAI API'}, or name another variable"
        )
    # Found here, since libraries quote the header that they refuse.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"environment variable {config.api_key_env} holds white space or characters that no key has")
    return SecretStr(key)


def limited(generate: Generate, num_slots: int, requests_per_minute: float | None = None) -> Generate:
    """The same client with at most so many calls under way, begun at even distances.

    Retries are the client's own and are not counted again; they wait longer each time.
    """
    slots = asyncio.Semaphore(num_slots)
    # A bucket that holds one call: no burst at the start of a minute.
    rate = AsyncLimiter(1, 60 / requests_per_minute) if requests_per_minute else None

    async def waiting(request: LLMRequest, feature_key: str) -> LLMReply:
        async with slots:
            if rate is not None:
                await rate.acquire()
            return await generate(request, feature_key)

    return waiting


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
        stage: str = "explain",
    ) -> None:
        """
        Args:
            remembered: Rows of `llm_calls` that may be asked for again.
            write: Takes a new row.
            stage: Where the calls belong in the bill.
        """
        self._generate, self._config, self._write, self._stage = generate, config, write, stage
        self._rows = {row["request_hash"]: row for row in remembered}
        self.num_new = 0
        """Calls that were made and answered."""
        self.usd_new = 0.0
        """What they cost, where that is known."""

    async def __call__(self, request: LLMRequest, feature_key: str) -> tuple[LLMReply, float | None]:
        """The answer, and what it costs or once cost in dollars (None without a price)."""
        row = self._rows.get(request.hash)
        if row is None:
            start = time.monotonic()
            reply = await self._generate(request, feature_key)
            self.num_new += 1
            self.usd_new += price(self._config, reply) or 0.0
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
                "stage": self._stage,
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
