"""The report of a run: one HTML file that stands on its own, written from the tables and the manifest alone.

    tables -> read_run -> Summary, IndexRow, Panel (plot), CostRow and Cards -> report.html.j2 -> report.html

The template asks for no network: style, script and plots are inline. Cards are rendered one at a time into the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from rayinterp.config import RunConfig
from rayinterp.errors import UserError
from rayinterp.explanation import from_json, render
from rayinterp.plan_table import dollars, duration, gpu_hours
from rayinterp.report_cards import MEASURE_WORDS, Cards, natural_key, read_run, visible
from rayinterp.report_data import (
    CONTROLS,
    FEW_FEATURES,
    WIDE,
    Agreement,
    ArmSummary,
    CascadeSummary,
    Comparison,
    ComplexityTable,
    Order,
    Score,
    ScoreBook,
    ScoreKey,
    ScorerSummary,
    agreements,
    arm_labels,
    arm_summaries,
    cascade_summaries,
    comparisons,
    complexity_table,
    cost_rows,
    number,
    order_of,
    reason,
    score_book,
    scorer_summaries,
    winning_node,
)
from rayinterp.score import Interval
from rayinterp.tables import Tables
from rayinterp.usage import read_manifest, usage_of

REPORT = "report.html"
MAX_STRIP_TOKENS = 1_500_000
"""Shaded tokens in one report, about 40 bytes each; many features share it by showing fewer records."""
MAX_TREE_CHARACTERS = 4_000_000
"""Likewise for the LLM's answers and feedback."""


class SearchSummary(NamedTuple):
    """The searches of one explainer arm: how many features each kind of node won, and what became of all nodes."""

    explainer: str
    winners: tuple[tuple[str, int], ...]
    num_features: int
    nodes: tuple[tuple[str, int], ...]


class LlmBill(NamedTuple):
    """Calls of one model."""

    model: str
    num_calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    num_unpriced: int


class Summary(NamedTuple):
    """All that the report says above its cards."""

    order: Order
    feature_statuses: tuple[tuple[str, int], ...]
    arms: list[ArmSummary]
    scorers: list[ScorerSummary]
    comparisons: list[Comparison]
    agreements: list[Agreement]
    cascades: list[CascadeSummary]
    complexity: ComplexityTable
    searches: list[SearchSummary]
    bills: list[LlmBill]
    simulated_pairs: tuple[tuple[str, int], ...]
    """(rule, record) pairs in the memo, by simulator."""


class IndexRow(NamedTuple):
    """One line of the list of features."""

    key: str
    status: str
    density: float | None
    explanation: str
    why: str
    """Why there is no explanation."""
    scores: tuple[Score, ...]
    """By the first simulator on the first source, one for each explainer; without a value they carry the reason."""


class Dot(NamedTuple):
    """A mean and its interval, in pixels."""

    name: str
    kind: str
    """explanation, or the name of a control."""
    y: float
    x: float
    low: float
    high: float
    tooltip: str


class Panel(NamedTuple):
    """One dot plot: the explainers under one simulator and source, and their controls."""

    simulator: str
    source: str
    dots: list[Dot]
    ticks: list[tuple[float, str]]
    height: float


