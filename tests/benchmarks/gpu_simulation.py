"""LLM simulation on a GPU at the shapes of Gemma 2 9B and 27B, packed against the reference's way. Random weights.

Needs torch and transformers alone. The tokenizer is a small one, so the header is longer than Gemma's own would be.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from rayinterp.simulate import transformers as engine
from rayinterp.simulate.simulator import RuleRequest, TokenSequence
from rayinterp.simulate.transformers import TransformersSimulator
from tests.benchmarks._prompts import header_cached
from tests.benchmarks.gpu import GEMMA_2_9B, PEAK_FLOPS, flops_per_token
from tests.benchmarks.measure import Row, compare
from tests.simulate.tiny_simulators import make_tokenizer

NAME = "gpu_simulation"
NUM_RULES, NUM_RECORDS, LENGTH, TOKEN_BUDGET = 12, 40, 32, 16_384
TEXT = "the navy of a country met again in March and agreed that the war had ended years ago"
GEMMA_2_27B = Gemma2Config(
    vocab_size=256_000, hidden_size=4608, intermediate_size=36_864, num_hidden_layers=46, num_attention_heads=32,
    num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
)  # fmt: skip
SHAPES = (("Gemma 2 9B", GEMMA_2_9B, 3.0), ("Gemma 2 27B", GEMMA_2_27B, 1.5))
MIN_SHARE_OF_PEAK = 0.5


def random_simulator(config: Gemma2Config, device: str, dtype: str, attention: str) -> TransformersSimulator:
    """An engine that loads nothing: the weights are made up on the spot."""

    def model(*args: Any, **options: Any) -> Any:
        with torch.device(device):
            config._attn_implementation = attention
            made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        return made.eval().requires_grad_(False)

    before = engine.load_language_model
    engine.load_language_model = model
    try:
        with tempfile.TemporaryDirectory() as folder:
            make_tokenizer().save_pretrained(folder)
            return TransformersSimulator(
                folder, device=device, dtype=dtype, calibration="none", token_budget=TOKEN_BUDGET
            )
    finally:
        engine.load_language_model = before


def measure(name: str, config: Gemma2Config, device: str, dtype: str, attention: str, target: float) -> list[Row]:
    simulator = random_simulator(config, device, dtype, attention)
    words = TEXT.split()
    sequences = tuple(
        TokenSequence(i, tuple(f" {words[(i + j) % len(words)]}" for j in range(LENGTH))) for i in range(NUM_RECORDS)
    )
    requests = [RuleRequest(f"the word {words[i]!r}, number {i}", sequences) for i in range(NUM_RULES)]
    prompt = simulator._prompt
    suffixes = [
        [*prompt.rule(request.rule), *prompt.record(sequence.tokens).ids]
        for request in requests
        for sequence in request.sequences
    ]
    num_tokens = sum(len(prompt.rule(r.rule)) for r in requests) + sum(
        len(prompt.record(s.tokens).ids) for r in requests for s in r.sequences
    )
    head = simulator._model.get_output_embeddings()
    whole = torch.nn.Linear(
        config.hidden_size, config.vocab_size, bias=False, device=device, dtype=getattr(torch, dtype)
    )

    def reference() -> None:
        simulator._model.set_output_embeddings(whole)
        try:
            header_cached(simulator._model, prompt.header, suffixes, device)
            _synchronise(device)
        finally:
            simulator._model.set_output_embeddings(head)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    simulator.log_probs(requests[:1])
    row = compare(f"{name}: packed against the reference's way", lambda: simulator.log_probs(requests), reference,
                  len(suffixes), "pairs/s", target)  # fmt: skip
    assert row.ours is not None
    tokens_per_second = row.ours * num_tokens / len(suffixes)
    share = tokens_per_second * flops_per_token(config, config.num_hidden_layers) / PEAK_FLOPS
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return [
        row,
        Row(f"{name}: tokens per second, header not counted", tokens_per_second, None, None, "tokens/s", None, None),
        Row(f"{name}: share of the GPU's peak", share, None, None, "", MIN_SHARE_OF_PEAK, share >= MIN_SHARE_OF_PEAK),
        Row(f"{name}: tokens of the header", float(len(prompt.header)), None, None, "tokens", None, None),
        Row(f"{name}: peak memory", memory, None, None, "GB", None, None),
    ]


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run() -> list[Row]:
    if not torch.cuda.is_available():
        return [
            Row(
                f"{name}: packed against the reference's way (not run: no GPU)",
                None,
                None,
                None,
                "pairs/s",
                target,
                None,
            )
            for name, _, target in SHAPES
        ]
    return [
        row
        for name, config, target in SHAPES
        for row in measure(name, config, "cuda", "bfloat16", "flex_attention", target)
    ]
