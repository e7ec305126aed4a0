"""SAEs, loaded and run by sae-lens: its `encode` decides what an activation is. Imports torch alone until then.

Where a feature's activation depends on its own pre-activation alone (ReLU, JumpReLU, Gated, transcoders), the encoder
is cut to the requested features first; the TopK families need all features to choose from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rayinterp.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from sae_lens import SAE

PER_FEATURE = frozenset(
    {
        *("standard", "jumprelu", "gated"),
        *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    }
)
"""sae-lens architectures whose features are independent of each other."""
SUPPORTED = PER_FEATURE | {"topk"}
_ROWS = ("b_enc", "b_gate", "b_mag", "r_mag", "threshold")
"""Parameters with one number per feature."""


class SaeSource(NamedTuple):
    """Where an SAE comes from."""

    name: str
    """Its name in feature ids."""
    release: str | None
    """sae-lens release, or None for a local folder."""
    sae_id: str
    """Id within the release, or the folder."""


class SaeCard(NamedTuple):
    """What is known of an SAE without its weights."""

    architecture: str
    d_in: int
    d_sae: int
    hook_name: str
    """Where it reads."""
    hook_name_out: str | None
    """What it reconstructs, for a transcoder that says so; None for an SAE, which reconstructs what it reads."""
    prepend_bos: bool
    """Whether it was trained on sequences that begin with BOS."""
    centred: bool
    """Whether it was trained on a model whose writing weights were centred, as TransformerLens does."""


def read_card(source: SaeSource) -> SaeCard:
    """An SAE's config, from its folder or from the hub.

    Raises:
        UserError: the folder holds no SAE, or the config says what is not supported.
    """
    if source.release is None:
        path = Path(source.sae_id) / "cfg.json"
        if not path.is_file():
            raise UserError(
                f"subject.saes.sae_id {source.sae_id!r} is not a folder with an SAE in sae-lens format (no cfg.json); "
                "give one, or set subject.saes.release"
            )
        # Read by hand: importing sae-lens takes seconds, and a wrong config should not wait for them.
        config = json.loads(path.read_text())
    else:
        from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

        config = load_sae_config_from_huggingface(source.release, source.sae_id)
    # Before sae-lens 6 these stood at the top level.
    metadata = {**config, **config.get("metadata", {})}
    # Where a release names a module of transformers, that is more exact than TransformerLens's nearest name.
    hook_name = metadata.get("hf_hook_name") or metadata.get("hook_name") or metadata.get("hook_point")
    hook_name_out = metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")
    if not hook_name:
        raise UserError(f"SAE {source.sae_id!r} does not say where it reads: its config has no hook_name")
    if metadata.get("hook_head_index") is not None:
        raise UserError(
            f"SAE {source.sae_id!r} reads a single attention head (hook_head_index {metadata['hook_head_index']}), "
            "which is not supported; choose SAEs that read all heads"
        )
    architecture = config.get("architecture", "standard")
    if architecture == "standard" and (config.get("activation_fn_str") or config.get("activation_fn")) == "topk":
        architecture = "topk"
    if architecture not in SUPPORTED:
        raise UserError(
            f"SAE {source.sae_id!r} is of the kind {architecture!r}, which cannot be harvested; these can: "
            f"{', '.join(sorted(SUPPORTED))}. BatchTopK and Matryoshka SAEs are saved as jumprelu by sae-lens's "
            "save_inference_model"
        )
    return SaeCard(
        architecture=architecture,
        d_in=int(config["d_in"]),
        d_sae=int(config["d_sae"]),
        hook_name=str(hook_name),
        hook_name_out=hook_name_out if "transcoder" in architecture else str(hook_name),
        prepend_bos=bool(metadata.get("prepend_bos", "metadata" not in config)),  # older configs imply it
        centred=bool((metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")),
    )


def load_sae(source: SaeSource, device: str = "cpu", dtype: str = "float32") -> SAE:
    """A whole SAE, through sae-lens."""
    from sae_lens import SAE

    with warnings.catch_warnings():
        # It asks for a model with centred weights; the subject centres what the SAE reads instead.
        warnings.filterwarnings("ignore", message=r"[\s\S]*non-empty model_from_pretrained_kwargs")
        if source.release is None:
            sae: Any = SAE.load_from_disk(source.sae_id, device=device, dtype=dtype)
        else:
            sae = SAE.from_pretrained(source.release, source.sae_id, device=device, dtype=dtype)
    if sae.hook_z_reshaping_mode:
        sae.turn_off_forward_pass_hook_z_reshaping()  # transformers keeps the heads side by side
    return sae.eval().requires_grad_(False)


def decoder_directions(source: SaeSource, features: Sequence[int]) -> Float[np.ndarray, "k d_out"]:
    """What each of some features writes: the rows of the decoder."""
    return load_sae(source).W_dec[list(features)].numpy()


class Encoder:
    """The requested features of one SAE."""

    def __init__(self, sae: SAE, features: Sequence[int]) -> None:
        """Takes the SAE over: what its encoder does not need is freed."""
        self._sae: Any = sae
        self._columns: torch.Tensor | None = None
        architecture = sae.cfg.architecture()
        chosen = torch.tensor(features, dtype=torch.long)
        if architecture in PER_FEATURE:
            self._keep("W_enc", lambda weight: weight[:, chosen])
            for name in _ROWS:
                self._keep(name, lambda weight: weight[chosen])
            self._keep("W_dec", lambda weight: weight[:0])
        else:
            if architecture == "topk":
                # `encode` reads the decoder for the norms of its rows alone, and these are their own.
                self._keep("W_dec", lambda weight: weight.norm(dim=-1, keepdim=True))
            if list(features) != list(range(sae.cfg.d_sae)):
                self._columns = chosen

    def _keep(self, name: str, part: Any) -> None:
        weight = getattr(self._sae, name, None)
        if isinstance(weight, torch.Tensor):
            setattr(self._sae, name, torch.nn.Parameter(part(weight.data).clone(), requires_grad=False))

    @property
    def device(self) -> torch.device:
        return self._sae.W_enc.device

    def to(self, device: torch.device | str) -> Encoder:
        self._sae.to(device=torch.device(device))
        self._columns = None if self._columns is None else self._columns.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, hidden: Float[torch.Tensor, "*batch d_in"]) -> Float[torch.Tensor, "*batch k"]:
        """Activations of the requested features, in their order: what `sae.encode` gives, to the last bits."""
        activations = self._sae.encode(hidden)
        return activations if self._columns is None else activations[..., self._columns]


@torch.inference_mode()
def variance_unexplained(
    sae: SAE, hidden: Float[torch.Tensor, "*batch d_in"], target: Float[torch.Tensor, "*batch d_out"]
) -> float:
    """Share of the target's variance over tokens that the SAE's output misses; 0 is perfect, 1 is its mean."""
    flat = target.float().flatten(0, -2)
    missed = flat - sae(hidden).float().flatten(0, -2)
    return float(missed.pow(2).sum() / (flat - flat.mean(0)).pow(2).sum())
