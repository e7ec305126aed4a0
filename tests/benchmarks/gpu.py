"""Harvest on a GPU at the shape of Gemma 2 9B with a 16k-wide JumpReLU SAE, against a bare pass through its layers.

Random weights. Needs torch and transformers alone: the SAE's arithmetic is written out here, as sae-lens does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, Gemma2Config

from rayinterp import subject as subject_module
from rayinterp.saes import SaeCard, SaeSource
from rayinterp.subject import LanguageModelSubject
from tests.benchmarks.measure import Row, compare

NAME = "gpu"
LAYER, D_SAE = 20, 16_384
NUM_SEQUENCES, LENGTH, TOKEN_BUDGET = 4096, 32, 16_384
PEAK_FLOPS = 790e12
"""Dense bfloat16 of an H200, as measured on large matrix products."""
TARGET = 0.85
GEMMA_2_9B = Gemma2Config(
    vocab_size=256_000, hidden_size=3584, intermediate_size=14_336, num_hidden_layers=42, num_attention_heads=16,
    num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
)  # fmt: skip


class JumpReLU(torch.nn.Module):
    """Encoder of a JumpReLU SAE with random weights, on which one feature in a thousand is active at a token."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.randn(d_in, d_sae) / d_in**0.5, requires_grad=False)
        self.W_dec = torch.nn.Parameter(torch.empty(d_sae, 0), requires_grad=False)
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae), requires_grad=False)
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in), requires_grad=False)
        self.threshold = torch.nn.Parameter(torch.full((d_sae,), 3.1), requires_grad=False)
        self.cfg = type("Config", (), {"architecture": staticmethod(lambda: "jumprelu"), "d_sae": d_sae})

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5
        pre = x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        return pre.relu() * (pre > self.threshold)


def random_subject(config: Gemma2Config, layer: int, d_sae: int, device: str, dtype: str) -> LanguageModelSubject:
    """A subject that loads nothing: weights and SAE are made up on the spot."""

    def card(source: SaeSource) -> SaeCard:
        hook = f"blocks.{layer}.hook_resid_post"
        return SaeCard("jumprelu", config.hidden_size, d_sae, hook, None, False, False)

    def model(auto_class: Any, *args: Any, config: Any, **options: Any) -> Any:
        with torch.device(device):
            return AutoModel.from_config(config, dtype=getattr(torch, dtype)).eval().requires_grad_(False)

    patched: dict[str, Callable[..., Any]] = {
        "read_card": card,
        "load_language_model": model,
        "load_sae": lambda source, dtype: JumpReLU(config.hidden_size, d_sae),
    }
    before = {name: getattr(subject_module, name) for name in patched}
    try:
        for name, function in patched.items():
            setattr(subject_module, name, function)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            source = SaeSource("a", None, str(Path(folder)))
            return LanguageModelSubject(
                folder, [source], {"a": list(range(d_sae))}, device=device, dtype=dtype, prepend_bos=False
            )
    finally:
        for name, function in before.items():
            setattr(subject_module, name, function)


def flops_per_token(config: Gemma2Config, num_layers: int) -> float:
    """Of the matrix products with weights; attention scores of 32 tokens are a thousandth of it."""
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return 2.0 * num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def measure(config: Gemma2Config, layer: int, d_sae: int, num_sequences: int, device: str, dtype: str) -> list[Row]:
    subject = random_subject(config, layer, d_sae, device, dtype)
    batch = TOKEN_BUDGET // LENGTH
    ids = torch.randint(10, config.vocab_size, (num_sequences, LENGTH))

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def ours() -> object:
        return sum(len(part["a"].values) for part in subject.stream(ids.split(batch)))

    @torch.inference_mode()
    def bare() -> object:
        for part in ids.split(batch):
            subject._model(input_ids=part.to(device), use_cache=False)
        synchronise()
        return None

    num_active = ours()
    bare()
    row = compare("harvest against a bare pass, Gemma 2 9B to layer 20", ours, bare, ids.numel(), "tokens/s", TARGET)
    assert row.ours is not None
    share = row.ours * flops_per_token(config, layer + 1) / PEAK_FLOPS
    return [
        row,
        Row("its share of the GPU's peak", 100 * share, None, None, "%", None, None),
        Row("active features per token", float(num_active) / ids.numel(), None, None, "", None, None),
    ]


def run() -> list[Row]:
    if not torch.cuda.is_available():
        name = "harvest against a bare pass, Gemma 2 9B to layer 20 (not run: no GPU)"
        return [Row(name, None, None, None, "tokens/s", TARGET, None)]
    return measure(GEMMA_2_9B, LAYER, D_SAE, NUM_SEQUENCES, "cuda", "bfloat16")
