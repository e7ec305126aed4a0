"""Values against definitions written out, on answers that are given."""

import itertools

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from rayinterp.config import DetectionConfig, IntruderConfig
from rayinterp.scorers.values import Answers, Graded, chance_level, each_once, fires, rows_of, value_of
from tests.conftest import planted_config
from tests.scorers.records import FEATURE, drawn

METHODS = ("detection", "fuzzing", "surprisal", "embedding")


@pytest.fixture
def rows(tmp_path):
    config = planted_config(tmp_path, "score.num_rule_negatives=0", "score.num_bootstrap=200")

    def make(method, values, records=None):
        graded = {Graded("e@1", ""): values if isinstance(values, Answers) else Answers(tuple(values))}
        return {row["source"]: row for row in rows_of(FEATURE, "s@1", method, records or drawn(), graded, config)}

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_judge_scores_1_an_inverted_one_0(rows, method):
    truth = [float(fires(record)) for record in each_once(drawn())]
    perfect, inverted = rows(method, truth), rows(method, [1 - value for value in truth])
    assert {row["value"] for row in perfect.values()} == {1.0}
    assert {row["value"] for row in inverted.values()} == {0.0}
    # Two silent sequences were drawn by both sources.
    assert {source: row["num_records"] for source, row in perfect.items()} == {
        "similar_negative": 24,
        "random_negative": 26,
    }
    assert {row["num_unparsed"] for row in perfect.values()} == ({0} if method in METHODS[:2] else {None})
    assert {(row["scorer"], row["simulator"], row["status"]) for row in perfect.values()} == {(method, "s@1", "wide")}


@pytest.mark.parametrize("method", METHODS)
def test_a_coin_scores_one_half(rows, method):
    records = drawn(300, 300)
    coin = np.random.default_rng(0).integers(0, 2, len(each_once(records))).astype(float)
    for row in rows(method, coin.tolist(), records).values():
        assert row["ci_low"] < 0.5 < row["ci_high"] and row["ci_high"] - row["ci_low"] < 0.2
        assert row["status"] == "ok"


def test_one_answer_for_all_is_chance_however_rare_the_feature(rows):
    records = drawn(4, 40)
    for answer in (0.0, 1.0):
        assert {row["value"] for row in rows("detection", [answer] * 84, records).values()} == {0.5}


def test_balanced_accuracy_and_auroc_are_those_of_the_definitions(rows):
    generator = np.random.default_rng(1)
    records = each_once(drawn())
    active = np.array([fires(record) for record in records])
    in_source = np.array([r.source in ("positive", "similar_negative") for r in records])
    verdicts = generator.integers(0, 2, len(records)).astype(float)
    on, off = (verdicts[in_source & kind] for kind in (active, ~active))
    row = rows("detection", verdicts.tolist())["similar_negative"]
    assert row["value"] == pytest.approx((on.mean() + (1 - off).mean()) / 2)
    drops = np.round(generator.normal(size=len(records)), 1)  # with ties
    on, off = (drops[in_source & kind] for kind in (active, ~active))
    expected = mannwhitneyu(on, off).statistic / (len(on) * len(off))
    assert rows("surprisal", drops.tolist())["similar_negative"]["value"] == pytest.approx(expected)


def test_intruders_found_count_and_activating_records_do_not(rows):
    records = each_once(drawn())
    found = itertools.cycle([1.0, 1.0, 0.0, 1.0])
    values = [None if fires(record) else next(found) for record in records]
    row = rows("intruder", values)["similar_negative"]
    assert row["value"] == 0.75 and row["num_records"] == 12 and row["num_unparsed"] == 0
    values[20] = None
    row = rows("intruder", values)["similar_negative"]
    assert row["num_records"] == 11 and row["num_unparsed"] == 1


def test_records_without_a_verdict_are_left_out_and_counted(rows):
    values = [float(fires(record)) for record in each_once(drawn())]
    values[0] = values[1] = values[12] = None
    row = rows("detection", values)["similar_negative"]
    assert row["value"] == 1.0 and row["num_records"] == 21 and row["num_unparsed"] == 3
    none = rows("detection", [None] * len(values))["similar_negative"]
    assert none["status"] == "parse_error" and none.get("value") is None and none["num_unparsed"] == 24


def test_why_there_is_no_value(rows):
    failed = rows("detection", Answers((), "llm_error"))["similar_negative"]
    assert failed["status"] == "llm_error" and failed.get("value") is None and failed["num_records"] == 0
    for records in (drawn()[:24], drawn()[12:]):
        row = rows("detection", [1.0] * len(each_once(records)), records)["random_negative"]
        assert row["status"] == "no_records" and row.get("value") is None


def test_the_interval_resamples_documents():
    active = np.array([True, False] * 40)
    values = np.array([1.0, 0.0, 0.0, 1.0] * 20).tolist()
    own, shared = np.arange(80), np.arange(80) // 20

    def width(documents):
        row = value_of("detection", active, values, documents, np.random.default_rng(0), 500)
        return row["ci_high"] - row["ci_low"]

    assert width(own) > 0.15
    assert width(shared) == 0  # every document is judged alike


def test_chance_levels():
    assert chance_level(DetectionConfig(llm="l")) == 0.5
    assert chance_level(IntruderConfig(llm="l", num_shown=4)) == 0.25
