"""The report of a small run written by hand: every number in it can be worked out from SCORES."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayinterp.config import RunConfig, arm_id, parse_config, scorer_id
from rayinterp.errors import UserError
from rayinterp.report import Summary, fixed, index_rows, pair_table, panels, summarise, write_report
from rayinterp.report_cards import (
    Card,
    Cards,
    complexity_line,
    natural_key,
    read_run,
    shade,
    spans,
    tree_order,
    visible,
)
from rayinterp.report_data import (
    Cost,
    Order,
    Score,
    ScoreBook,
    ScoreKey,
    arm_labels,
    arm_summaries,
    cascade_summaries,
    comparisons,
    cost_rows,
    is_wide,
    order_of,
    score_book,
    scorer_summaries,
    winning_node,
)
from rayinterp.score import Interval
from rayinterp.tables import SCHEMAS, Tables
from rayinterp.usage import Spent, update_manifest

HOSTILE = "<script>alert('token')</script>"
SOURCE = "similar_negative"
SCORES: dict[tuple[str, str, str], dict[str, float | None]] = {
    ("tree", "", "late"): {"layer_9/1": 0.8, "layer_9/2": 0.6, "layer_9/3": None, "layer_9/4": 0.4},
    ("lexical", "", "late"): {"layer_9/1": 0.5, "layer_9/2": None, "layer_9/3": 0.9, "layer_9/4": 0.3},
    ("tree", "", "llm"): {"layer_9/1": 0.7, "layer_9/2": 0.6, "layer_9/4": 0.1},
    ("tree", "shuffled", "late"): {"layer_9/1": 0.1, "layer_9/2": 0.2, "layer_9/3": 0.3, "layer_9/4": None},
    ("", "token_lookup", "late"): {f"layer_9/{n}": x for n, x in [(1, 0.9), (2, 0.7), (3, 0.5), (4, 0.5), (9, 0.0)]},
    ("", "null", "late"): dict.fromkeys(["layer_9/1", "layer_9/2", "layer_9/3", "layer_9/4"]),
}
"""Correlations by (explainer, control, simulator) and feature; None is undefined."""


def small_config(run_dir: str) -> RunConfig:
    return parse_config(
        {
            "name": "a run",
            "run_dir": run_dir,
            "seed": 3,
            "subject": {"model": "planted", "saes": {"sae_id": "planted", "layers": [9]}},
            "corpus": {"dataset": "planted"},
            "records": {"complementary": [SOURCE]},
            "llms": {"writer": {"provider": "openai", "model": "gpt"}},
            "simulators": {"late": {"engine": "late_interaction"}, "llm": {"engine": "transformers", "model": "m"}},
            "explainers": {
                "lexical": {"method": "lexical", "simulator": "late"},
                "tree": {"method": "tree", "llm": "writer", "simulator": "late"},
            },
            "score": {"simulators": ["late", "llm"], "num_bootstrap": 50},
        }
    )


def arm(config: RunConfig, name: str) -> str:
    return arm_id(name, (config.explainers | config.simulators)[name]) if name else ""


def identity(key: str) -> dict[str, Any]:
    sae, _, feature = key.partition("/")
    return {"feature_key": key, "sae": sae, "feature": int(feature)}


def said(words: str) -> str:
    return json.dumps([{"activates_on": words, "strength": 5}])


def write_run(tables: Tables, config: RunConfig) -> None:
    """Four live features with scores, one live without records, one dead."""
    tree, late = arm(config, "tree"), arm(config, "late")
    live = [f"layer_9/{number}" for number in (1, 2, 3, 4, 9)]
    stats = {"num_sequences": 50, "density": 0.01, "max_activation": 10.0, "mean_activation": 2.0, "status": "live"}
    dead = {"num_sequences": 0, "density": 0.0, "max_activation": None, "status": "dead"}
    tables.append("features", [{**identity(key), **stats} for key in live] + [{**identity("layer_10/7"), **dead}])
    tables.append(
        "record_counts",
        [
            {**identity(key), "split": "test", "source": source, "requested": 2, "found": found, "status": status}
            for source in ("positive", SOURCE)
            for key, found, status in [("layer_9/1", 2, "ok"), ("layer_9/9", 0, "short"), ("layer_10/7", 0, "dead")]
        ],
    )
    explained = {"simulator": late, "explanation": said(f"words {HOSTILE}"), "status": "ok", "num_candidates": 3}
    tables.append(
        "explanations",
        [{**identity(key), **explained, "explainer": arm(config, e)} for e in ("tree", "lexical") for key in live[:4]]
        + [{**identity("layer_9/9"), "explainer": tree, "simulator": late, "status": "no_records"}],
    )
    node = {"feature_key": "layer_9/1", "explainer": tree, "simulator": late, "status": "ok", "valid_score": 0.1}
    tables.append(
        "candidates",
        [
            {**node, "node": 0, "kind": "llm", "explanation": said("first guess"), "thought": HOSTILE},
            {**node, "node": 1, "parent": 0, "kind": "revision", "explanation": said(f"words {HOSTILE}")},
            {**node, "node": 2, "kind": "llm", "status": "parse_error", "valid_score": None, "thought": "no list"},
        ],
    )
    tables.append("scores", score_rows(config))
    measures = {("", "num_rules"): (1.0, 3.0), ("", "num_words"): (4.0, 6.0), (late, "rule_overlap"): (0.25, None)}
    tables.append(
        "complexity",
        [
            {**identity(key), "explainer": tree, "simulator": simulator, "measure": measure, "value": value}
            | {"status": "one_rule" if value is None else "ok"}
            for (simulator, measure), values in measures.items()
            for key, value in zip(live[:2], values, strict=True)
        ],
    )
    tokens, length = [" years", " ago", "\n", HOSTILE, "\t", "{{ 7 * 7 }}"], 6
    tables.append(
        "records",
        [
            {**identity("layer_9/1"), "split": split, "source": source, "rank": rank, "sequence_id": 10 * n + rank}
            | {"tokens": tokens, "activations": [0, peak, 0, peak / 10, 0, 0]}
            for rank in range(2)
            for n, (split, source, peak) in enumerate([("test", "positive", 8.0), ("test", SOURCE, 0.0)])
        ]
        + [
            {**identity("layer_9/1"), "split": "train", "source": "positive", "rank": 0, "sequence_id": 99}
            | {"tokens": [" TRAIN-ONLY"] * length, "activations": [1.0] * length}
        ],
    )
    tables.append(
        "test_records",
        [{**identity("layer_9/2"), "rank": 0, "sequence_id": 7, "tokens": [" silent"], "activations": [0.0]}],
    )
    prediction = {"feature_key": "layer_9/1", "explainer": tree, "simulator": late, "split": "test"}
    tables.append(
        "predictions",
        [{**prediction, "source": "positive", "sequence_id": 0, "values": [0.0, 2.5, 0.0, 5.0, 0.0, 0.0]}],
    )
    calls = [{"request_hash": str(n), "model": "gpt", "prompt_tokens": 100, "completion_tokens": 10} for n in range(3)]
    tables.append("llm_calls", [{**calls[0], "cost_usd": 0.25}, *calls[1:]])


def score_rows(config: RunConfig) -> list[dict[str, Any]]:
    return [
        {
            **identity(key),
            "explainer": arm(config, explainer),
            "control": control,
            "simulator": arm(config, simulator),
            "scorer": "correlation",
            "source": SOURCE,
            "split": "test",
            "value": value,
            "ci_low": None if value is None else value - 0.1,
            "ci_high": None if value is None else value + 0.1,
            "num_records": 4,
            # A constant prediction makes no false positive and misses everything.
            "false_positives_per_sequence": 0.0 if value is None else 0.5,
            "false_negatives_per_sequence": 9.0 if value is None else 1.25,
            "status": "constant_prediction" if value is None else "wide",
        }
        for (explainer, control, simulator), values in SCORES.items()
        for key, value in values.items()
    ]


class Page(HTMLParser):
    """What a browser would make of the report."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.cards: dict[str, str] = {}
        """Text of each card by its anchor."""
        self.rows: dict[str, list[str]] = {}
        """Cells of the main table by simulator, source and explainer."""
        self.shaded: list[tuple[str, str]] = []
        self._card = self._row = self._shade = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.links += [given[name] for name in ("src", "href", "srcset", "action", "data") if name in given]
        if given.get("class") == "card":
            self._card = given["id"]
        if tag == "tr":
            self._row = given.get("data-arm", "")
        if tag == "td" and self._row:
            self.rows.setdefault(self._row, []).append("")
        self._shade = given["class"] if tag == "b" and "class" in given else ""

    def handle_data(self, data: str) -> None:
        if self._card:
            self.cards[self._card] = self.cards.get(self._card, "") + data
        if self._row and self.rows.get(self._row):
            self.rows[self._row][-1] += data.strip("\n")
        if self._shade:
            self.shaded.append((self._shade, data))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_config(str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def tables(config: RunConfig) -> Tables:
    tables = Tables(config.run_dir)
    write_run(tables, config)
    return tables


@pytest.fixture(scope="module")
def html(tables: Tables, config: RunConfig) -> str:
    return Path(write_report(tables, config)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def book(tables: Tables) -> ScoreBook:
    return score_book(tables.read("scores"))


@pytest.fixture(scope="module")
def summary(tables: Tables, book: ScoreBook, config: RunConfig) -> Summary:
    names = ("features", "explanations", "candidates", "complexity", "llm_calls", "simulations")
    return summarise({name: tables.read(name) for name in names}, book, config)


@pytest.fixture(scope="module")
def cards(tables: Tables, book: ScoreBook, summary: Summary) -> dict[str, Card]:
    return {card.key: card for card in Cards(read_run(tables), book, summary.order)}


def test_undefined_scores_are_counted_and_not_averaged(summary: Summary, config: RunConfig) -> None:
    tree = next(row for row in summary.arms if row.key == key_of(config, "tree", "late"))
    assert tree.mean.value == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert tree.mean.n == 3
    assert dict(tree.unscored) == {"constant_prediction": 1, "no_records": 1}
    by_llm = next(row for row in summary.arms if row.key == key_of(config, "tree", "llm"))
    assert dict(by_llm.unscored) == {"not_graded": 1, "no_records": 1}


def test_an_arm_whose_every_explanation_failed_keeps_its_row(config: RunConfig) -> None:
    failed, graded = arm(config, "lexical"), arm(config, "tree")
    book = {key_of(config, "tree", "late"): {"layer_9/1": score_of(0.5)}}
    statuses = {failed: {"layer_9/1": "no_explanation"}, graded: {"layer_9/1": "ok"}}
    rows = arm_summaries(book, statuses, order_of(config, book, statuses), config)
    assert [(row.key.explainer, row.mean.value, row.unscored) for row in rows] == [
        (failed, None, (("no_explanation", 1),)),
        (graded, 0.5, ()),
    ]


def test_controls_stand_beside_their_explainer(page: Page, summary: Summary, config: RunConfig) -> None:
    tree = next(row for row in summary.arms if row.key == key_of(config, "tree", "late"))
    means = {control.control: control.mean for control in tree.controls}
    assert means["shuffled"].value == pytest.approx(0.15), "features that tree has no score on do not count"
    assert means["token_lookup"].value == pytest.approx(0.7)
    assert means["null"] == Interval(None, None, None, 0)
    wrong = {control.control: control.false_positives for control in tree.controls}
    assert (tree.false_positives.value, wrong["token_lookup"].value, wrong["null"].value) == (0.5, 0.5, 0.0)
    assert wrong["shuffled"].value == pytest.approx(1 / 3), "of two that are scored, and one that is constant"
    assert {tree.false_positives.n, tree.false_negatives.n, *(mean.n for mean in wrong.values())} == {3}

    name, value, scored, unscored, false_positives, false_negatives, lookup, shuffled, null = page.rows[
        f"{tree.key.simulator} {SOURCE} {tree.key.explainer}"
    ]
    assert name == "tree"
    assert value.startswith("0.60 [") and "wide" in value
    assert scored == "3" and "1 constant prediction" in unscored and "no records" in unscored
    assert false_positives.startswith("0.50") and false_negatives.startswith("1.25")
    assert lookup.startswith("0.70") and shuffled.startswith("0.15") and "none scored" in null

    lexical = page.rows[f"{tree.key.simulator} {SOURCE} {arm(config, 'lexical')}"]
    assert lexical[7].startswith("– none scored"), "tree's shuffled control is not lexical's"


def test_a_pair_is_compared_on_features_that_both_scored(book: ScoreBook, config: RunConfig) -> None:
    rows = comparisons(book, order_of(config, book, []), config)
    late = {(row.first, row.second): row for row in rows if row.simulator == arm(config, "late")}
    arms = late[arm(config, "lexical"), arm(config, "tree")]
    assert arms.difference.value == pytest.approx(((0.5 - 0.8) + (0.3 - 0.4)) / 2)
    assert (arms.difference.n, arms.num_first_better) == (2, 0)
    shuffled = late[arm(config, "tree"), "shuffled"]
    assert shuffled.difference.value == pytest.approx(((0.8 - 0.1) + (0.6 - 0.2)) / 2)
    assert shuffled.difference.n == 2
    assert late[arm(config, "tree"), "null"].difference == Interval(None, None, None, 0)
    assert pair_table(rows).rows[0][:2] == (arms.first, arms.second)


def test_simulators_are_compared_on_the_features_both_graded(summary: Summary, config: RunConfig) -> None:
    agreement = next(row for row in summary.agreements if row.explainer == arm(config, "tree"))
    assert agreement.correlation.n == 3
    assert agreement.correlation.value == pytest.approx(np.corrcoef([0.8, 0.6, 0.4], [0.7, 0.6, 0.1])[0, 1])


def test_the_head_says_which_records_scores_are_taken_on(html: str) -> None:
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts["Test records per feature"] == (
        "30 positive, 30 of each of similar negative, and the 10 silent ones that sound most like each explanation"
    )
    assert facts["Features"] == "6: 5 live, 1 dead"


def test_what_an_llm_failed_on_is_said_to_be_tried_again(tmp_path: Path) -> None:
    config, key = small_config(str(tmp_path)), "layer_9/1"
    tables, tree, late = Tables(config.run_dir), arm(config, "tree"), arm(config, "late")
    tables.append("features", [{**identity(key), "status": "live"}])
    tables.append("explanations", [{**identity(key), "explainer": tree, "simulator": late, "status": "llm_error"}])
    node = {"feature_key": key, "explainer": tree, "simulator": late, "kind": "llm", "status": "llm_error"}
    tables.append("candidates", [{**node, "node": 0}])
    html = Path(write_report(tables, config)).read_text()
    index, card = html[html.index('<table id="list">') :].split("<h2>Cards</h2>")
    again = "the LLM failed on it; the next run tries again"
    assert again in index and card.count(again) == 1
    assert card.count("the LLM gave no answer") == 1, "a node of a search is not tried again"
    rows = arm_summaries({}, {tree: {key: "llm_error"}}, Order((tree,), (late,), (SOURCE,)), config)
    assert [row.unscored for row in rows] == [(("llm_error", 1),)]


def test_few_features_or_a_long_interval_are_marked() -> None:
    assert not is_wide(Interval(0.5, 0.4, 0.6, 10))
    assert is_wide(Interval(0.5, 0.5, 0.5, 9))
    assert is_wide(Interval(0.5, 0.3, 0.7, 100))


def test_hostile_text_stays_text(html: str, page: Page) -> None:
    assert page.tags["script"] == 1
    assert "<script>alert" not in html
    card = page.cards["layer_9/1"]
    assert card.count(HOSTILE) >= 5, "in tokens, the explanation, the tree and the LLM's answer"
    assert "{{ 7 * 7 }}" in card
    assert "⏎" in card and "⇥" in card


def test_the_page_needs_no_network(html: str, page: Page) -> None:
    assert page.links and all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\(", html)
    assert "default-src 'none'" in html


def test_only_test_records_are_shown(page: Page) -> None:
    assert "TRAIN-ONLY" not in page.cards["layer_9/1"]


def test_true_and_simulated_share_a_scale(cards: dict[str, Card], page: Page) -> None:
    positive, silent = cards["layer_9/1"].groups
    assert (positive.source, silent.source) == ("positive", SOURCE)
    true = {span.text: span for span in positive.records[0].true if span.level}
    assert true[" ago"].value == pytest.approx(5 * 8 / 10)
    assert (true[" ago"].level, true[HOSTILE].level) == (8, 1)
    simulated = positive.records[0].simulated[0]
    assert simulated is not None
    assert [(span.text, span.level) for span in simulated if span.level] == [(" ago", 5), (HOSTILE, 10)]
    assert positive.records[1].simulated == (None,), "a record without a prediction is not shown as silent"
    assert all(span.level == 0 for span in silent.records[0].true)
    assert ("a8", " ago") in page.shaded and ("a5", " ago") in page.shaded


def test_records_that_sound_like_the_rule_are_a_source_of_their_own(cards: dict[str, Card]) -> None:
    (group,) = cards["layer_9/2"].groups
    assert (group.source, group.num_found, group.records[0].true[0].text) == ("rule_negative", 1, " silent")


def test_records_left_out_of_a_large_report_are_still_counted(
    tables: Tables, book: ScoreBook, summary: Summary
) -> None:
    capped = {card.key: card for card in Cards(read_run(tables, max_records=1), book, summary.order, max_records=1)}
    assert [(len(group.records), group.num_found) for group in capped["layer_9/1"].groups] == [(1, 2), (1, 2)]


def test_shade_grows_with_activation_and_hides_nothing(html: str) -> None:
    levels = [shade(x) for x in np.linspace(0.001, 7, 500)]
    assert levels == sorted(levels) and set(levels) == set(range(1, 11))
    assert shade(0.0) == 0 and shade(1e-6) == 1
    for kind in ("true", "sim"):
        alphas = [float(a) for a in re.findall(rf"\.{kind} \.a\d+ {{ background: rgb\([\d ]+/ ([\d.]+)\)", html)]
        assert len(alphas) == 10 and alphas == sorted(set(alphas)) and alphas[-1] <= 0.8


def test_spans_keep_every_token() -> None:
    made = spans(["a", "\n", " b", "c"], np.array([0.0, 0.0, 1.0, 0.0]))
    assert [(span.text, span.level) for span in made] == [("a⏎", 0), (" b", 2), ("c", 0)]
    assert visible("\x1b[31m\x00\x9b") == "␛[31m␀�"


def test_features_without_evidence_say_why(page: Page, cards: dict[str, Card]) -> None:
    assert "never active in the corpus" in page.cards["layer_10/7"]
    assert "test positive has 0 of 2 records" in page.cards["layer_9/9"]
    assert "no records to explain it from" in page.cards["layer_9/9"]
    assert cards["layer_9/1"].why_bare == ""
    assert cards["layer_10/7"].max_activation is None
    assert list(cards) == sorted(cards, key=natural_key) and list(cards)[-1] == "layer_10/7"


def test_the_list_gives_a_reason_in_place_of_a_score(tables: Tables, book: ScoreBook, summary: Summary) -> None:
    rows = {row.key: row for row in index_rows(read_run(tables), book, summary.order)}
    lexical, tree = rows["layer_9/2"].scores
    assert (lexical.value, lexical.status, tree.value) == (None, "constant_prediction", 0.6)
    assert [score.status for score in rows["layer_9/9"].scores] == ["not_explained", "no_records"]
    assert {score.status for score in rows["layer_10/7"].scores} == {"dead"}


def test_the_winner_is_marked_in_its_tree(page: Page, cards: dict[str, Card], summary: Summary) -> None:
    tree = cards["layer_9/1"].explanations[1]
    assert [(node.node, node.indent, node.is_winner) for node in tree.nodes] == [
        (0, 0, False),
        (1, 1, True),
        (2, 0, False),
    ]
    assert page.cards["layer_9/1"].count("★ winner") == 1
    assert summary.searches[0].winners == (("revision", 1),)
    assert dict(summary.searches[0].nodes) == {"ok": 2, "parse_error": 1}


def test_a_duplicate_does_not_take_the_prize() -> None:
    node = {"explanation": "same", "status": "ok", "valid_score": 0.5}
    nodes = [{**node, "node": 3}, {**node, "node": 1, "status": "duplicate", "valid_score": None}, {**node, "node": 2}]
    assert winning_node(nodes, "same") == 2
    assert winning_node([*nodes, {**node, "node": 5, "valid_score": 0.6}], "same") == 5
    assert winning_node(nodes, None) is None


def test_a_node_without_its_parent_is_drawn_as_a_root() -> None:
    nodes = [{"node": 4, "parent": 9}, {"node": 0, "parent": None}, {"node": 5, "parent": 4}]
    assert [(node["node"], indent) for node, indent in tree_order(nodes)] == [(0, 0), (4, 0), (5, 1)]


def test_calls_without_a_price_are_not_free(summary: Summary, page: Page) -> None:
    (bill,) = summary.bills
    assert (bill.num_calls, bill.prompt_tokens, bill.cost_usd, bill.num_unpriced) == (3, 300, 0.25, 2)


def test_the_plot_puts_a_better_mean_further_right(summary: Summary) -> None:
    late = panels(summary.arms)[0]
    own = {dot.name.partition("@")[0]: dot for dot in late.dots if dot.kind == "explanation"}
    assert own["tree"].low <= own["tree"].x <= own["tree"].high
    lookup = next(dot for dot in late.dots if dot.kind == "token_lookup")
    shuffled = next(dot for dot in late.dots if dot.kind == "shuffled")
    assert shuffled.x < own["tree"].x < lookup.x
    assert not [dot for dot in late.dots if dot.kind == "null"], "an undefined mean has no place on the axis"


def test_arms_of_one_name_keep_their_hashes() -> None:
    assert arm_labels(["a@1", "b@2", "b@3"]) == {"a@1": "a", "b@2": "b@2", "b@3": "b@3"}


def test_numbers_in_words() -> None:
    assert (fixed(None), fixed(-0.001), fixed(-0.126), fixed(0.126, 2, True)) == ("–", "0.00", "−0.13", "+0.13")


def test_a_nan_counts_as_undefined(config: RunConfig, tmp_path: Path) -> None:
    tables = Tables(str(tmp_path))
    row = next(row for row in score_rows(config) if row["value"] is not None)
    tables.append("scores", [{**row, "value": math.nan}])
    (scores,) = score_book(tables.read("scores")).values()
    assert [score.value for score in scores.values()] == [None]


def test_an_ungraded_run_has_a_report_and_an_empty_one_an_error(tmp_path: Path) -> None:
    config = small_config(str(tmp_path))
    tables = Tables(config.run_dir)
    with pytest.raises(UserError, match="no features"):
        write_report(tables, config)
    tables.append("features", [{**identity("layer_9/1"), "status": "live"}])
    page = Page(Path(write_report(tables, config)).read_text())
    assert "no explainer has run on it" in page.cards["layer_9/1"]


def key_of(config: RunConfig, explainer: str, simulator: str) -> ScoreKey:
    return ScoreKey(arm(config, simulator), SOURCE, arm(config, explainer))


def score_of(value: float) -> Score:
    return Score(value, None, None, None, None, None, "ok")


def test_what_a_cheap_first_look_spared_and_how_far_it_agrees():
    def nodes(explainer, feature, *rows):
        columns = ("status", "cascade_score", "train_score")
        return [
            {"explainer": explainer, "feature_key": feature, **dict(zip(columns, row, strict=True))} for row in rows
        ]

    rows = [
        # Nothing pruned: these two tell how far the simulators agree, 1 and -0.5.
        *nodes("tree@1", "a/1", ("ok", 0.1, 0.2), ("ok", 0.2, 0.3), ("ok", 0.3, 0.9)),
        *nodes("tree@1", "a/2", ("ok", 0.1, 0.5), ("ok", 0.2, 0.9), ("ok", 0.3, 0.1), ("parse_error", None, None)),
        *nodes(
            "tree@1",
            "a/3",
            ("pruned", 0.1, None),
            ("ok", 0.2, 0.9),
            ("pruned", 0.0, None),
            ("ok", 0.9, 0.1),
            ("undefined", None, None),
        ),
        *nodes("plain@1", "a/1", ("ok", None, 0.5)),
    ]
    table = pa.Table.from_pylist(
        [{"simulator": "s", "node": i, **row} for i, row in enumerate(rows)], SCHEMAS["candidates"]
    )
    (summary,) = cascade_summaries(table, Order(("tree@1", "plain@1"), (), ()), small_config("x"))
    assert (summary.explainer, summary.num_pruned, summary.num_simulated) == ("tree@1", 2, 9)
    assert summary.rank_correlation.n == 2
    assert summary.rank_correlation.value == pytest.approx((1 - 0.5) / 2)


def llm_calls(*costs: float | None) -> pa.Table:
    """Without a stage, as tables of before have them: those of explain."""
    return pa.table({"cost_usd": pa.array(costs, pa.float64()), "stage": pa.nulls(len(costs), pa.string())})


def test_estimate_and_actual_stand_side_by_side(tmp_path: Path) -> None:
    config = small_config(str(tmp_path))
    priced = config.model_copy(update={"budget": config.budget.model_copy(update={"usd_per_gpu_hour": 2.0})})
    estimate = {
        "harvest": {"seconds": 60.0, "gpu_hours": 1.0, "usd": 2.0, "llm_calls": 0},
        "explain": {"seconds": 100.0, "gpu_hours": 0.0, "usd": None, "llm_calls": 9},
        "score": {"seconds": 7.0, "gpu_hours": 0.0, "usd": 0.0, "llm_calls": 0},
    }
    usage = {"harvest": Spent(90.0, 1.5), "explain": Spent(50.0, 0.5)}
    rows = {row.stage: row for row in cost_rows(estimate, usage, llm_calls(0.25, None, 0.5), priced)}
    assert rows["harvest"].estimate == Cost(60, 1, 2, 0)
    assert rows["harvest"].actual == Cost(90, 1.5, 3, 0)
    assert rows["explain"].actual == Cost(50, 0.5, 1 + 0.75, 3)
    assert rows["score"].actual == Cost() and rows["corpus"] == ("corpus", Cost(), Cost())
    # Of the stages that were run; what is unknown of one is unknown of all.
    assert rows["total"].estimate == Cost(160, 1, None, 9)
    assert rows["total"].actual == Cost(140, 2, 4.75, 3)
    assert {row.stage: row for row in cost_rows(estimate, usage, llm_calls(None), config)}["explain"].actual.usd is None
    assert "total" not in {row.stage for row in cost_rows({}, {}, llm_calls(), config)}


def test_calls_of_further_scorers_are_billed_to_their_stage(tmp_path: Path) -> None:
    calls = llm_calls(0.25, 0.5, 2.0).set_column(1, "stage", pa.array([None, "explain", "score"]))
    usage = {"explain": Spent(50.0, 0.0), "score": Spent(5.0, 0.0)}
    rows = {row.stage: row.actual for row in cost_rows({}, usage, calls, small_config(str(tmp_path)))}
    assert rows["explain"] == Cost(50, 0, 0.75, 2) and rows["score"] == Cost(5, 0, 2.0, 1)


SCORERS = {"judge": {"method": "detection", "llm": "writer"}, "odd": {"method": "intruder", "llm": "writer"}}


def write_further_scores(tables: Tables, config: RunConfig) -> None:
    judge, odd = scorer_id(config, "judge"), scorer_id(config, "odd")
    row = {"split": "test", "source": SOURCE, "num_records": 9, "num_unparsed": 1, "status": "ok"}
    of_judge = {**row, "simulator": judge, "scorer": "detection"}
    tree = {**of_judge, "explainer": arm(config, "tree"), "control": ""}
    tables.append(
        "scores",
        [{**identity(f"layer_9/{n}"), **tree, "value": value} for n, value in ((1, 0.9), (2, 0.7))]
        + [{**identity("layer_9/3"), **tree, "value": None, "status": "parse_error", "num_records": 0}]
        + [
            {**identity(f"layer_9/{n}"), **of_judge, "explainer": who, "control": control, "value": value}
            for who, control, value in ((arm(config, "tree"), "shuffled", 0.6), ("", "null", 0.5))
            for n in (1, 2)
        ]
        + [
            {**identity("layer_9/1"), **row, "simulator": odd, "scorer": "intruder", "explainer": "", "control": ""}
            | {"value": 0.4, "num_unparsed": 0}
        ],
    )


def test_further_scorers_have_a_table_and_stay_out_of_the_simulators(tmp_path: Path) -> None:
    config = small_config(str(tmp_path))
    config = parse_config(
        {**config.model_dump(), "score": {**config.score.model_dump(), "num_shuffled": 1, "scorers": SCORERS}}
    )
    tables = Tables(str(tmp_path))
    write_run(tables, config)
    without = order_of(config, score_book(read_run(tables)["scores"]), [])
    write_further_scores(tables, config)
    book = score_book(read_run(tables)["scores"])
    order = order_of(config, book, [])
    assert order == without._replace(scorers=(scorer_id(config, "judge"), scorer_id(config, "odd")))
    judged, odd = scorer_summaries(book, order, config)
    assert judged.mean.value == pytest.approx(0.8) and judged.mean.n == 2 and judged.chance == 0.5
    assert judged.unscored == (("parse_error", 1),) and judged.unparsed == pytest.approx(3 / 21)
    assert judged.shuffled.value == pytest.approx(0.6) and judged.null.value == pytest.approx(0.5)
    assert (odd.key.explainer, odd.mean.value, odd.chance, odd.unparsed) == ("", 0.4, 0.2, 0.0)
    html = Path(write_report(tables, config)).read_text()
    section = html[html.index("<h2>Further scorers</h2>") :]
    section = section[: section.index("</section>") if "</section>" in section else None]
    assert html.count('class="scorer-row"') == 2 and "14.3 %" in section and "the feature itself" in section
    before = html[: html.index("<h2>Further scorers</h2>")]
    assert "judge" not in before[before.index("<section>") :]


def test_the_report_shows_what_was_spent(tmp_path: Path) -> None:
    config, tables = small_config(str(tmp_path)), Tables(str(tmp_path))
    write_run(tables, config)
    assert "not recorded" in Path(write_report(tables, config)).read_text()
    planned = {"explain": {"seconds": 7200.0, "gpu_hours": None, "usd": 1.25, "llm_calls": 1234}}
    spent = {"explain": {"seconds": 300.0, "gpu_hours": 0.75}}
    update_manifest(str(tmp_path), lambda manifest: manifest.update(estimate=planned, usage=spent))
    text = Path(write_report(tables, config)).read_text()
    (row,) = re.findall(r"<tr><td>explain</td>.*?</tr>", text, re.DOTALL)
    cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td class=\"num.*?</td>", row)]
    assert cells[:5] == ["2.0 h", "5.0 min", "– unknown", "0.75", "1.25"]
    assert cells[6] == "1,234"


def test_complexity_is_averaged_where_it_is_defined(summary: Summary, config: RunConfig) -> None:
    table, late = summary.complexity, arm(config, "late")
    assert table.columns == [("num_rules", ""), ("num_words", ""), ("rule_overlap", late)]
    ((sae, explainer, means),) = table.rows
    assert (sae, explainer) == ("layer_9", arm(config, "tree"))
    assert [(mean.value, mean.n) for mean in means] == [(2.0, 2), (5.0, 2), (0.25, 1)]


def test_a_card_says_how_complex_an_explanation_is_in_one_line(tables: Tables, config: RunConfig, page: Page) -> None:
    assert complexity_line([]) == ""
    measures = tables.read("complexity", where="feature_key = 'layer_9/1'").to_pylist()
    assert complexity_line(measures) == "rules 1, words 4; overlap 0.25 (late)"
    assert "complexity: rules 1, words 4; overlap 0.25 (late)" in page.cards["layer_9/1"]
