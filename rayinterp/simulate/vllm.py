"""The simulator engine at scale: vLLM with the six digit rows of the LM head as a token classifier.

    header, rule, record -> one prompt a pair -> prefix cache (header once, a rule once) -> six logits at every tab

vLLM batches the prompts continuously and keeps what they begin with in common; logits over a whole vocabulary are
never made. The same numbers as `TransformersSimulator`, to the noise of the arithmetic. Needs vllm, torch and
transformers alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rayinterp.errors import UserError
from rayinterp.simulate.prompt_tokens import PromptTokens
from rayinterp.simulate.simulator import Calibration, RuleRequest, simulate_with

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32


class Prompt(NamedTuple):
    """One (rule, record) pair as vLLM reads it."""

    ids: tuple[int, ...]
    reads: tuple[int, ...]
    """Positions of the tabs, from the prompt's beginning."""


class VllmSimulator:
    """A language model behind vLLM that rates every token of a sequence for a rule.

    Args:
        model: Hugging Face name or local folder.
        revision: Commit of the model.
        dtype: As in vLLM: `auto`, `bfloat16`, `float16`, `float32`.
        quantization: As in vLLM (`fp8`, `awq`, `bitsandbytes`, ...); None for the model's own.
        calibration: Used by `simulate`; `log_probs` are never calibrated.
        num_few_shots: Worked examples in the header.
        tensor_parallel_size: GPUs that one engine is spread over.
        options: Handed to `vllm.LLM` as they are.

    Raises:
        UserError: the model or its tokenizer cannot be used.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        calibration: Calibration = "difference",
        num_few_shots: int = 3,
        tensor_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        self._vllm: Any = importlib.import_module("vllm")  # slow, and not everywhere: only where it is used
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).get_text_config()
        self._calibration: Calibration = calibration
        self._prompt = PromptTokens(tokenizer, num_few_shots)
        self._limit: int | None = getattr(config, "max_position_embeddings", None)
        self._head = head_of(config)
        self._engine = self._vllm.LLM(
            model=model,
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            tensor_parallel_size=tensor_parallel_size,
            runner="pooling",
            convert="classify",
            hf_overrides={
                "classifier_from_token": tokenizer.convert_ids_to_tokens(self._prompt.digit_ids),
                "method": "no_post_processing",
            },
            pooler_config={"task": "token_classify", "use_activation": False},
            enable_prefix_caching=True,
            **options,
        )
        # So that the prompts of the first call find the header there, all of them.
        self._encode([Prompt(tuple(self._prompt.header), ())], from_cache=True)

    def simulate(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq"]]]:
        """Calibrated predictions, as `Simulator` asks for."""
        return simulate_with(self.log_probs, requests, self._calibration)

    def log_probs(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq 6"]]]:
        """Raw log-probabilities among the digits 0 to 5: for each request, one [seq, 6] array per sequence."""
        prompts = [[self._pair(request.rule, s.tokens) for s in request.sequences] for request in requests]
        # A prompt that stands twice would find itself in the cache, and then has no rows.
        unique = list(dict.fromkeys(prompt for of_request in prompts for prompt in of_request))
        self._check_lengths(unique)
        logits = dict(zip(unique, self._encode(unique, from_cache=True), strict=True))
        again = [prompt for prompt, rows in logits.items() if rows is None]
        logits.update(zip(again, self._encode(again, from_cache=False), strict=True))
        return [[self._digits(logits[prompt]) for prompt in of_request] for of_request in prompts]

    def _pair(self, rule: str, tokens: tuple[str, ...]) -> Prompt:
        begin, record = [*self._prompt.header, *self._prompt.rule(rule)], self._prompt.record(tokens)
        return Prompt((*begin, *record.ids), tuple(len(begin) + read for read in record.reads))

    def _encode(self, prompts: list[Prompt], from_cache: bool) -> list[torch.Tensor | None]:
        """Raw logits [seq, 6] at the tabs of each prompt; None where the cache held one of them.

        What is read from the cache is not computed, and has no rows: they are those of the prompt's end.
        """
        if not prompts:
            return []
        outputs = self._engine.encode(
            [self._vllm.TokensPrompt(prompt_token_ids=list(prompt.ids)) for prompt in prompts],
            self._vllm.PoolingParams(use_activation=False, skip_reading_prefix_cache=not from_cache),
            pooling_task="token_classify",
            use_tqdm=False,
        )
        found: list[torch.Tensor | None] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            rows: torch.Tensor = output.outputs.data
            first = len(prompt.ids) - len(rows)
            known = all(read >= first for read in prompt.reads)
            found.append(rows[[read - first for read in prompt.reads]].float() if known else None)
        return found

    def _digits(self, logits: torch.Tensor | None) -> Float32[np.ndarray, "seq 6"]:
        assert logits is not None, "vLLM answered from its cache although it was told not to"
        return self._head.applied(logits).log_softmax(-1).cpu().numpy()

    def _check_lengths(self, prompts: list[Prompt]) -> None:
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if self._limit is not None and longest > self._limit:
            raise UserError(
                f"a simulator prompt has {longest} tokens and the model has {self._limit} positions. Use shorter "
                "sequences, fewer few-shots (num_few_shots) or another model"
            )


class Head(NamedTuple):
    """What a model does to its head's products: a classifier in its place leaves that out."""

    scale: float
    softcap: float | None

    def applied(self, logits: torch.Tensor) -> torch.Tensor:
        scaled = logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def head_of(config: Any) -> Head:
    """Reads the head's scale and soft-capping from the model's config.

    Raises:
        UserError: the head has a bias, which a classifier made of its rows would leave out.
    """
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"the LM head of {config.model_type} has a bias, which vLLM's classifier leaves out; set engine: "
            "transformers"
        )
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(scale / divisor, getattr(config, "final_logit_softcapping", None))
