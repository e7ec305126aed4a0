"""The subject model and its SAEs: token ids in, feature activations out.

    token ids -> transformers model, as far as the deepest hook point -> each SAE's encoder -> non-zero activations

The model runs without gradients, without its LM head and without the layers that no SAE reads. This module imports
torch and transformers alone, so that it runs on bare GPU machines; sae-lens is loaded when an SAE is. It knows nothing
of tables, corpora or Ray.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import transformers

from rayinterp.errors import UserError
from rayinterp.hook_points import HookPoint, normalized, parse_hook_point
from rayinterp.saes import Encoder, SaeCard, SaeSource, load_sae, read_card, variance_unexplained

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Quantization = Literal["none", "8bit", "4bit"]


class SparseActivations(NamedTuple):
    """The non-zero activations of one SAE in one batch, by row and position."""

    rows: Int[np.ndarray, "n"]
    """Sequence within the batch."""
    positions: Int[np.ndarray, "n"]
    """Text token within the sequence."""
    columns: Int[np.ndarray, "n"]
    """Place of the feature among the requested ones."""
    values: Float[np.ndarray, "n"]
    norms: Float[np.ndarray, "batch seq"]
    """Length of what the SAE read at every text token."""


class SubjectCheck(NamedTuple):
    """What a first look at one SAE's input shows."""

    variance_unexplained: float | None
    """Share of the variance that the reconstruction misses; None where the SAE does not say what it reconstructs."""
    median_norm: float
    """Of what the SAE reads, over text tokens."""


class Subject(Protocol):
    """What the harvest runs: a language model with SAEs, or the planted subject of the tests."""

    features: dict[str, list[int]]
    """Requested features by SAE, ascending."""
    dtype: str
    """Precision that it computes in."""

    def check(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, SubjectCheck]:
        """Looks at every SAE once."""
        ...

    def stream(self, batches: Iterable[Int[torch.Tensor, "batch seq"]]) -> Iterator[dict[str, SparseActivations]]:
        """Activations of the requested features at every text token (BOS left out), batch by batch."""
        ...

    def holistic(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        """How far each requested feature's mean activation over text tokens falls when each token is taken out."""
        ...


def sparsify(
    activations: Float[torch.Tensor, "batch seq k"], norms: Float[torch.Tensor, "batch seq"]
) -> SparseActivations:
    """Non-zeros in row-major order, copied to the CPU."""
    where = activations.nonzero()
    values = activations[tuple(where.unbind(1))].float()
    rows, positions, columns = (_to_numpy(column) for column in where.to(torch.int32).unbind(1))
    return SparseActivations(rows, positions, columns, _to_numpy(values), _to_numpy(norms.float()))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """On CUDA through pinned memory, which is copied without an intermediate buffer."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.numpy()


def pick_device(device: str) -> str:
    """What auto stands for here; a device that is named is taken as it is.

    Raises:
        UserError: this process was given GPUs, and torch sees none.
    """
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if given[:1].isdigit() or given.startswith(("GPU-", "MIG-")):  # else a GPU's price is paid for a CPU's work
        raise UserError(
            f"this process was given GPUs (CUDA_VISIBLE_DEVICES={given}), and torch {torch.__version__} sees none: a "
            "driver is missing, or this build of torch has no CUDA; set device: cpu to go without"
        )
    return "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32; a named dtype is taken as it is."""
    if dtype != "auto":
        return getattr(torch, dtype)
    native = device.startswith("cuda") or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_language_model(
    auto_class: Any,
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    device: str,
    quantization: Quantization,
    **options: Any,
) -> Any:
    """A transformers model, ready to be read from: on one device, or spread by `device_map` in `options`.

    Raises:
        UserError: quantization is asked for and bitsandbytes is not installed.
    """
    if quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"quantization is {quantization!r}, which needs bitsandbytes: pip install 'rayinterp[quant]'"
            )
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit", load_in_4bit=quantization == "4bit", bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = options.get("device_map") or {"": device}
    options |= {"revision": revision, "trust_remote_code": False}  # its default, None, asks whoever sits at a terminal
    model = auto_class.from_pretrained(name, dtype=dtype, **options).eval().requires_grad_(False)
    return model if options.get("device_map") else model.to(device)


def cut_layers(config: Any, num_layers: int) -> Any:
    """A model's config, changed to that of its first layers, so that the others are not even loaded."""
    text = config.get_text_config()
    whole, text.num_hidden_layers = text.num_hidden_layers, num_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry per layer, such as layer_types
            setattr(text, key, value[:num_layers])
    return config


class _AllCaptured(Exception):  # noqa: N818 - ends a forward pass, which is no error
    pass


