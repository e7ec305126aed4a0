"""The subject model and its SAEs: token ids in, feature activations out.

The model runs without gradients, without its LM head and only up to the deepest layer that an SAE reads. This module
imports torch and transformers alone, so that it runs on bare GPU machines; sae-lens is loaded when an SAE is.
It knows nothing of tables, corpora or Ray.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from rayinterp.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from sae_lens import SAE


@dataclass(frozen=True, order=True)
class FeatureId:
    """One latent of one SAE.

    Example:
        `str(FeatureId("layer_12", 4711)) == "layer_12/4711"`
    """

    sae: str
    index: int

    def __str__(self) -> str:
        return f"{self.sae}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Reads what `str` wrote.

        Raises:
            UserError: the text is not `sae/index`.
        """
        sae, slash, index = text.rpartition("/")
        if not slash or not sae or not index.isdigit():
            raise UserError(f"feature {text!r} is not of the form sae/index, e.g. layer_12/4711")
        return cls(sae, int(index))


def interleave(features: list[FeatureId]) -> list[FeatureId]:
    """Features of all SAEs in turn, so that a budget reaches each of them."""
    seen: dict[str, int] = {}
    place: dict[FeatureId, int] = {}
    for feature in features:
        place[feature] = seen[feature.sae] = seen.get(feature.sae, -1) + 1
    return sorted(features, key=lambda feature: (place[feature], feature.sae))


class SaeSource(NamedTuple):
    """Where an SAE comes from."""

    name: str
    """Its name in feature ids."""
    release: str | None
    """sae-lens release, or None for a local folder."""
    sae_id: str
    """Id within the release, or the folder."""


