"""Prompts that share beginnings as one packed pass: token ids, positions and mask. Pure functions of torch.

    header (KV cache) -> rule -> record
                              -> record
                      -> rule -> record

A token attends to its own segment and to the segments above it; positions continue along each path, so siblings have
the same ones. What a path computes equals what its text alone would, to the noise of the arithmetic. This module
knows nothing of text, tokenizers or digits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rayinterp.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers names them."""
HEADER = -1
"""Parent of the segments that follow the header directly."""


class Segment(NamedTuple):
    """A stretch of tokens below the header or below another segment."""

    ids: Sequence[int]
    parent: int = HEADER
    """Index of an earlier segment in the same tree."""


class PackedTree(NamedTuple):
    """A tree as one row of tokens, ready for a model."""

    ids: Int64[torch.Tensor, "new"]
    position_ids: Int64[torch.Tensor, "new"]
    segments: Int64[torch.Tensor, "new"]
    """Segment that each token belongs to."""
    ancestry: Bool[torch.Tensor, "segment segment"]
    """Whether the column's segment is the row's or lies above it."""
    starts: tuple[int, ...]
    """Where each segment begins in the row."""


def pack(segments: Sequence[Segment], header_length: int) -> PackedTree:
    """Lays a tree out in the order given; parents must come before their children."""
    ancestry = torch.eye(len(segments), dtype=torch.bool)
    starts: list[int] = []
    positions: list[int] = []
    """Position of each segment's first token along its path."""
    num_tokens = 0
    for index, (ids, parent) in enumerate(segments):
        assert HEADER <= parent < index, f"segment {index} has parent {parent}"
        if parent != HEADER:
            ancestry[index] |= ancestry[parent]
        positions.append(header_length if parent == HEADER else positions[parent] + len(segments[parent].ids))
        starts.append(num_tokens)
        num_tokens += len(ids)
    lengths = torch.tensor([len(segment.ids) for segment in segments])
    shift = torch.tensor(positions) - torch.tensor(starts)
    return PackedTree(
        ids=torch.tensor([token for segment in segments for token in segment.ids]),
        position_ids=torch.arange(num_tokens) + shift.repeat_interleave(lengths),
        segments=torch.arange(len(segments)).repeat_interleave(lengths),
        ancestry=ancestry,
        starts=tuple(starts),
    )


def visible(
    tree: PackedTree, header_length: int, window: int | None = None, device: torch.device | str = "cpu"
) -> Bool[torch.Tensor, "new header+new"]:
    """Where each token may look: the header, its own segment and those above, itself and what stands before it.

    Args:
        window: Positions along the path, its own included, that a token sees back; None for all of them. (Places in
            the row would not do: between a token and its parent segment lie its siblings.)
    """
    segments, ancestry = tree.segments.to(device), tree.ancestry.to(device)
    related = ancestry[segments[:, None], segments[None, :]]
    allowed = related.tril()  # an ancestor stands further left, so this is causal order along the path
    allowed = torch.cat([allowed.new_ones(len(segments), header_length), allowed], dim=1)
    if window is not None:
        own = tree.position_ids.to(device)
        seen = torch.cat([torch.arange(header_length, device=device), own])
        allowed &= own[:, None] - seen[None, :] < window
    return allowed


