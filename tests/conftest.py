"""One Ray session, and one finished run of the planted subject, for all tests."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray

from rayinterp.config import RunConfig, load_config
from rayinterp.run import STAGES, Run, open_run, run_stage
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