class PairTable(NamedTuple):
    """The paired comparisons: a line per pair of arms, a column per simulator and source."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, str, tuple[Comparison | None, ...]]]


def write_report(tables: Tables, config: RunConfig) -> str:
    """Writes `report.html` into the run directory and returns its path.

    Raises:
        UserError: the run directory holds no features yet.
    """
    num_live = tables.count("features", "status = 'live'")
    if not tables.count("features"):
        raise UserError(f"{tables.root} holds no features; harvest first: rayinterp run CONFIG")
    max_records = _share(MAX_STRIP_TOKENS, num_live * config.corpus.sequence_length * _num_strips(config), 2, 50)
    max_text = _share(MAX_TREE_CHARACTERS, num_live, 400, 6000)
    data = read_run(tables, max_records=max_records)
    data["llm_calls"] = tables.read("llm_calls", ["model", "prompt_tokens", "completion_tokens", "cost_usd", "stage"])
    data["simulations"] = tables.read("simulations", ["simulator"])

    manifest = read_manifest(tables.root)
    book = score_book(data["scores"])
    summary = summarise(data, book, config)
    page = _environment(summary.order).get_template("report.html.j2")
    pieces = page.generate(
        config=config,
        experiments=sorted(tables.distinct("experiments", "experiment")),
        num_sequences=tables.count("sequences"),
        summary=summary,
        pairs=pair_table(summary.comparisons),
        costs=cost_rows(manifest.get("estimate", {}), usage_of(manifest), data["llm_calls"], config),
        panels=panels(summary.arms),
        index=index_rows(data, book, summary.order),
        cards=Cards(data, book, summary.order, max_records, max_text),
        controls=CONTROLS,
        few_features=FEW_FEATURES,
        wide=WIDE,
    )
    path = f"{tables.root.rstrip('/')}/{REPORT}"
    with fsspec.open(path, "w", encoding="utf-8") as file:
        file.writelines(pieces)  # type: ignore[attr-defined]
    return path


def summarise(tables: Mapping[str, pa.Table], book: ScoreBook, config: RunConfig) -> Summary:
    """The summary of `features`, `explanations`, `candidates`, `complexity`, `llm_calls` and `simulations`."""
    explanations = tables["explanations"]
    statuses: dict[str, dict[str, str]] = {}
    for row in explanations.select(["explainer", "feature_key", "status"]).to_pylist():
        statuses.setdefault(row["explainer"], {})[row["feature_key"]] = row["status"]
    order = order_of(config, book, statuses)
    return Summary(
        order,
        _counts(tables["features"]["status"]),
        arm_summaries(book, statuses, order, config),
        scorer_summaries(book, order, config),
        comparisons(book, order, config),
        agreements(book, order),
        cascade_summaries(tables["candidates"], order, config),
        complexity_table(tables["complexity"], order, config),
        search_summaries(tables["candidates"], explanations, order),
        llm_bills(tables["llm_calls"]),
        _counts(tables["simulations"]["simulator"]),
    )


def search_summaries(candidates: pa.Table, explanations: pa.Table, order: Order) -> list[SearchSummary]:
    """Who won, counted over the features of each arm that left its nodes in `candidates`."""
    columns = ["explainer", "simulator", "feature_key", "node", "kind", "explanation", "status", "valid_score"]
    searches: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for node in candidates.select(columns).to_pylist():
        searches.setdefault((node["explainer"], node["simulator"], node["feature_key"]), []).append(node)
    winners = {
        (row["explainer"], row["simulator"], row["feature_key"]): row["explanation"] for row in explanations.to_pylist()
    }
    won: dict[str, Counter[str]] = {}
    statuses: dict[str, Counter[str]] = {}
    for search, nodes in searches.items():
        kinds = {node["node"]: node["kind"] for node in nodes}
        winner = winning_node(nodes, winners.get(search))
        won.setdefault(search[0], Counter())["no winner" if winner is None else kinds[winner]] += 1
        statuses.setdefault(search[0], Counter()).update(node["status"] for node in nodes)
    return [
        SearchSummary(arm, tuple(won[arm].most_common()), won[arm].total(), tuple(statuses[arm].most_common()))
        for arm in order.explainers
        if arm in won
    ]


def llm_bills(calls: pa.Table) -> list[LlmBill]:
    """Calls, tokens and dollars by model; a call without a price is counted, not taken for free."""
    sums = [(column, "sum") for column in ("prompt_tokens", "completion_tokens", "cost_usd")]
    grouped = calls.group_by("model").aggregate([([], "count_all"), ("cost_usd", "count"), *sums])
    return [
        LlmBill(
            row["model"],
            row["count_all"],
            row["prompt_tokens_sum"] or 0,
            row["completion_tokens_sum"] or 0,
            row["cost_usd_sum"] if row["cost_usd_count"] else None,
            row["count_all"] - row["cost_usd_count"],
        )
        for row in sorted(grouped.to_pylist(), key=lambda row: row["model"])
    ]


def index_rows(data: Mapping[str, pa.Table], book: ScoreBook, order: Order) -> list[IndexRow]:
    """Every feature with its first explanation and the scores that the list can be sorted by."""
    said: dict[tuple[str, str], dict[str, Any]] = {}
    for row in data["explanations"].select(["feature_key", "explainer", "explanation", "status"]).to_pylist():
        said[row["feature_key"], row["explainer"]] = row

    def line(feature: dict[str, Any]) -> IndexRow:
        key, status = feature["feature_key"], feature["status"]
        rows = [said.get((key, explainer)) for explainer in order.explainers]
        words = [render(from_json(row["explanation"])) for row in rows if row and row["explanation"]]
        missing = [status if status != "live" else row["status"] if row else "not_explained" for row in rows]
        scores = [
            book.get(ScoreKey(simulator, source, explainer), {}).get(key)
            or Score(None, None, None, None, None, None, "not_graded" if why == "ok" else why)
            for simulator in order.simulators[:1]
            for source in order.sources[:1]
            for explainer, why in zip(order.explainers, missing, strict=True)
        ]
        why = reason(missing[0] if missing else "not_explained")
        return IndexRow(key, status, number(feature["density"]), words[0] if words else "", why, tuple(scores))

    features = data["features"].select(["feature_key", "status", "density"]).to_pylist()
    return [line(row) for row in sorted(features, key=lambda row: natural_key(row["feature_key"]))]


def pair_table(comparisons: list[Comparison]) -> PairTable:
    """Explainers against one another first, then against their controls."""
    cells = {(row.first, row.second, row.simulator, row.source): row for row in comparisons}
    columns = list(dict.fromkeys((row.simulator, row.source) for row in comparisons))
    pairs = dict.fromkeys(
        (row.first, row.second) for row in sorted(comparisons, key=lambda row: row.second in CONTROLS)
    )
    return PairTable(columns, [(*pair, tuple(cells.get((*pair, *column)) for column in columns)) for pair in pairs])


def panels(arms: list[ArmSummary]) -> list[Panel]:
    """Dot plots of the means, all on one axis; the controls that every arm shares are drawn once."""
    ends = [end for arm in arms for mean in (arm.mean, *(c.mean for c in arm.controls)) for end in _ends(mean)]
    lowest = min([0.0, *ends])
    left = -0.2 * -(lowest // 0.2) if lowest < 0 else 0.0

    def x(value: float) -> float:
        return round(_PLOT_LEFT + _PLOT_WIDTH * (value - left) / (1 - left), 1)

    ticks = [(x(tick / 5), f"{tick / 5:.1f}") for tick in range(round(left * 5), 6)]
    drawn = []
    for (simulator, source), group in groupby(arms, lambda arm: (arm.key.simulator, arm.key.source)):
        rows = list(group)
        lines = [line for arm in rows for line in ((arm.key.explainer, "explanation", arm.mean), _control_line(arm, 1))]
        fullest = max(rows, key=lambda arm: arm.mean.n)
        lines += [_control_line(fullest, 0), _control_line(fullest, 2)]
        dots = []
        for name, kind, mean in lines:
            if mean.value is not None:
                low, high = _ends(mean)
                y = _ROW * (len(dots) + 1)
                dots.append(Dot(name, kind, y, x(mean.value), x(low), x(high), interval(mean)))
        drawn.append(Panel(simulator, source, dots, ticks, _ROW * (len(dots) + 1)))
    return drawn


_PLOT_LEFT, _PLOT_WIDTH, _ROW = 140, 300, 20


def _control_line(arm: ArmSummary, which: int) -> tuple[str, str, Interval]:
    control = arm.controls[which]
    return control.control, control.control, control.mean


def _ends(mean: Interval) -> tuple[float, ...]:
    """Both ends of an interval, or the value twice; nothing where there is no value."""
    if mean.value is None:
        return ()
    return (mean.value if mean.low is None else mean.low, mean.value if mean.high is None else mean.high)


def fixed(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign; a dash where it is undefined."""
    if value is None:
        return "–"
    value = round(value, digits) + 0.0  # adding zero turns -0.0 into 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(mean: Interval | Score, digits: int = 2, sign: bool = False) -> str:
    """`0.53 [0.41, 0.62]`."""
    text = fixed(mean.value, digits, sign)
    if mean.value is None or mean.low is None or mean.high is None:
        return text
    return f"{text} [{fixed(mean.low, digits, sign)}, {fixed(mean.high, digits, sign)}]"


def _environment(order: Order) -> Environment:
    environment = Environment(
        loader=PackageLoader("rayinterp", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    labels = {"": ""} | arm_labels(order.explainers) | arm_labels(order.simulators) | arm_labels(order.scorers)
    environment.filters |= {
        "arm": lambda arm: labels.get(arm, arm.partition("@")[0].replace("_", " ")),
        "dollars": dollars,
        "duration": duration,
        "fixed": fixed,
        "gpu_hours": gpu_hours,
        "interval": interval,
        "measure": MEASURE_WORDS.__getitem__,
        "reason": reason,
        "visible": visible,
    }
    return environment


def _num_strips(config: RunConfig) -> int:
    """Shaded texts per rank: each source's record, true and by every arm."""
    num_sources = 1 + len(config.records.complementary)
    return num_sources * (1 + len(config.explainers) * len(config.score.simulators))


def _share(total: int, parts: int, low: int, high: int) -> int:
    return min(max(total // max(parts, 1), low), high)


def _counts(column: pa.ChunkedArray) -> tuple[tuple[str, int], ...]:
    counts = {row["values"]: row["counts"] for row in column.value_counts().to_pylist()}
    return tuple(Counter(counts).most_common())
