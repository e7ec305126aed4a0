"""Where in a transformers model an SAE reads: from the hook names of sae-lens and TransformerLens to modules.

    blocks.N.hook_resid_pre|mid|post  blocks.N.hook_attn_out  blocks.N.attn.hook_z
    blocks.N.hook_mlp_in|out  blocks.N.mlp.hook_in  blocks.N.ln1|ln2.hook_normalized      families in FAMILIES
    model.layers.9   transformer.h.9   model.layers.9.mlp   model.layers.9.mlp.input      any model, by its own names

Imports torch alone. It knows nothing of SAEs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from rayinterp.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float

Kind = Literal["output", "input", "normalized"]


class HookPoint(NamedTuple):
    """One tensor of a model."""

    layer: int
    """Deepest decoder layer that must run."""
    module: str
    """Path of the module within the decoder."""
    kind: Kind
    """The module's output, its input, or, of a norm, its input normalised and not yet scaled by its weights."""
    residual: bool
    """Whether the tensor is the residual stream or is added to it: what centred weights would centre."""


class Family(NamedTuple):
    """Module names within a layer, for models that share them."""

    attention: str
    """Its output is added to the residual stream."""
    heads: str
    """Its input is the heads' outputs side by side, TransformerLens's z."""
    mlp: str
    mlp_out: str
    """Its output is added to the residual stream."""
    first_norm: str
    """Before attention."""
    second_norm: str
    """Before the MLP."""


_LLAMA = Family("self_attn", "self_attn.o_proj", "mlp", "mlp", "input_layernorm", "post_attention_layernorm")
_GEMMA = Family(
    "post_attention_layernorm",  # what is added to the stream is normalised first
    "self_attn.o_proj",
    "mlp",
    "post_feedforward_layernorm",
    "input_layernorm",
    "pre_feedforward_layernorm",
)
_NEOX = Family("attention", "attention.dense", "mlp", "mlp", "input_layernorm", "post_attention_layernorm")
_GPT2 = Family("attn", "attn.c_proj", "mlp", "mlp", "ln_1", "ln_2")

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}
"""By the `model_type` of the (text) config."""

LAYERS_IN_H = ("gpt2", "gptj", "bloom", "falcon", "gpt_bigcode")
"""Model types whose decoder keeps its layers in `h`; all others in `layers`."""
NAMES = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "attn.hook_z", "hook_mlp_in",
    "hook_mlp_out", "mlp.hook_in", "ln1.hook_normalized", "ln2.hook_normalized",
)  # fmt: skip
"""What may follow `blocks.N.`"""


def parse_hook_point(hook_name: str, config: Any) -> HookPoint:
    """Reads an SAE's hook name for a model with this (text) config.

    Raises:
        UserError: a name that is not mapped, with those that are; or a layer that the model does not have.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name):
        layers, layer = "h" if config.model_type in LAYERS_IN_H else "layers", int(match[1])
        module, kind, residual = _within_layer(match[2], config, hook_name)
    elif match := re.fullmatch(r"(?:\w+\.)*?(layers|h)\.(\d+)((?:\.\w+)*?)(?:\.(input|output))?", hook_name):
        layers, layer, module, kind = match[1], int(match[2]), match[3].removeprefix("."), match[4] or "output"
        residual = module == ""
    else:
        raise UserError(_unmapped(hook_name, config, NAMES))
    if layer >= config.num_hidden_layers:
        raise UserError(
            f"the SAE reads {hook_name!r}, but the subject model ({config.model_type}) has layers 0 to "
            f"{config.num_hidden_layers - 1}; subject.model and subject.saes do not belong together"
        )
    path = ".".join(filter(None, (layers, str(layer), module)))
    return HookPoint(layer, path, kind, residual)  # pyright: ignore[reportArgumentType]


def _within_layer(name: str, config: Any, hook_name: str) -> tuple[str, Kind, bool]:
    """(module within the layer, kind, residual) of what follows `blocks.N.`"""
    family = FAMILIES.get(config.model_type)
    known: dict[str, tuple[str, Kind, bool]] = {
        "hook_resid_pre": ("", "input", True),
        "hook_resid_post": ("", "output", True),
    }
    if family:
        known |= {
            "hook_attn_out": (family.attention, "output", True),
            "attn.hook_z": (family.heads, "input", False),
            "hook_mlp_out": (family.mlp_out, "output", True),
            "mlp.hook_in": (family.mlp, "input", False),
            "ln1.hook_normalized": (family.first_norm, "normalized", False),
            "ln2.hook_normalized": (family.second_norm, "normalized", False),
        }
        if not getattr(config, "use_parallel_residual", False):
            # With parallel branches nothing stands between attention and MLP.
            known |= dict.fromkeys(("hook_resid_mid", "hook_mlp_in"), (family.second_norm, "input", True))
    if name not in known:
        raise UserError(_unmapped(hook_name, config, known))
    return known[name]


def _unmapped(hook_name: str, config: Any, names: Any) -> str:
    listed = ", ".join(f"blocks.N.{name}" for name in names)
    return (
        f"the SAE reads {hook_name!r}, which is not mapped for subject models of type {config.model_type!r}; these "
        f"names are: {listed}; and the model's own, e.g. model.layers.N or model.layers.N.mlp"
    )


def check_module(model: torch.nn.Module, point: HookPoint, hook_name: str) -> None:
    """Refuses a hook point whose module the decoder does not have.

    Raises:
        UserError: says what the layer has instead.
    """
    try:
        model.get_submodule(point.module)
    except AttributeError:
        try:
            layer = model.get_submodule(".".join(point.module.split(".")[:2]))
            there = f"its layer {point.layer} has {', '.join(name for name, _ in layer.named_modules() if name)}"
        except AttributeError:
            there = f"it has {', '.join(name for name, _ in model.named_children())}"
        raise UserError(f"the SAE reads {hook_name!r}, which the subject model does not have: {there}") from None


def normalized(module: torch.nn.Module, x: Float[torch.Tensor, "... d"]) -> Float[torch.Tensor, "... d"]:
    """What a LayerNorm or RMSNorm makes of `x` before it multiplies by its weights, in float32."""
    x = x.float()
    if isinstance(module, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    epsilon = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-6
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(epsilon))
