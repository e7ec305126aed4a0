"""One Ray session, and one finished run of the planted subject, for all tests."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoConfig

from rayinterp.config import RunConfig, load_config
from rayinterp.run import STAGES, Run, open_run, run_stage
from rayinterp.saes import SaeSource
from rayinterp.subject import LanguageModelSubject
from rayinterp.tables import SCHEMAS, Tables

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs and no dashboard."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _system_config={"metrics_report_interval_ms": 1000},  # the tests' stages are shorter than the usual ten seconds
    )
    yield
    from ray import serve

    serve.shutdown()
    ray.shutdown()


@pytest.fixture(autouse=True, scope="module")
def no_services_left() -> Iterator[None]:
    """Services outlive stages, each with a share of the two CPUs: beside eleven of them an actor waits for ever."""
    yield
    if ray.is_initialized():
        from ray import serve

        for app in serve.status().applications:
            serve.delete(app)


def planted_config(run_dir: Path, *overrides: str) -> RunConfig:
    """configs/planted.yaml in another directory."""
    return load_config(CONFIGS / "planted.yaml", [f"run_dir={run_dir}", *overrides])


def run_all(config: RunConfig, stages: Sequence[str] = STAGES) -> Run:
    """Stages in order, in this process's Ray session."""
    run = open_run(config)
    for stage in stages:
        run_stage(run, stage)
    return run


@pytest.fixture
def make_subject(tmp_path: Path) -> Callable[..., LanguageModelSubject]:
    """Builds a subject from a model folder and a small random SAE that reads one hook point, without BOS."""

    def make(folder: Path | str, hook_name: str, d_sae: int = 24, **metadata: Any) -> LanguageModelSubject:
        config = AutoConfig.from_pretrained(folder)
        d_in = width_of(hook_name, config.get_text_config())
        torch.manual_seed(1)
        cfg = StandardSAEConfig(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(hook_name=hook_name, prepend_bos=False))
        path = tmp_path / f"sae-{len(list(tmp_path.iterdir()))}"
        sae = StandardSAE(cfg)
        for key, value in metadata.items():
            sae.cfg.metadata[key] = value
        sae.save_model(path)
        return LanguageModelSubject(str(folder), [SaeSource("a", None, str(path))], {"a": list(range(d_sae))})

    return make


def width_of(hook_name: str, config: Any) -> int:
    """Width of a hook point of a small model."""
    if hook_name.endswith("hook_z"):
        return config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 4)
    return config.hidden_size


UPSTREAM_TABLES = (
    "sequences", "corpus_files", "activations", "features", "saes", "embeddings", "records", "record_counts",
    "holistic",
)  # fmt: skip
"""What later stages read and never write."""


def copy_upstream(run: Run, folder: Path) -> Path:
    """A run directory that has come as far as its records."""
    shutil.copytree(run.config.run_dir, folder)
    tables = Tables(str(folder))
    for name in set(SCHEMAS) - set(UPSTREAM_TABLES):
        tables.drop(name)
    return folder


@pytest.fixture(scope="session")
def planted_run(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The planted subject, from corpus to report. Tests read it and leave it as it is."""
    return run_all(planted_config(tmp_path_factory.mktemp("planted") / "run"))
