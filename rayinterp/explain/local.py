"""An LLM of our own: any Hugging Face chat model, and the Ray Serve replica that runs it.

The chance of an answer comes from the request's seed alone, so a repeated request gives the same answer.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from rayinterp import embedded
from rayinterp.config import LLMConfig, ServiceResources
from rayinterp.explain.client import Generate, LLMReply, LLMRequest
from rayinterp.harvest import torch_threads
from rayinterp.simulate.serve import replica_options, run_app
from rayinterp.subject import pick_device, pick_dtype


class LocalLLM:
    """Answers one request at a time."""

    def __init__(self, config: LLMConfig) -> None:
        path = embedded.resolve(config.model)
        self._device = pick_device(config.device)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(config.dtype, self._device))
        self._model = model.to(self._device).eval().requires_grad_(False)

    def generate(self, request: LLMRequest) -> LLMReply:
        prompt = self._tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
        # The template has put BOS where it belongs.
        inputs = self._tokenizer(prompt + request.prefill, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self._device)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 50, "top_p": 0.95}
        prompt_tokens = inputs["input_ids"].shape[1]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(request.seed)
            output = self._model.generate(
                **inputs,
                max_new_tokens=request.max_tokens,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                stopping_criteria=self._stop_after(request.list_cap, prompt_tokens),
                **(sampling if request.temperature > 0 else {"do_sample": False}),
            )
        new = output[0, prompt_tokens:]
        text = request.prefill + self._tokenizer.decode(new, skip_special_tokens=True)
        if request.list_cap and text.count("}") >= request.list_cap:
            return LLMReply(close_list(text, request.list_cap), "stop", prompt_tokens, len(new))
        finished = len(new) < request.max_tokens
        return LLMReply(text, "stop" if finished else "length", prompt_tokens, len(new))

    def _stop_after(self, list_cap: int, prompt_tokens: int) -> StoppingCriteriaList:
        """Ends an answer after its last wanted object, or where the model itself closes the list."""

        def enough(ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            written = self._tokenizer.decode(ids[0, prompt_tokens:])
            closed = written.count("}") >= list_cap or re.search(r"\}\s*\]", written) is not None
            return torch.tensor([closed], device=ids.device)

        return StoppingCriteriaList([enough] if list_cap else [])  # type: ignore[list-item]


def close_list(text: str, list_cap: int) -> str:
    """The text up to its `list_cap`-th closing brace, as a list that ends there."""
    return "}".join(text.split("}")[:list_cap]) + "}]"


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


def served_client(app: str) -> Generate:
    """Calls the Serve app of one LLM arm."""
    handle = serve.get_app_handle(app)

    async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
        return LLMReply(*await handle.generate.remote(request))

    return generate
