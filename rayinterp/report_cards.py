"""One feature on one card: what was said of it, how well that predicts it, and the records that show it.

    features, record_counts, explanations, candidates, scores, complexity, records, test_records, predictions -> Card

A card is plain values that the HTML report and the terminal draw each in their way. `CardReader` reads every table
once and hands out one feature at a time. Text stays raw here; escaping is the business of whoever draws it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayinterp.complexity import MEASURES, RATING
from rayinterp.explanation import MAX_STRENGTH, Explanation, from_json
from rayinterp.report_data import (
    CONTROLS,
    OTHER_SCORERS,
    SCORE_COLUMNS,
    Order,
    Score,
    ScoreBook,
    ScoreKey,
    number,
    reason,
    winning_node,
)
from rayinterp.tables import Tables

NUM_LEVELS = 10
"""Shades of a token, beside none at all."""

_PICTURES = {**{code: 0x2400 + code for code in range(32)}, 9: "⇥", 10: "⏎", 127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), "�")
# Marks that turn the direction of writing: what follows one is read as something else than it is.
_PICTURES |= dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


_ROWS_BY_FEATURE = (
    "record_counts",
    "explanations",
    "candidates",
    "records",
    "test_records",
    "predictions",
    "complexity",
)


class Span(NamedTuple):
    """A stretch of text of one shade: a token, or neighbouring tokens without activation."""

    text: str
    level: int
    value: float


class RecordView(NamedTuple):
    """One record, true and simulated, on the scale 0-5."""

    sequence_id: int
    true: tuple[Span, ...]
    simulated: tuple[tuple[Span, ...] | None, ...]
    """One for each of the card's `simulated_by`; None where there is no prediction."""


class RecordGroup(NamedTuple):
    source: str
    records: list[RecordView]
    num_found: int


class NodeView(NamedTuple):
    """One node of a search tree, in drawing order."""

    node: int
    indent: int
    kind: str
    rules: Explanation
    train: float | None
    valid: float | None
    status: str
    is_winner: bool
    thought: str
    feedback: str


class ScoreRow(NamedTuple):
    """Test scores of one explanation by one simulator against one source, beside its controls."""

    simulator: str
    source: str
    own: Score
    controls: tuple[tuple[str, Score | None], ...]
    others: tuple[tuple[str, Score | None], ...]


class ExplanationView(NamedTuple):
    explainer: str
    rules: Explanation
    status: str
    train: float | None
    valid: float | None
    num_candidates: int
    cost_usd: float | None
    scores: list[ScoreRow]
    complexity: str
    """Its measures on one line; empty where there are none."""
    nodes: list[NodeView]


class Card(NamedTuple):
    """Everything there is to see of one feature."""

    key: str
    status: str
    density: float | None
    max_activation: float | None
    mean_activation: float | None
    num_sequences: int | None
    why_bare: str
    """Why there are no explanations or no test records; empty where both are there."""
    counts: list[dict[str, Any]]
    explanations: list[ExplanationView]
    simulated_by: tuple[tuple[str, str], ...]
    """The (explainer, simulator) of each simulated strip."""
    groups: list[RecordGroup]


def visible(text: str) -> str:
    """Text on one line, with newlines, tabs and control characters as pictures: ⏎ ⇥ ␀. A terminal may be shown it."""
    return text.translate(_PICTURES)


def shade(activation: float) -> int:
    """Shade of an activation on the scale 0-5: 0 for exactly nothing, else 1-10, so that a weak one is never hidden."""
    return 0 if activation <= 0 else min(NUM_LEVELS, math.ceil(activation * NUM_LEVELS / MAX_STRENGTH))


def spans(tokens: list[str], activations: np.ndarray) -> tuple[Span, ...]:
    """Tokens with their shades; neighbours without activation are joined, which keeps a large report small."""
    assert len(tokens) == len(activations), f"{len(tokens)} tokens but {len(activations)} activations"
    joined: list[Span] = []
    for token, value in zip(tokens, activations.tolist(), strict=True):
        level = shade(value)
        if level == 0 and joined and joined[-1].level == 0:
            joined[-1] = Span(joined[-1].text + visible(token), 0, 0.0)
        else:
            joined.append(Span(visible(token), level, value))
    return tuple(joined)


