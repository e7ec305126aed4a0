"""How large the models of a run are, without loading one: from their configs, the SAEs' cards, or what the user says.

    config, --params -> configs (installed packages, folders, the hub's cache, the hub) -> Sizes, for `plan_run`

What cannot be reached is unknown and named in a note; a number of parameters may be given in its place.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayinterp import embedded, planted
from rayinterp.config import (
    PLANTED,
    FeatureRange,
    LateInteractionConfig,
    LLMSimulatorConfig,
    RunConfig,
    judges_used,
    llms_used,
)
from rayinterp.errors import UserError
from rayinterp.harvest import sae_sources
from rayinterp.hook_points import parse_hook_point
from rayinterp.index import embedder_path
from rayinterp.plan import UNKNOWN, ModelSize, SaeSizes, Sizes
from rayinterp.saes import PER_FEATURE, SaeCard, SaeSource, read_card
from rayinterp.subject import cut_layers

REACH_SECONDS = 3
"""What the hub may take to answer; its own client would try again for 23 s for each model."""


def measure(config: RunConfig, params: Mapping[str, float] | None = None, num_cores: int | None = None) -> Sizes:
    """Sizes of all models that a config names.

    Args:
        params: Numbers of parameters by field (`subject.model`, `simulators.<name>.model`, ...), which come first.
        num_cores: Of the cluster; this machine's where left out.

    Raises:
        UserError: `params` names no model of this config, or an embedded model's package is missing.
    """
    params, models = dict(params or {}), models_of(config)
    beyond = sorted(params.keys() - models.keys())
    if beyond:
        raise UserError(f"--params names {beyond[0]!r}; models of this config are: {', '.join(models)}")
    notes: list[str] = []
    sizes = {field: ModelSize(number) for field, number in params.items()}
    with _without_waiting(config):
        configs = {field: _load_config(name, revision) for field, (name, revision) in models.items()}
        saes, subject = _subject(config, configs.get("subject.model"), params.get("subject.model"), notes)
    if subject:
        sizes["subject.model"] = subject
    for field, model_config in configs.items():
        if field in sizes or model_config is None:
            continue
        try:
            sizes[field] = count(model_config)
        except ValueError:  # an architecture that transformers does not build by itself
            continue
    unknown = [f"{field} ({models[field][0]})" for field in models if field not in sizes]
    if unknown:
        notes.insert(
            0,
            f"unknown size, since no config can be read here: {', '.join(unknown)}; give their numbers of parameters, "
            f"e.g. --params {unknown[0].split()[0]}=9.2e9",
        )
    return Sizes(num_cores or os.cpu_count() or 1, saes, sizes, tuple(notes))


def models_of(config: RunConfig) -> dict[str, tuple[str, str | None]]:
    """(name or folder, revision) by field, of every model that the run itself runs."""
    found: dict[str, tuple[str, str | None]] = {}
    if config.subject.model not in PLANTED:
        found["subject.model"] = (config.subject.model, config.subject.revision)
    found["index.embedder"] = (config.index.embedder, None)
    for name, simulator in config.simulators.items():
        if isinstance(simulator, LLMSimulatorConfig):
            found[f"simulators.{name}.model"] = (simulator.model, simulator.revision)
        elif isinstance(simulator, LateInteractionConfig):
            found[f"simulators.{name}.embedder"] = (simulator.embedder, None)
    for name in sorted(llms_used(config) | judges_used(config)):
        if config.llms[name].provider == "local":
            found[f"llms.{name}.model"] = (config.llms[name].model, None)
    return found


def parse_params(values: list[str]) -> dict[str, float]:
    """`--params` as typed: `field=number`, or a number alone for the subject.

    Raises:
        UserError: not a number above 0.
    """
    params = {}
    for value in values:
        field, number = value.rpartition("=")[::2]
        try:
            params[field or "subject.model"] = float(number)
        except ValueError:
            params[field or "subject.model"] = UNKNOWN
        if not 0 < params[field or "subject.model"] < math.inf:
            raise UserError(
                f"--params {value!r} holds no number of parameters; write e.g. --params subject.model=9.2e9"
            )
    return params


@contextmanager
def _without_waiting(config: RunConfig) -> Iterator[None]:
    """Where the hub is needed and does not answer, its cache alone is read."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    names = [name for name, _ in models_of(config).values()]
    of_the_hub = config.subject.saes.release or any(not embedded.is_embedded(n) and not Path(n).exists() for n in names)
    if of_the_hub and not before:
        try:
            get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
        except Exception:  # its kinds of failure differ by version of the client, and all mean the same here
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_config(name: str, revision: str | None) -> Any:
    """The transformers config of a language model or sentence encoder; None where it cannot be had."""
    from transformers import AutoConfig

    path = embedder_path(name) if name == embedded.EMBEDDER else embedded.resolve(name)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def model_outline(config: Any, num_layers: int | None = None) -> Any:
    """A model's decoder or encoder without weights, as far as it will run: made in a moment, whatever its size."""
    import torch
    from transformers import AutoModel

    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config if num_layers is None else cut_layers(config, num_layers))
    return getattr(model, "language_model", model)


