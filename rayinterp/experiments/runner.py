"""Runs an experiment: its arms through the stages, then table, figures and page.

config_for -> stages up to score (what another experiment has done is there) -> panels -> `experiments`, figures, page
"""

from __future__ import annotations

from typing import NamedTuple

import fsspec

from rayinterp.config import RunConfig
from rayinterp.experiments.design import EXPERIMENTS
from rayinterp.experiments.figures import draw, render, save
from rayinterp.experiments.page import part, render_page
from rayinterp.experiments.results import PANELS, read_outcome, result_rows
from rayinterp.report import write_report
from rayinterp.tables import Tables

FOLDER = "experiments"
"""Where figures and pages lie in the run directory."""


class Written(NamedTuple):
    """What an experiment leaves for people."""

    page: str
    figures: list[str]


def write_experiment(name: str, config: RunConfig, tables: Tables) -> Written:
    """Table, figures, page, and a link in the report; done again, it replaces what was there.

    Args:
        config: From `config_for`; its stages have run.
    """
    experiment = EXPERIMENTS[name]
    folder = f"{tables.root.rstrip('/')}/{FOLDER}"
    rows, parts, figures = [], [], []
    for number, simulator in enumerate(config.score.simulators):
        outcome = read_outcome(config, tables, simulator)
        if not outcome.book:
            continue
        panels = PANELS[name](outcome, tables)
        rows += result_rows(name, outcome, panels)
        figure = draw(f"{experiment.title} · {config.name}", panels)
        figures += save(figure, f"{folder}/{name}" + (f"-{simulator}" if number else ""))
        parts.append(part(outcome.simulator, panels, render(figure, "svg")))
    if tables.exists("experiments"):
        tables.delete("experiments", f"experiment = '{name}'")
    tables.append("experiments", rows)
    page = f"{folder}/{name}.html"
    with fsspec.open(page, "w", encoding="utf-8", auto_mkdir=True) as file:
        names = [path.rpartition("/")[2] for path in figures]
        file.write(render_page(experiment, config, parts, names))  # type: ignore[attr-defined]
    write_report(tables, config)
    return Written(page, figures)
