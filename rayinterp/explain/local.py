"""An LLM of our own: any Hugging Face chat model, and the Ray Serve replica that runs it.

The chance of an answer comes from the request's seed alone, so a repeated request gives the same answer. A list of
rules or a judge's answer is held to its form by a grammar (llguidance), whatever the size of the model: at each token
those that lead out of the form are taken away, for 1.4 ms a token, where the embedded model takes 65 on one core.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance.hf
import torch
from llguidance import LLMatcher, LLTokenizer
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from rayinterp import embedded
from rayinterp.config import LLMConfig, ServiceResources
from rayinterp.explain.client import LLMReply, LLMRequest
from rayinterp.explanation import rules_schema
from rayinterp.pools import torch_threads
from rayinterp.simulate.serve import replica_options, run_app
from rayinterp.subject import pick_device, pick_dtype

MAX_CHARACTERS = 200
"""Of a rule by a model of our own: a small one, once it repeats itself, goes on to the end."""
TOKENS_AROUND_RULE = 15
"""Braces, keys and strength of a rule."""
CHARACTERS_PER_TOKEN = 3
"""Of English in a vocabulary of 50,000, on the short side."""


def characters_per_rule(max_tokens: int, rule_cap: int) -> int:
    """The length that lets `rule_cap` rules end within `max_tokens`, as a rule."""
    return max(30, min(CHARACTERS_PER_TOKEN * (max_tokens // rule_cap - TOKENS_AROUND_RULE), MAX_CHARACTERS))


class Grammar(LogitsProcessor):
    """Leaves an answer only tokens with which it can still take the form that is asked for; batches of one."""

    def __init__(self, tokenizer: LLTokenizer, request: LLMRequest, prompt_tokens: int) -> None:
        schema = request.answer_schema
        if request.list_cap:
            length = characters_per_rule(request.max_tokens, request.list_cap)
            schema = json.dumps(rules_schema(request.list_cap, length)["properties"]["rules"])
        spacing: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults=spacing)
        self._matcher, self._read = LLMatcher(tokenizer, grammar), prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self._matcher.consume_tokens(input_ids[0, self._read :].tolist())
        self._read = input_ids.shape[1]
        assert not self._matcher.is_error(), self._matcher.get_error()
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return scores.masked_fill(allowed.to(scores.device) == 0, float("-inf"))


class LocalLLM:
    """Answers one request at a time."""

    def __init__(self, config: LLMConfig) -> None:
        path = embedded.resolve(config.model)
        self._device = pick_device(config.device)
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        dtype = pick_dtype(config.dtype, self._device)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._ends: int | list[int] = model.generation_config.eos_token_id
        self._vocabulary = llguidance.hf.from_tokenizer(
            self._tokenizer, model.get_output_embeddings().weight.shape[0], self._ends
        )

    def generate(self, request: LLMRequest) -> LLMReply:
        prompt = self._tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
        # The template has put BOS where it belongs.
        inputs = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self._device)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 50, "top_p": 0.95}
        prompt_tokens = inputs["input_ids"].shape[1]
        has_form = request.list_cap or request.answer_schema
        form = [Grammar(self._vocabulary, request, prompt_tokens)] if has_form else []
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(request.seed)
            output = self._model.generate(
                **inputs,
                max_new_tokens=request.max_tokens,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                logits_processor=LogitsProcessorList(form),
                **(sampling if request.temperature > 0 else {"do_sample": False}),
            )
        new = output[0, prompt_tokens:]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        finished = len(new) < request.max_tokens
        return LLMReply(text, "stop" if finished else "length", prompt_tokens, len(new))


@serve.deployment
class LLMReplica:
    """Runs `LocalLLM` in a thread, so that health checks are answered while it works."""

    def __init__(self, config: LLMConfig, num_replicas: int) -> None:
        self._llm = LocalLLM(config)
        # Torch counts threads per calling thread, and Ray's default for a share of a CPU is one.
        self._thread = ThreadPoolExecutor(1, "llm", torch.set_num_threads, (torch_threads(num_replicas),))

    async def generate(self, request: LLMRequest) -> LLMReply:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._llm.generate, request)


def deploy_llm(app: str, config: LLMConfig, resources: ServiceResources) -> DeploymentHandle:
    """Starts the replicas of one LLM arm as a Serve app, unless they are there."""
    replica = LLMReplica.options(**replica_options(resources))  # type: ignore[attr-defined]
    return run_app(replica.bind(config, resources.most_actors), app)
