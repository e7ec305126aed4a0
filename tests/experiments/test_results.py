"""Points, paired differences and figures from values written by hand."""

import math
from pathlib import Path

import numpy as np

from rayinterp.config import load_config
from rayinterp.experiments.design import EXPERIMENTS
from rayinterp.experiments.figures import FORMATS, draw, render, save
from rayinterp.experiments.page import part, render_page
from rayinterp.experiments.results import Outcome, Panel, by_layer, difference, point, result_rows
from rayinterp.report_data import Score, ScoreKey
from rayinterp.score import share_interval
from rayinterp.tables import KEYS

CONFIG = load_config(Path(__file__).parent.parent.parent / "configs" / "experiments" / "planted.yaml")
VALUES = {"layer_9/1": 0.5, "layer_9/2": None, "layer_10/1": 0.1, "layer_10/2": 0.3}
OUTCOME = Outcome(CONFIG, "oracle@1", {}, {}, {}, list(VALUES))


def test_a_point_averages_what_is_defined_and_counts_the_rest():
    one = point("x", VALUES, CONFIG)
    assert math.isclose(one.mean.value, 0.3) and one.mean.n == 3 and one.num_undefined == 1
    assert one.values == {"layer_10/1": 0.1, "layer_10/2": 0.3, "layer_9/1": 0.5}
    none = point("x", {"layer_9/2": None}, CONFIG)
    assert none.mean.value is None and none.mean.n == 0 and none.num_undefined == 1


def test_shares_have_a_width_where_all_are_alike():
    one = point("x", dict.fromkeys(VALUES, 1.0), CONFIG, is_share=True)
    # 1 / (1 + z^2 / n)
    assert one.mean.value == 1 and math.isclose(one.mean.high, 1)
    assert math.isclose(one.mean.low, 1 / (1 + 1.959964**2 / 4))
    assert share_interval(np.array([])).value is None
    half = share_interval(np.array([0.0, 1.0]))
    assert math.isclose(half.low + half.high, 1) and half.low > 0


def test_differences_are_paired():
    other = {"layer_9/1": 0.2, "layer_9/2": 0.2, "layer_10/2": None, "layer_11/1": 0.9}
    less = difference(VALUES, other)
    assert less == {"layer_9/1": 0.3} | dict.fromkeys(["layer_9/2", "layer_10/1", "layer_10/2", "layer_11/1"])
    assert point("x", less, CONFIG).num_undefined == 4


def test_complexity_is_of_the_features_that_were_graded():
    def score(value, num_records, status):
        return Score(value, None, None, None, None, num_records, status)

    key = ScoreKey("oracle@1", OUTCOME.sources[0], "tree@1")
    rows = {"layer_9/1": score(0.5, 60, "ok"), "layer_9/2": score(None, 60, "constant_prediction")}
    rows["layer_10/1"] = score(None, 0, "no_budget")
    rules = {("tree@1", "num_rules"): dict.fromkeys(VALUES, 2.0)}
    outcome = OUTCOME._replace(book={key: rows}, explainers={"tree": "tree@1"}, complexity=rules)
    assert outcome.measure("tree", "num_rules").keys() == {"layer_9/1", "layer_9/2"}


def test_layers_stand_in_their_order():
    panel = by_layer(OUTCOME, "Score", "correlation", {"tree": VALUES})
    assert panel.places == ["layer_9", "layer_10"]
    assert [one.mean.n for one in panel.series["tree"]] == [1, 2]


def panels():
    return [
        by_layer(OUTCOME, "Score", "correlation", {"tree": VALUES, "one_shot": {"layer_9/2": None}}),
        Panel("Empty", "rule cap", "rules", False, {"tree": [point("1", {}, CONFIG)]}),
    ]


def test_rows_have_one_key_each():
    rows = result_rows("layer_sweep", OUTCOME, panels())
    keys = [tuple(row[name] for name in KEYS["experiments"]) for row in rows]
    assert len(set(keys)) == len(keys) == 5
    undefined = [row for row in rows if row["value"] is None]
    assert len(undefined) == 3 and all(row["num_features"] == 0 for row in undefined)


def test_figures_come_in_every_format_and_the_same_again(tmp_path):
    files = save(draw("A title", panels()), str(tmp_path / "figures" / "one"))
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for kind, file in zip(FORMATS, files, strict=True):
        content = Path(file).read_bytes()
        assert content.startswith(starts[kind]) and content == render(draw("A title", panels()), kind)


def test_intervals_are_drawn_where_they_are():
    figure = draw("A title", panels())
    (axes, *_) = figure.axes
    bars = axes.containers[0]
    x, y = bars.lines[0].get_data()
    assert np.allclose(y, [0.5, 0.2]) and np.all(np.diff(x) == 1)
    (segments,) = bars.lines[2]
    ends = np.array([segment[:, 1] for segment in segments.get_segments()])
    alone, pair = panels()[0].series["tree"]
    assert alone.mean.low is None and np.allclose(ends, [[0.5, 0.5], [pair.mean.low, pair.mean.high]])
    assert "n = 1 to 2" in axes.get_xlabel()


def test_an_interval_that_ends_at_zero_is_drawn():
    values = {"layer_1/1": 0.0, "layer_1/2": 0.2, "layer_1/3": 0.0}
    panel = Panel("Zero", "x", "y", False, {"tree": [point("a", values, CONFIG)]})
    assert panel.series["tree"][0].mean.low == 0
    (segments,) = draw("A title", [panel]).axes[0].containers[0].lines[2]
    assert segments.get_segments()[0][:, 1].min() == 0


def test_every_number_of_a_page_leads_to_cards():
    html = render_page(EXPERIMENTS["layer_sweep"], CONFIG, [part("oracle@1", panels(), b"<svg/>")], ["layer_sweep.png"])
    assert '<a href="#0-0-layer_10-tree">' in html and 'id="0-0-layer_10-tree"' in html
    assert '<a href="../report.html#layer_10/2">layer_10/2</a> 0.30' in html
    assert html.count('<a href="#') == html.count("<h4 id=") == 2