def block_mask(
    tree: PackedTree,
    header_length: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    window: int | None = None,
) -> Float[torch.Tensor, "1 1 new header+new"]:
    """`visible` as a mask to be added to attention scores: 0, and the dtype's minimum elsewhere."""
    allowed = visible(tree, header_length, window, device)
    mask = torch.zeros(1, 1, *allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


Masks = Any
"""What a model takes as its attention mask: one, or one for each kind of its layers."""


def attention_masks(
    model: torch.nn.Module, tree: PackedTree, header_length: int, dtype: torch.dtype, device: torch.device | str
) -> Masks:
    """The masks that a model's layers need: where some have a sliding window, one mask alone would switch it off."""
    config = _text_config(model)
    windows = attention_windows(config)
    flex = config._attn_implementation == "flex_attention"
    masks = {
        kind: flex_mask(tree, header_length, device, window)
        if flex
        else block_mask(tree, header_length, dtype, device, window)
        for kind, window in windows.items()
    }
    return masks if getattr(config, "layer_types", None) else masks[FULL]


def flex_mask(tree: PackedTree, header_length: int, device: torch.device | str, window: int | None = None) -> Any:
    """The same for flex attention, which skips the blocks in which nothing is visible."""
    from torch.nn.attention.flex_attention import create_block_mask

    segments, ancestry = tree.segments.to(device), tree.ancestry.to(device)
    positions = torch.cat([torch.arange(header_length), tree.position_ids]).to(device)

    def is_visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        del batch, head
        of_header = key < header_length
        place = torch.where(of_header, 0, key - header_length)
        allowed = of_header | (ancestry[segments[query], segments[place]] & (place <= query))
        if window is not None:
            allowed = allowed & (positions[query + header_length] - positions[key] < window)
        return allowed

    num_new = len(segments)
    return create_block_mask(is_visible, None, None, num_new, header_length + num_new, device=str(device))


def attention_windows(config: Any) -> dict[str, int | None]:
    """By kind of layer, how far back it sees; None for all the way. A model without kinds has `full_attention`."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: window if kind == SLIDING else None for kind in sorted({FULL, *kinds})}
    return {FULL: window}


class Branch(NamedTuple):
    """A rule with the records it is to be read on, as token ids."""

    rule: Sequence[int]
    records: Sequence[Sequence[int]]


class Leaf(NamedTuple):
    """Where one record of one branch came to lie."""

    branch: int
    record: int
    segment: int


class TreePlan(NamedTuple):
    """One pass: its segments, and which of them are records."""

    segments: list[Segment]
    leaves: list[Leaf]


def plan_passes(branches: Sequence[Branch], token_budget: int) -> Iterator[TreePlan]:
    """Cuts rules and their records into passes of at most `token_budget` new tokens, in order.

    A rule whose records spread over two passes is repeated in both; a record that is longer than the budget gets a
    pass of its own.
    """
    plan, num_tokens = TreePlan([], []), 0
    for branch_index, branch in enumerate(branches):
        parent = HEADER
        for record_index, record in enumerate(branch.records):
            needed = len(record) + (len(branch.rule) if parent == HEADER else 0)
            if plan.leaves and num_tokens + needed > token_budget:
                yield plan
                plan, num_tokens, parent = TreePlan([], []), 0, HEADER
            if parent == HEADER:
                parent = len(plan.segments)
                plan.segments.append(Segment(branch.rule))
                num_tokens += len(branch.rule)
            plan.leaves.append(Leaf(branch_index, record_index, len(plan.segments)))
            plan.segments.append(Segment(record, parent))
            num_tokens += len(record)
    if plan.leaves:
        yield plan


def check_model(model: torch.nn.Module) -> None:
    """Refuses models that would compute something else for a packed tree than for its paths.

    Raises:
        UserError: says which property of the model is in the way.
    """
    config = _text_config(model)
    reasons = []
    if "position_ids" not in inspect.signature(model.forward).parameters:
        reasons.append("its forward pass takes no position_ids, so positions cannot continue along a path")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        reasons.append("it uses ALiBi, which ignores position_ids")
    if "local" in (getattr(config, "attention_layers", None) or []):
        reasons.append("its local layers count their window by place in the row, not along a path")
    kinds = set(getattr(config, "layer_types", None) or []) - {FULL, SLIDING}
    if kinds:
        reasons.append(f"it has layers of the kind {', '.join(sorted(kinds))}, which take no attention mask")
    if reasons:
        raise UserError(
            f"the simulator model ({config.model_type}) cannot read packed prompts: {'; '.join(reasons)}. "
            "Choose a model with rotary or learned positions and full attention"
        )


def check_length(model: torch.nn.Module, longest_path: int) -> None:
    """Refuses paths, header included, that reach beyond the model's positions.

    Raises:
        UserError: gives both lengths.
    """
    config = _text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest_path > limit:
        raise UserError(
            f"a simulator prompt has {longest_path} tokens and the model ({config.model_type}) has {limit} positions. "
            "Use shorter sequences, fewer few-shots (num_few_shots) or another model"
        )


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