class Subject(Protocol):
    """What the harvest runs: a language model with SAEs, or the planted subject of the tests."""

    features: dict[str, list[int]]
    """Requested features by SAE, ascending."""

    def activations(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        """Activations of the requested features, in their order, at every text token (BOS left out)."""
        ...

    def variance_unexplained(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, float]:
        """Share of the hidden state's variance that each SAE's reconstruction misses."""
        ...


def pick_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32; a named dtype is taken as it is."""
    if dtype != "auto":
        return getattr(torch, dtype)
    native = device.startswith("cuda") or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_sae(source: SaeSource, device: str = "cpu") -> SAE:
    """Loads an SAE through sae-lens, in float32."""
    from sae_lens import SAE

    if source.release is None:
        return SAE.load_from_disk(source.sae_id, device=device, dtype="float32")
    return SAE.from_pretrained(source.release, source.sae_id, device=device, dtype="float32")


class HookPoint(NamedTuple):
    """Where in the model an SAE reads."""

    layer: int
    """Deepest decoder layer that must run."""
    module: str
    """Path of the module within the base model."""
    side: str
    """`output` or `input` of the module."""


def parse_hook_point(hook_name: str) -> HookPoint:
    """Reads an SAE's hook name: a module of the transformers model, or TransformerLens's residual stream names.

    Raises:
        UserError: a name that is not mapped, with the forms that are.
    """
    if match := re.fullmatch(r"(?:model\.|transformer\.)?(layers|h)\.(\d+)", hook_name):
        return HookPoint(int(match[2]), f"{match[1]}.{match[2]}", "output")
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name):
        side = {"pre": "input", "post": "output"}[match[2]]
        return HookPoint(int(match[1]), f"*.{match[1]}", side)
    raise UserError(
        f"the SAE reads {hook_name!r}, which is not mapped yet; these are: model.layers.N, transformer.h.N, "
        "blocks.N.hook_resid_pre, blocks.N.hook_resid_post"
    )


class LanguageModelSubject:
    """A transformers model cut after the deepest hook point, with its SAEs."""

    def __init__(
        self,
        model: str,
        saes: Sequence[SaeSource],
        features: dict[str, list[int]],
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        prepend_bos: bool | str = "auto",
    ) -> None:
        """Loads the model and the SAEs.

        Args:
            model: Hugging Face name or folder.
            saes: The SAEs to run in the same pass.
            features: Requested features by SAE name.
            prepend_bos: "auto" asks the SAEs' metadata.
        """
        self.device = pick_device(device)
        self.features = features
        self._saes = {source.name: load_sae(source, self.device) for source in saes}
        self._hooks = {name: parse_hook_point(str(sae.cfg.metadata.hook_name)) for name, sae in self._saes.items()}
        num_layers = max(hook.layer for hook in self._hooks.values()) + 1
        config = AutoConfig.from_pretrained(model, revision=revision)
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
        self._model = AutoModel.from_pretrained(
            model, revision=revision, config=config, dtype=pick_dtype(dtype, self.device)
        )
        self._model.to(self.device).eval().requires_grad_(False)
        self._bos = self._bos_token(model, revision, prepend_bos)
        self._columns = {
            name: torch.tensor(features[name], dtype=torch.long, device=self.device) for name in self._saes
        }

    def _bos_token(self, model: str, revision: str | None, prepend_bos: bool | str) -> int | None:
        """The token to put in front, or None."""
        if prepend_bos == "auto":
            wanted = {bool(sae.cfg.metadata.prepend_bos) for sae in self._saes.values()}
            if len(wanted) > 1:
                raise UserError(
                    "subject.prepend_bos is 'auto', but the SAEs disagree about BOS; set it to true or false"
                )
            prepend_bos = wanted.pop()
        if not prepend_bos:
            return None
        token = AutoTokenizer.from_pretrained(model, revision=revision).bos_token_id
        if token is None:
            raise UserError(f"subject.prepend_bos is true, but the tokenizer of {model!r} has no BOS; set it to false")
        return int(token)

    @torch.no_grad()
    def hidden_states(
        self, token_ids: Int[torch.Tensor, "batch seq"]
    ) -> dict[str, Float[torch.Tensor, "batch seq d_model"]]:
        """What each SAE reads, in float32, at every text token."""
        captured: dict[str, torch.Tensor] = {}
        handles = [self._capture(name, hook, captured) for name, hook in self._hooks.items()]
        ids = token_ids.to(self.device)
        if self._bos is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), self._bos), ids], dim=1)
        try:
            self._model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        first = 0 if self._bos is None else 1
        return {name: self._as_trained(name, state.float())[:, first:] for name, state in captured.items()}

    def _capture(self, name: str, hook: HookPoint, into: dict[str, torch.Tensor]) -> Any:
        path = hook.module
        if path.startswith("*."):
            path = path.replace("*", "layers" if hasattr(self._model, "layers") else "h")
        module = self._model.get_submodule(path)

        def keep_output(_module: Any, _args: Any, output: Any) -> None:
            into[name] = output[0] if isinstance(output, tuple) else output

        def keep_input(_module: Any, args: Any) -> None:
            into[name] = args[0]

        if hook.side == "output":
            return module.register_forward_hook(keep_output)
        return module.register_forward_pre_hook(keep_input)

    def _as_trained(self, name: str, state: torch.Tensor) -> torch.Tensor:
        """TransformerLens centres what is written to the residual stream, unless an SAE was trained without that."""
        kwargs = self._saes[name].cfg.metadata.model_from_pretrained_kwargs or {}
        return state - state.mean(-1, keepdim=True) if kwargs.get("center_writing_weights") else state

    @torch.no_grad()
    def activations(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        return {
            name: self._saes[name].encode(state)[..., self._columns[name]]
            for name, state in self.hidden_states(token_ids).items()
        }

    @torch.no_grad()
    def variance_unexplained(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, float]:
        shares: dict[str, float] = {}
        for name, state in self.hidden_states(token_ids).items():
            flat = state.flatten(0, 1)
            missed = flat - self._saes[name](flat)
            shares[name] = float(missed.pow(2).sum() / (flat - flat.mean(0)).pow(2).sum())
        return shares