def complexity_line(measures: Iterable[Mapping[str, Any]]) -> str:
    """Rows of `complexity` of one explanation, for people: what takes no simulator, then each simulator's."""
    by_simulator: dict[str, list[str]] = {}
    for row in sorted(measures, key=lambda row: (row["simulator"], MEASURES.index(row["measure"]))):
        value = number(row["value"])
        if value is not None:
            digits = 0 if row["measure"].startswith("num_") else 1 if row["measure"] == RATING else 2
            words = MEASURE_WORDS[row["measure"]]
            by_simulator.setdefault(row["simulator"].partition("@")[0], []).append(f"{words} {value:.{digits}f}")
    return "; ".join(f"{', '.join(said)}{f' ({name})' if name else ''}" for name, said in by_simulator.items())


MEASURE_WORDS = {
    "num_rules": "rules",
    "num_words": "words",
    "num_rules_95": "rules that will do",
    "rule_removal": "fall without a rule",
    "rule_overlap": "overlap",
    "rating": "abstractness",
}


def natural_key(feature_key: str) -> list[int | str]:
    """Sorts layer_9/47 before layer_10/2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", feature_key)]


def tree_order(nodes: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Nodes of a search with their indent, each below its parent; one whose parent is missing counts as a root."""
    numbers = {node["node"] for node in nodes}
    children: dict[int | None, list[dict[str, Any]]] = {}
    for node in sorted(nodes, key=lambda node: node["node"], reverse=True):
        children.setdefault(node["parent"] if node["parent"] in numbers else None, []).append(node)
    stack = [(node, 0) for node in children.get(None, [])]
    ordered = []
    while stack:
        node, indent = stack.pop()
        ordered.append((node, indent))
        stack += [(child, indent + 1) for child in children.get(node["node"], [])]
    return ordered


def read_run(tables: Tables, where: str | None = None, max_records: int | None = None) -> dict[str, pa.Table]:
    """What cards are made of, each table read once; `where` picks features, `max_records` caps each source."""

    def read(table: str, *filters: str | None, columns: list[str] | None = None) -> pa.Table:
        return tables.read(table, columns, " and ".join(f"({f})" for f in filters if f) or None)

    return {
        "features": read("features", where),
        "record_counts": read("record_counts", where),
        "explanations": read("explanations", where),
        "candidates": read("candidates", where),
        "scores": read("scores", "split = 'test'", where, columns=list(SCORE_COLUMNS)),
        "records": read("records", "split = 'test'", f"rank < {max_records}" if max_records else None, where),
        "test_records": read("test_records", where),
        "predictions": read("predictions", "split = 'test'", where),
        "complexity": read("complexity", where),
    }


