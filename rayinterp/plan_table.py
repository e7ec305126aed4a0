"""A plan for people and for programs: a table in the terminal, or JSON; how numbers of all sizes are written."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayinterp.config import RunConfig
from rayinterp.plan import StagePlan, total

MIN_WIDTH = 100
"""Columns that the table takes; a terminal that is narrower wraps its lines rather than lose their ends."""
UNKNOWN = "unknown"


def short(value: float | None, unit: str = "") -> str:
    """Three figures and a prefix: `3.17 M`, `59.3 P`."""
    if value is None:
        return UNKNOWN
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    place = 0
    while abs(value) >= 999.5 and place < len(prefixes) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {prefixes[place]}{unit}".strip()


def duration(seconds: float | None) -> str:
    """`45 s`, `1.8 min`, `12 min`, `3.4 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.{1 if seconds < 597 else 0}f} min"
    return f"{seconds / 3600:,.1f} h"


def gpu_hours(hours: float | None) -> str:
    return UNKNOWN if hours is None else f"{hours:.2f}" if hours else "0"


def dollars(usd: float | None) -> str:
    return UNKNOWN if usd is None else f"{usd:,.2f}" if usd else "0"


COLUMNS: dict[str, tuple[str, Any]] = {
    "num_tokens": ("model\ntokens", short),
    "flops": ("FLOPs", short),
    "num_pairs": ("pairs", short),
    "llm_calls": ("LLM\ncalls", short),
    "llm_tokens": ("LLM\ntokens", short),
    "seconds": ("time", duration),
    "gpu_hours": ("GPU-hours", gpu_hours),
    "num_bytes": ("disk", lambda value: short(value, "B")),
    "usd": ("dollars", dollars),
}
"""Heading and form of every column."""


def show_plan(config: RunConfig, planned: list[StagePlan], said: list[str], console: Console) -> None:
    """Draws the stages, their total, and what was assumed."""
    console.width = max(console.width, MIN_WIDTH)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("stage")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in planned:
        table.add_row(plan.stage, *(_cell(plan, column) for column in COLUMNS))
    table.add_section()
    table.add_row(Text("total", "bold"), *(Text(_total(planned, column), "bold") for column in COLUMNS))
    console.print(f"[bold]{config.name}[/bold]: what a run from nothing should take; nothing has been started")
    console.print(table)
    for line in beyond_budget(config, planned):
        console.print(Text(line, "yellow"), soft_wrap=True)
    console.print("\nAssumed (docs/plan.md has the sources):")
    for line in said:
        console.print(Text(f"- {line}"), soft_wrap=True)


def _cell(plan: StagePlan, column: str) -> Text:
    value = getattr(plan, column)
    return Text(COLUMNS[column][1](value), "yellow" if value is None else "" if value else "dim")


def _total(planned: list[StagePlan], column: str) -> str:
    """The sum, or that it is more than the sum of what is known."""
    form, known = COLUMNS[column][1], [getattr(plan, column) for plan in planned]
    at_least = sum(value for value in known if value is not None)
    if None not in known:
        return form(at_least)
    return f"> {form(at_least)}" if at_least else UNKNOWN


def beyond_budget(config: RunConfig, planned: list[StagePlan]) -> list[str]:
    """Limits of the budget that the plan does not keep, as far as it is known."""
    budget, sums = config.budget, total(planned)
    hours = None if sums.seconds is None else sums.seconds / 3600
    limits = [
        ("max_usd", budget.max_usd, sums.usd),
        ("max_gpu_hours", budget.max_gpu_hours, sums.gpu_hours),
        ("max_hours", budget.max_hours, hours),
    ]
    return [
        f"budget.{field} is {limit:g}, the plan comes to {planned_:.3g}: the run would stop on the way"
        for field, limit, planned_ in limits
        if limit is not None and planned_ is not None and planned_ > limit
    ]


def plan_as_json(config: RunConfig, planned: list[StagePlan], said: list[str]) -> str:
    """The same for programs; unknown is null."""
    content = {
        "name": config.name,
        "stages": [plan._asdict() for plan in planned],
        "total": total(planned)._asdict(),
        "beyond_budget": beyond_budget(config, planned),
        "assumptions": said,
    }
    return json.dumps(content, indent=2)
