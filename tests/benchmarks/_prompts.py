"""The simulator's prompts run as others run them: what the packed engine is measured against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

BATCH = 2
"""As in the reference implementation."""


def batches(prompts: list[list[int]], device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and mask of a few prompts at a time, padded."""
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in part], device=device)
        yield ids, torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in part], device=device)


@torch.inference_mode()
def plain(model: Any, prompts: list[list[int]], device: str = "cpu") -> None:
    """Every prompt from its beginning; the whole vocabulary at every position."""
    for ids, mask in batches(prompts, device):
        model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)


@torch.inference_mode()
def header_cached(model: Any, header: list[int], suffixes: list[list[int]], device: str = "cpu") -> None:
    """The header once, its KV cache copied for every batch; whatever head the model has at every position."""
    cached = DynamicCache()
    model(input_ids=torch.tensor([header], device=device), past_key_values=cached, use_cache=True)
    for ids, mask in batches(suffixes, device):
        cache = copy.deepcopy(cached)
        cache.batch_repeat_interleave(len(ids))
        whole = torch.cat([mask.new_ones(len(ids), len(header)), mask], dim=1)
        model(input_ids=ids, attention_mask=whole, past_key_values=cache).logits.log_softmax(-1)
