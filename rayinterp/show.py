"""One feature's card in the terminal: explanations, scores beside their controls, records shaded token by token.

The card is the report's own (`report_cards`), read for this feature alone. Called by `rayinterp show`.
"""

from __future__ import annotations

import difflib

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayinterp.config import RunConfig
from rayinterp.errors import UserError
from rayinterp.explanation import render
from rayinterp.feature_id import FeatureId
from rayinterp.records import load_records
from rayinterp.report import fixed, interval
from rayinterp.report_cards import NUM_LEVELS, Card, Cards, ExplanationView, RecordView, Span, read_run, spans, visible
from rayinterp.report_data import Score, arm_labels, order_of, reason, score_book
from rayinterp.sources import SPLITS
from rayinterp.tables import Tables, sql_in

_TRUE, _SIMULATED = (240, 140, 0), (50, 120, 235)
"""Full shade of true and simulated activations."""


def show_feature(tables: Tables, config: RunConfig, feature: str, console: Console, max_records: int = 5) -> None:
    """Draws the card of one feature, with up to `max_records` test records per source.

    Raises:
        UserError: the feature was not harvested; names the nearest that were.
    """
    key = str(FeatureId.parse(feature))
    data = read_run(tables, sql_in("feature_key", [key]), max_records)
    if data["features"].num_rows == 0:
        raise UserError(_unknown(tables, key))
    book = score_book(data["scores"])
    order = order_of(config, book, data["explanations"]["explainer"].to_pylist())
    labels = arm_labels(order.explainers) | arm_labels(order.simulators)
    for card in Cards(data, book, order, max_records):
        _draw(card, labels, console)


def show_records(tables: Tables, feature: str, console: Console, max_records: int = 10) -> None:
    """Draws a feature's records of every split and source, best first, shaded by true activation."""
    key = str(FeatureId.parse(feature))
    if tables.count("features", sql_in("feature_key", [key])) == 0:
        raise UserError(_unknown(tables, key))
    by_split = load_records(tables, FeatureId.parse(feature), SPLITS)
    for split, records in by_split.items():
        for source in dict.fromkeys(record.source for record in records):
            group = [record for record in records if record.source == source]
            console.print(Text(f"{split}, {source.replace('_', ' ')}: {len(group)}", "bold"))
            for record in group[:max_records]:
                strip = shaded(spans(list(record.sequence.tokens), record.activations), _TRUE)
                console.print(Text.assemble("  ", strip))
    if not any(by_split.values()):
        why_not(tables, feature, console)


REASONS = {
    "ok": "all that were asked for",
    "short": "the split has no more of them",
    "dead": "the feature is active nowhere in the corpus",
    "too_few": "the feature is active in fewer train sequences than harvest.min_sequences",
    "dense": "the feature is active at a larger share of tokens than harvest.max_density",
}
"""What a status of `record_counts` means."""


