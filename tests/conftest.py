"""One Ray session, and one finished run of the planted subject, for all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rayinterp.config import RunConfig, load_config
from rayinterp.run import STAGES, Run, open_run, run_stage

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs and no dashboard."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    yield
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def planted_config(run_dir: Path, *overrides: str) -> RunConfig:
    """configs/planted.yaml in another directory."""
    return load_config(CONFIGS / "planted.yaml", [f"run_dir={run_dir}", *overrides])


def run_all(config: RunConfig) -> Run:
    """Every stage, in this process's Ray session."""
    run = open_run(config)
    for stage in STAGES:
        run_stage(run, stage)
    return run


@pytest.fixture(scope="session")
def planted_run(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The planted subject, from corpus to report. Tests read it and leave it as it is."""
    return run_all(planted_config(tmp_path_factory.mktemp("planted") / "run"))