def count(config: Any, num_layers: int | None = None) -> ModelSize:
    """The parameters that every token meets in the first layers of a model, or all of them."""
    import torch

    outline, text = model_outline(config, num_layers), config.get_text_config()
    tables = {
        id(parameter)
        for module in outline.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    num_params = sum(parameter.numel() for parameter in outline.parameters() if id(parameter) not in tables)
    layers = num_layers or text.num_hidden_layers
    return ModelSize(num_params, text.hidden_size, layers, text.vocab_size * text.hidden_size)


def _subject(
    config: RunConfig, model_config: Any, num_params: float | None, notes: list[str]
) -> tuple[SaeSizes, ModelSize | None]:
    """The SAEs, and the subject as far as it runs for them."""
    if world := planted.WORLDS.get(config.subject.model):
        width = max(world.saes.values())
        return SaeSizes(len(sae_sources(config, len(world.saes))), _num_features(config, width), width, 0), None
    text = model_config.get_text_config() if model_config is not None else None
    num_layers = text.num_hidden_layers if text is not None else layers_of_release(config)
    if num_layers is None and isinstance(config.subject.saes.layers, str):
        layers = config.subject.saes.layers
        notes.append(
            f"unknown how many layers subject.model has, and so what subject.saes.layers = {layers!r} stands for"
        )
        return SaeSizes(), None if num_params is None else ModelSize(num_params)
    sources = sae_sources(config, num_layers or 0)
    card = _card_of(sources[-1])
    layers = config.subject.saes.layers
    depth = 1 + (max(layers) if isinstance(layers, list) else deepest(layers, num_layers or 1))
    if card is None:
        notes.append(f"the card of SAE {sources[-1].sae_id} cannot be read here: its width and its FLOPs are unknown")
        saes = SaeSizes(len(sources), len(sources) * _num_features(config, None))
    else:
        if text is not None:
            depth = parse_hook_point(card.hook_name, text).layer + 1
        each = _num_features(config, card.d_sae)
        rows = each if card.architecture in PER_FEATURE else card.d_sae
        saes = SaeSizes(len(sources), len(sources) * each, card.d_sae, len(sources) * rows * card.d_in)
    if num_params is not None:
        share = min(depth / num_layers, 1) if num_layers else 1
        notes.append(f"subject.model: {share:.0%} of --params runs, as many as its layers up to the deepest SAE")
        return saes, ModelSize(num_params * share)
    return saes, None if model_config is None else count(model_config, depth)


def deepest(layers: str, num_layers: int) -> int:
    """The deepest of `all`, `even` or `odd` layers."""
    last = num_layers - 1
    return last if layers == "all" or last % 2 == (layers == "odd") else last - 1


def _num_features(config: RunConfig, d_sae: int | None) -> float:
    """Requested features of one SAE."""
    wanted = config.subject.features
    if wanted == "all":
        return UNKNOWN if d_sae is None else d_sae
    if isinstance(wanted, FeatureRange):
        return wanted.stop - wanted.start
    return wanted if isinstance(wanted, int) else len(set(wanted))


def _card_of(source: SaeSource) -> SaeCard | None:
    try:
        return read_card(source)
    except (OSError, ValueError, KeyError, UserError):
        return None


def layers_of_release(config: RunConfig) -> int | None:
    """Layers of the subject as its SAE release knows them, from the list that sae-lens carries."""
    saes = config.subject.saes
    if saes.release is None:
        return None
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory().get(saes.release)
    if release is None:
        raise UserError(f"subject.saes.release {saes.release!r} is not known to sae-lens")
    pattern = re.escape(saes.sae_id).replace(re.escape("{layer}"), r"(\d+)")
    layers = [int(match[1]) for sae_id in release.saes_map if (match := re.fullmatch(pattern, sae_id))]
    return max(layers) + 1 if layers else None