class LanguageModelSubject:
    """A transformers model that runs as far as the deepest hook point, with its SAEs."""

    def __init__(
        self,
        model: str,
        saes: Sequence[SaeSource],
        features: dict[str, list[int]],
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        sae_dtype: str = "float32",
        attn_implementation: str | None = None,
        device_map: str | None = None,
        quantization: Quantization = "none",
        compile_layers: bool = False,
        prepend_bos: bool | str = "auto",
    ) -> None:
        """Loads the SAEs' encoders and the layers that they read.

        Args:
            model: Hugging Face name or folder.
            saes: The SAEs to run in the same pass.
            features: Requested features by SAE name.
            attn_implementation: As in transformers; its own choice where None.
            device_map: As in transformers, to spread a model over several GPUs.
            quantization: By bitsandbytes.
            compile_layers: `torch.compile` every layer that no SAE reads the inside of.
            prepend_bos: "auto" asks the SAEs.

        Raises:
            UserError: an SAE and the model do not go together.
        """
        self.device = pick_device(device)
        self.features = features
        self.dtype = str(pick_dtype(dtype, self.device)).removeprefix("torch.")
        self._sources = {source.name: source for source in saes}
        self._cards = {source.name: read_card(source) for source in saes}
        self._sae_dtype = sae_dtype
        config = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        text = config.get_text_config()
        self._inputs = {name: parse_hook_point(card.hook_name, text) for name, card in self._cards.items()}
        self._targets = {
            name: parse_hook_point(card.hook_name_out, text)
            for name, card in self._cards.items()
            if card.hook_name_out is not None
        }
        deepest = max(point.layer for point in (*self._inputs.values(), *self._targets.values()))
        self._bos = bos_token(model, revision, prepend_bos, self._cards)
        whole: Any = load_language_model(
            transformers.AutoModel,
            model,
            revision,
            pick_dtype(dtype, self.device),
            self.device,
            quantization,
            config=cut_layers(config, deepest + 1),
            **_given(attn_implementation=attn_implementation, device_map=device_map),
        )
        self._model = getattr(whole, "language_model", whole)
        self._input_device = self._model.get_input_embeddings().weight.device
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._side: torch.cuda.Stream | None = None
        if self._input_device.type == "cuda" and device_map is None:
            self._side = torch.cuda.Stream(self._input_device)
        # TransformerLens centres writing weights for LayerNorm alone, which does not see the mean; RMSNorm would.
        self._centrable = any(isinstance(module, torch.nn.LayerNorm) for module in self._model.modules())
        self._encoders = {
            source.name: Encoder(load_sae(source, dtype=sae_dtype), features[source.name]).to(
                self._device_of(self._inputs[source.name])
            )
            for source in saes
        }
        if compile_layers:
            self._compile_layers()

    def _device_of(self, point: HookPoint) -> torch.device:
        parameter = next(self._model.get_submodule(".".join(point.module.split(".")[:2])).parameters(), None)
        return self._input_device if parameter is None else parameter.device

    def _compile_layers(self) -> None:
        read_inside = {point.layer for point in self._inputs.values() if point.module.count(".") > 1}
        layers = self._model.get_submodule(next(iter(self._inputs.values())).module.split(".")[0])
        for number, layer in enumerate(layers):
            if number not in read_inside:
                # The forward alone: hooks stay outside, where they may end the pass.
                layer.forward = torch.compile(layer.forward)

    def _with_bos(self, token_ids: Int[torch.Tensor, "batch seq"]) -> Int[torch.Tensor, "batch bos+seq"]:
        if self._input_device.type == "cuda":
            token_ids = token_ids.pin_memory()
        ids = token_ids.to(self._input_device, non_blocking=True)
        return ids if self._bos is None else torch.nn.functional.pad(ids, (1, 0), value=self._bos)

    def _run(
        self,
        ids: Int[torch.Tensor, "batch new"],
        points: Iterable[HookPoint],
        cache: transformers.DynamicCache | None = None,
        place: int = 0,
    ) -> dict[HookPoint, torch.Tensor]:
        """What stands at the hook points; the pass ends when all of them are seen. `place` is that of the first id."""
        wanted, captured = set(points), {}
        # A model would infer the place from the cache, which is empty where the pass ends before the first attention.
        positions = torch.arange(place, place + ids.shape[1], device=ids.device)[None] if place else None
        handles = [self._capture(point, captured, len(wanted)) for point in wanted]
        try:
            self._model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=cache is not None,
                **_given(position_ids=positions if self._takes_positions else None),
            )
        except _AllCaptured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def _capture(self, point: HookPoint, into: dict[HookPoint, torch.Tensor], total: int) -> Any:
        module = self._model.get_submodule(point.module)

        def keep(tensor: Any) -> None:
            tensor = tensor[0] if isinstance(tensor, tuple) else tensor
            into[point] = normalized(module, tensor) if point.kind == "normalized" else tensor
            if len(into) == total:
                raise _AllCaptured

        if point.kind == "output":
            return module.register_forward_hook(lambda _module, _args, output: keep(output))
        return module.register_forward_pre_hook(
            lambda _module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    def _as_trained(self, name: str, point: HookPoint, state: torch.Tensor) -> torch.Tensor:
        """In float32 where its encoder is, and centred where the SAE was trained on centred weights."""
        state = state.to(self._encoders[name].device, torch.float32)
        centre = self._cards[name].centred and self._centrable and point.residual
        return state - state.mean(-1, keepdim=True) if centre else state

    @torch.inference_mode()
    def hidden_states(
        self, token_ids: Int[torch.Tensor, "batch seq"]
    ) -> dict[str, Float[torch.Tensor, "batch seq d_in"]]:
        """What each SAE reads, in float32, at every text token."""
        states = self._run(self._with_bos(token_ids), self._inputs.values())
        first = 0 if self._bos is None else 1
        return {name: self._as_trained(name, point, states[point])[:, first:] for name, point in self._inputs.items()}

    @torch.inference_mode()
    def activations(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        """Activations of the requested features, dense."""
        return {name: self._encoders[name](state) for name, state in self.hidden_states(token_ids).items()}

    def stream(self, batches: Iterable[Int[torch.Tensor, "batch seq"]]) -> Iterator[dict[str, SparseActivations]]:
        """As `Subject.stream`; on one GPU a batch is encoded and copied while the next one runs through the model."""
        side = self._side
        if side is None:
            for batch in batches:
                yield self._encode(self.hidden_states(batch))
            return
        waiting: tuple[dict[str, torch.Tensor], torch.cuda.Event] | None = None
        for batch in batches:
            states, ready = self.hidden_states(batch), torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._input_device))
            if waiting is not None:
                yield self._encode_on(side, *waiting)
            waiting = states, ready
        if waiting is not None:
            yield self._encode_on(side, *waiting)

    @torch.inference_mode()
    def _encode(self, states: dict[str, torch.Tensor]) -> dict[str, SparseActivations]:
        return {name: sparsify(self._encoders[name](state), state.norm(dim=-1)) for name, state in states.items()}

    def _encode_on(
        self, stream: torch.cuda.Stream, states: dict[str, torch.Tensor], ready: torch.cuda.Event
    ) -> dict[str, SparseActivations]:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for state in states.values():
                state.record_stream(stream)  # or its memory would be given to the pass that runs meanwhile
            return self._encode(states)

    @torch.inference_mode()
    def check(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, SubjectCheck]:
        """Loads each whole SAE once more, one at a time, and reconstructs what it reads."""
        points = {*self._inputs.values(), *self._targets.values()}
        states = self._run(self._with_bos(token_ids), points)
        first = 0 if self._bos is None else 1
        checks = {}
        for name, source in self._sources.items():
            point, target = self._inputs[name], self._targets.get(name)
            hidden = self._as_trained(name, point, states[point])[:, first:]
            share = None
            if target is not None:
                sae = load_sae(source, str(hidden.device), self._sae_dtype)
                share = variance_unexplained(sae, hidden, self._as_trained(name, target, states[target])[:, first:])
            checks[name] = SubjectCheck(share, float(hidden.norm(dim=-1).median()))
        return checks

    @torch.inference_mode()
    def holistic(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        """As `Subject.holistic`: what stands before the token is kept, keys and values included; what stands after it
        is computed again, one place further left."""
        ids, first = self._with_bos(token_ids), 0 if self._bos is None else 1
        num_tokens = token_ids.shape[1]
        cache = transformers.DynamicCache()
        whole = self._encode_dense(self._run(ids, self._inputs.values(), cache))
        # A layer that ends the pass before its attention has no keys.
        keys_values = [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None]  # type: ignore[union-attr]
        before = {name: acts[:, first:].cumsum(1) - acts[:, first:] for name, acts in whole.items()}
        falls = {name: acts[:, first:].mean(1, keepdim=True).repeat(1, num_tokens, 1) for name, acts in whole.items()}
        for token in range(num_tokens):
            place, after = first + token, ids[:, first + token + 1 :]
            sums = {name: prefix[:, token] for name, prefix in before.items()}
            if after.shape[1]:
                prefix = [(k[:, :, :place], v[:, :, :place]) for k, v in keys_values] if place else []  # type: ignore
                states = self._run(after, self._inputs.values(), transformers.DynamicCache(prefix), place)
                sums = {name: sums[name] + acts.sum(1) for name, acts in self._encode_dense(states).items()}
            for name, total in sums.items():
                falls[name][:, token] -= total / (num_tokens - 1)
        return {name: fall.cpu() for name, fall in falls.items()}

    def _encode_dense(self, states: dict[HookPoint, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: self._encoders[name](self._as_trained(name, point, states[point]))
            for name, point in self._inputs.items()
        }


def _given(**options: Any) -> dict[str, Any]:
    """The options that are set."""
    return {name: value for name, value in options.items() if value is not None}


def bos_token(model: str, revision: str | None, prepend_bos: bool | str, cards: dict[str, SaeCard]) -> int | None:
    """The token to put in front of every sequence, or None.

    Raises:
        UserError: the SAEs disagree about it, or the tokenizer has none.
    """
    if prepend_bos == "auto":
        wanted = {card.prepend_bos for card in cards.values()}
        if len(wanted) > 1:
            raise UserError("subject.prepend_bos is 'auto', but the SAEs disagree about BOS; set it to true or false")
        prepend_bos = wanted.pop()
    if not prepend_bos:
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    token = tokenizer.bos_token_id
    if token is None:
        raise UserError(f"subject.prepend_bos is true, but the tokenizer of {model!r} has no BOS; set it to false")
    return int(token)
