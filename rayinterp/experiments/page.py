"""The page of one experiment in the report: figures, tables, and the features behind every number."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from rayinterp.config import RunConfig
from rayinterp.experiments.design import Experiment
from rayinterp.experiments.results import Panel, Point
from rayinterp.report import REPORT, fixed


class Part(NamedTuple):
    """What one simulator graded."""

    simulator: str
    panels: Sequence[Panel]
    svg: str
    """The figure in base64."""


def part(simulator: str, panels: Sequence[Panel], svg: bytes) -> Part:
    return Part(simulator, panels, base64.b64encode(svg).decode())


def render_page(experiment: Experiment, config: RunConfig, parts: Sequence[Part], files: Sequence[str]) -> str:
    """HTML that stands beside the report's in the run directory, one folder down.

    Args:
        files: Names of the figures in the same folder.
    """
    environment = Environment(
        loader=PackageLoader("rayinterp.experiments", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "plain": _plain, "place": _place, "at": _at}
    page = environment.get_template("page.html.j2")
    return page.render(experiment=experiment, config=config, parts=parts, files=files, report=REPORT)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _place(of: tuple[int, int, str, str]) -> str:
    """Anchor of the features behind one number."""
    return "-".join(str(one).replace(" ", "-") for one in of)


def _at(points: Sequence[Point], x: str) -> Point | None:
    return next((point for point in points if point.x == x), None)