def why_not(tables: Tables, feature: str, console: Console) -> None:
    """Says how many records of each split and source a feature has, and why it has no more.

    Raises:
        UserError: the feature was not harvested, or records have not been chosen yet.
    """
    key = str(FeatureId.parse(feature))
    where = sql_in("feature_key", [key])
    statistics = tables.read("features", ["status", "num_sequences", "density"], where).to_pylist()
    if not statistics:
        raise UserError(_unknown(tables, key))
    rows = tables.read("record_counts", where=where).to_pylist()
    if not rows:
        raise UserError(f"feature {key!r} has no records yet: run the stage records first")
    (row,) = statistics
    sequences, density = row["num_sequences"], 100 * row["density"]
    console.print(
        Text.assemble((key, "bold"), f"  {row['status']}: {sequences:,} sequences, {density:.3g} % of tokens")
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("split", "source", "found", "asked for", "because"):
        table.add_column(title)
    for count in rows:
        because = REASONS.get(count["status"], count["status"])
        source = count["source"].replace("_", " ")
        table.add_row(count["split"], source, str(count["found"]), str(count["requested"]), because)
    console.print(table)


def shaded(tokens: tuple[Span, ...], colour: tuple[int, int, int]) -> Text:
    """Tokens on a background that grows stronger with their activation; black on colour, so it reads on any theme."""
    text = Text()
    for span in tokens:
        if span.level == 0:
            text.append(span.text)
        else:
            mixed = [round(255 + (full - 255) * (0.1 + 0.9 * span.level / NUM_LEVELS)) for full in colour]
            text.append(span.text, f"black on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}")
    return text


def _unknown(tables: Tables, key: str) -> str:
    """The message for a feature that was not harvested: the nearest by number, or the SAEs there are."""
    wanted = FeatureId.parse(key)
    known = tables.read("features", ["sae", "feature"]).to_pylist()
    if not known:
        return f"feature {key!r}: {tables.root} holds no features yet; harvest first: rayinterp run CONFIG"
    saes = sorted({row["sae"] for row in known})
    if wanted.sae not in saes:
        saes = difflib.get_close_matches(wanted.sae, saes, n=5) or saes[:5]
        return f"feature {key!r}: no SAE {wanted.sae!r} was harvested; there are {', '.join(saes)}"
    numbers = sorted((row["feature"] for row in known if row["sae"] == wanted.sae), key=lambda n: abs(n - wanted.index))
    nearest = ", ".join(str(FeatureId(wanted.sae, number)) for number in numbers[:5])
    return f"feature {key!r} was not harvested; the nearest are {nearest}"


def _draw(card: Card, labels: dict[str, str], console: Console) -> None:
    density = "–" if card.density is None else f"{fixed(100 * card.density, 3)} %"
    console.print(Text.assemble((card.key, "bold"), f"  {card.status}"))
    peak = f"largest activation {fixed(card.max_activation)}, mean when active {fixed(card.mean_activation)}"
    seen = f"active in {'–' if card.num_sequences is None else card.num_sequences} sequences"
    console.print(Text(f"density {density}, {peak}, {seen}", "dim"))
    if card.why_bare:
        console.print(Text(f"Nothing more to show: {card.why_bare}."))
    for said in card.explanations:
        console.print()
        words = visible(render(said.rules)) if said.rules else f"– {reason(said.status)}"
        console.print(Text.assemble((f"{labels[said.explainer]}: ", "bold"), words))
        found = f"train {fixed(said.train)}, valid {fixed(said.valid)}, {said.num_candidates or 0} candidates"
        winner = next((node for node in said.nodes if node.is_winner), None)
        console.print(Text(found + (f"; node {winner.node} ({winner.kind}) won" if winner else ""), "dim"))
        if said.complexity:
            console.print(Text(f"complexity: {said.complexity}", "dim"))
        if said.scores:
            console.print(_scores(said, labels))
    for group in card.groups:
        console.print()
        console.print(Text(f"{group.source.replace('_', ' ')}: {len(group.records)} of {group.num_found}", "bold"))
        for record in group.records:
            console.print(_strips(card, record, labels))


def _strips(card: Card, record: RecordView, labels: dict[str, str]) -> Table:
    """The record once as it was and once per simulation, below one another so that the tokens line up."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("  true", shaded(record.true, _TRUE))
    for (explainer, simulator), simulated in zip(card.simulated_by, record.simulated, strict=True):
        strip = Text("– not simulated", "dim") if simulated is None else shaded(simulated, _SIMULATED)
        grid.add_row(Text(f"  {labels[explainer]}, {labels[simulator]}"), strip)
    return grid


def _scores(said: ExplanationView, labels: dict[str, str]) -> Table:
    controls = [control for control, _ in said.scores[0].controls]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (
        "graded by",
        "source",
        "test correlation",
        *(c.replace("_", " ") for c in controls),
        "false pos.",
        "false neg.",
    ):
        table.add_column(title)
    for row in said.scores:
        table.add_row(
            labels[row.simulator],
            row.source.replace("_", " "),
            _cell(row.own, "bold"),
            *(_cell(score) for _, score in row.controls),
            fixed(row.own.false_positives),
            fixed(row.own.false_negatives),
        )
    return table


def _cell(score: Score | None, style: str = "") -> Text:
    if score is None:
        return Text("– not graded", "dim")
    if score.value is None:
        return Text(f"– {reason(score.status)}", "dim")
    return Text(interval(score) + (" (wide)" if score.status == "wide" else ""), style)