class Cards:
    """The cards of a run, made one at a time: a thousand of them need not fit in memory together."""

    def __init__(
        self,
        data: Mapping[str, pa.Table],
        book: ScoreBook,
        order: Order,
        max_records: int | None = None,
        max_text: int | None = None,
    ) -> None:
        self._features = sorted(data["features"].to_pylist(), key=lambda row: natural_key(row["feature_key"]))
        self._rows = {name: _ByFeature(data[name]) for name in _ROWS_BY_FEATURE}
        self._book = book
        self._order = order
        self._max_records = max_records
        self._max_text = max_text

    def __len__(self) -> int:
        return len(self._features)

    def __iter__(self) -> Iterator[Card]:
        return map(self._card, self._features)

    def _card(self, feature: dict[str, Any]) -> Card:
        key = feature["feature_key"]
        counts = self._rows["record_counts"].rows(key)
        explanations = self._explanations(key)
        simulated_by, groups = self._records(key, feature["max_activation"], counts)
        return Card(
            key,
            feature["status"],
            number(feature["density"]),
            number(feature["max_activation"]),
            number(feature["mean_activation"]),
            feature["num_sequences"],
            _why_bare(feature["status"], counts, bool(explanations), bool(groups)),
            sorted(counts, key=lambda row: (("train", "valid", "test").index(row["split"]), row["source"])),
            explanations,
            simulated_by,
            groups,
        )

    def _explanations(self, key: str) -> list[ExplanationView]:
        rows = self._rows["explanations"].rows(key)
        candidates = self._rows["candidates"].rows(key)
        measures = self._rows["complexity"].rows(key)
        rows.sort(key=lambda row: self._order.explainers.index(row["explainer"]))
        return [
            ExplanationView(
                row["explainer"],
                from_json(row["explanation"]) if row["explanation"] else (),
                row["status"],
                number(row["train_score"]),
                number(row["valid_score"]),
                row["num_candidates"],
                number(row["cost_usd"]),
                self._score_rows(key, row["explainer"]),
                complexity_line(m for m in measures if m["explainer"] == row["explainer"]),
                self._nodes([n for n in candidates if _search(n) == _search(row)], row["explanation"]),
            )
            for row in rows
        ]

    def _score_rows(self, feature: str, explainer: str) -> list[ScoreRow]:
        keys = [ScoreKey(sim, source, explainer) for sim in self._order.simulators for source in self._order.sources]
        return [
            ScoreRow(
                key.simulator,
                key.source,
                own,
                tuple((control, self._book.get(key.of(control), {}).get(feature)) for control in CONTROLS),
                tuple((s, self._book.get(key._replace(scorer=s), {}).get(feature)) for s in OTHER_SCORERS),
            )
            for key in keys
            if (own := self._book.get(key, {}).get(feature))
        ]

    def _nodes(self, nodes: list[dict[str, Any]], explanation: str | None) -> list[NodeView]:
        winner = winning_node(nodes, explanation)
        return [
            NodeView(
                node["node"],
                indent,
                node["kind"],
                from_json(node["explanation"]) if node["explanation"] else (),
                number(node["train_score"]),
                number(node["valid_score"]),
                node["status"],
                node["node"] == winner,
                self._shorten(node["thought"]),
                self._shorten(node["feedback"]),
            )
            for node, indent in tree_order(nodes)
        ]

    def _records(
        self, key: str, max_activation: float | None, counts: list[dict[str, Any]]
    ) -> tuple[tuple[tuple[str, str], ...], list[RecordGroup]]:
        """Test records by source, with every simulation there is of them."""
        predictions: dict[tuple[str, str], dict[int, list[float]]] = {}
        for row in self._rows["predictions"].rows(key):
            predictions.setdefault(_search(row), {})[row["sequence_id"]] = row["values"]
        arms = [(e, s) for e in self._order.explainers for s in self._order.simulators if (e, s) in predictions]
        scale = MAX_STRENGTH / max_activation if max_activation else 0.0

        records = self._rows["records"].rows(key)
        records += [{**row, "source": "rule_negative"} for row in self._rows["test_records"].rows(key)]
        by_source: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(records, key=lambda row: row["rank"]):
            by_source.setdefault(row["source"], []).append(row)
        found = {row["source"]: row["found"] for row in counts if row["split"] == "test"}
        place = {source: index for index, source in enumerate(("positive", *self._order.sources))}
        groups = []
        for source in sorted(by_source, key=lambda source: (place.get(source, len(place)), source)):
            rows = by_source[source]
            views = [_record(row, scale, [predictions[arm] for arm in arms]) for row in rows[: self._max_records]]
            groups.append(RecordGroup(source, views, max(found.get(source, 0), len(rows))))
        return tuple(arms), groups

    def _shorten(self, text: str | None) -> str:
        text = text or ""
        if self._max_text is None or len(text) <= self._max_text:
            return text
        return f"{text[: self._max_text]} … ({len(text) - self._max_text:,} more characters in the table)"


class _ByFeature:
    """Rows of one table by feature, sorted once, so that a lookup costs only its own rows."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.sort_by("feature_key").combine_chunks()
        keys = self._table["feature_key"].to_numpy(zero_copy_only=False)
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.array([], int)
        ends = [*starts[1:], len(keys)]
        self._bounds = {keys[start]: (int(start), int(end)) for start, end in zip(starts, ends, strict=False)}

    def rows(self, key: str) -> list[dict[str, Any]]:
        start, end = self._bounds.get(key, (0, 0))
        return self._table.slice(start, end - start).to_pylist()


def _search(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["explainer"], row["simulator"]


def _record(row: dict[str, Any], scale: float, predictions: list[dict[int, list[float]]]) -> RecordView:
    simulated = (by_sequence.get(row["sequence_id"]) for by_sequence in predictions)
    return RecordView(
        row["sequence_id"],
        spans(row["tokens"], np.array(row["activations"]) * scale),
        tuple(None if values is None else spans(row["tokens"], np.array(values)) for values in simulated),
    )


def _why_bare(status: str, counts: list[dict[str, Any]], has_explanations: bool, has_records: bool) -> str:
    if has_explanations and has_records:
        return ""
    if status != "live":
        return reason(status)
    problems = [
        f"{row['split']} {row['source']} has {row['found']} of {row['requested']} records ({reason(row['status'])})"
        for row in counts
        if row["status"] != "ok"
    ]
    if problems:
        return "; ".join(problems)
    missing = [] if has_records else ["test records have not been drawn"]
    return "; ".join(missing + ([] if has_explanations else ["no explainer has run on it"]))
