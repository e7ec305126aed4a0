"""Figures of an experiment by matplotlib, without LaTeX: panels in a grid, means with 95 % intervals and their n.

Knows panels, not tables: `draw` gives a figure, `save` its PNG, SVG and PDF.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import fsspec
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rayinterp.experiments.results import Panel, Point

FORMATS = ("png", "svg", "pdf")
COLOURS = ("#2458b8", "#d97706", "#0f766e", "#b4235f", "#6d5bd0", "#667085", "#3f9b3f", "#8a5a2b")
"""Told apart also by those who see few colours; with the markers, in print."""
MARKERS = "osD^vPX*"
PANEL_SIZE = (5.2, 3.7)
"""Inches."""
MAX_COLUMNS = 2
FEW = 3
"""Features below which a point is hollow: a bootstrap of one or two says nothing about the next."""
LONG_LABELS = 40
"""Characters of all x labels of a panel from which they are written aslant."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e7ec",
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "rayinterp",
}


def draw(title: str, panels: Sequence[Panel]) -> Figure:
    """All panels of an experiment; the number of features behind their points is under each."""
    columns = min(MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure((PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        for i, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, i + 1), panel)
        names = [list(panel.series) for panel in panels]
        if names[0] and all(of_panel == names[0] for of_panel in names):  # one legend, where it covers nothing
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
        else:
            for axes in [axes for axes in figure.axes if axes.get_legend_handles_labels()[1]]:
                axes.legend(loc="best", ncols=2 if len(axes.get_legend_handles_labels()[1]) > 4 else 1)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once: every further time moves it a little
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    places = panel.places
    spread = 0.5 / max(len(panel.series), 1)
    for i, (name, points) in enumerate(panel.series.items()):
        defined = [(point, *_ends(point)) for point in points if point.mean.value is not None]
        # Side by side, or their intervals would hide one another.
        x = [places.index(point.x) + spread * (i - (len(panel.series) - 1) / 2) for point, *_ in defined]
        y = [value for _, value, *_ in defined]
        errors = np.array([[value - low, high - value] for _, value, low, high in defined]).reshape(-1, 2).T
        axes.errorbar(
            x,
            y,
            yerr=np.maximum(errors, 0),
            label=name.replace("_", " "),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            linewidth=1.1 if panel.connected else 0,
            elinewidth=1.1,
            capsize=2,
        )
        few = [j for j, (point, *_) in enumerate(defined) if point.mean.n < FEW]
        axes.plot([x[j] for j in few], [y[j] for j in few], MARKERS[i % len(MARKERS)], ms=3, color="white", zorder=5)
    axes.set_title(panel.title.replace("_", " "), loc="left")
    axes.set_ylabel(panel.y_label)
    counts = [point.mean.n for points in panel.series.values() for point in points if point.mean.n]
    said = f"n = {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "") if counts else "n = 0"
    hollow = "; hollow: fewer than 3" if counts and min(counts) < FEW else ""
    axes.set_xlabel(f"{panel.x_label}   ({said} features a point{hollow})")
    labels = [place.replace("_", " ") for place in places]
    aslant = sum(map(len, labels)) > LONG_LABELS
    axes.set_xticks(range(len(places)), labels, rotation=35 if aslant else 0, ha="right" if aslant else "center")
    axes.set_xlim(-0.6, len(places) - 0.4)
    if any(low < 0 for low in axes.get_ylim()):
        axes.axhline(0, color="#98a2b3", linewidth=0.8)


def _ends(point: Point) -> tuple[float, float, float]:
    """The mean and both ends of its interval; the mean alone where it has none."""
    mean = point.mean
    assert mean.value is not None
    return mean.value, mean.value if mean.low is None else mean.low, mean.value if mean.high is None else mean.high


def render(figure: Figure, kind: str) -> bytes:
    """The figure as a file of one format; the same bytes for the same figure."""
    file = io.BytesIO()
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=kind, dpi=160, metadata=undated)
    return file.getvalue()


def save(figure: Figure, path: str) -> list[str]:
    """Writes `path` with every format's ending; returns the files."""
    files = []
    for kind in FORMATS:
        files.append(f"{path}.{kind}")
        with fsspec.open(files[-1], "wb", auto_mkdir=True) as file:
            file.write(render(figure, kind))  # type: ignore[attr-defined]
    return files
