"""What each measure of complexity says, worked out by hand; and that a run writes them once."""

import shutil
from typing import ClassVar

import numpy as np
import pytest

from rayinterp.complexity import MEASURES, complexity_rows, mean_rating, measure_predictions, num_words
from rayinterp.config import arm_id, load_config
from rayinterp.errors import UserError
from rayinterp.explanation import Rule
from rayinterp.rating import rater_id, run_complexity, unrated
from rayinterp.records import ActivationRecord
from rayinterp.run import open_run, run_stage
from rayinterp.score import correlation
from rayinterp.simulate.simulator import TokenSequence, expected_value
from rayinterp.tables import SCHEMAS, Tables
from tests.conftest import CONFIGS, copy_upstream, planted_config
from tests.simulate.tiny_simulators import save_model

TRUE = ((5.0, 0, 0, 0, 3, 0, 0, 0), (5.0, 4, 0, 0, 0, 0, 3, 0))
MAIN, MINOR, WRONG = Rule("the main reason", 5), Rule("a minor one", 3), Rule("none at all", 5)
SIMULATED = {
    MAIN.activates_on: [np.array([5.0, 0, 0, 0, 0, 0, 0, 0]), np.array([5.0, 4, 0, 0, 0, 0, 0, 0])],
    MINOR.activates_on: [np.array([0, 0, 0, 0, 5.0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 0, 5.0, 0])],
    WRONG.activates_on: [np.array([0, 0, 0, 5.0, 0, 0, 0, 0]), np.array([0, 0, 5.0, 0, 0, 0, 0, 0])],
    "silent": [np.zeros(8), np.zeros(8)],
}


def records():
    return [
        ActivationRecord(TokenSequence(i, (" a",) * 8), i, "positive", (0,) * 8, np.array(true))
        for i, true in enumerate(TRUE)
    ]


def measured(*rules):
    return measure_predictions(rules, records(), SIMULATED)


def correlate(*rules):
    predicted = [np.max([r.strength / 5 * SIMULATED[r.activates_on][i] for r in rules], axis=0) for i in range(2)]
    return correlation(np.concatenate([np.array(t) for t in TRUE]), np.concatenate(predicted))


def test_the_fewest_rules_that_do_as_well():
    assert correlate(MAIN) < 0.95 * correlate(MAIN, MINOR)
    assert measured(MINOR, MAIN)["num_rules_95"] == (2, "ok")
    weak = Rule(MINOR.activates_on, 0)
    assert measured(weak, MAIN)["num_rules_95"] == (1, "ok")
    assert measured(MAIN)["num_rules_95"] == (1, "ok")
    assert measured(WRONG)["num_rules_95"] == (None, "not_positive")
    assert measured(Rule("silent"))["num_rules_95"] == (None, "undefined")


def test_the_fall_without_a_rule():
    whole = correlate(MAIN, MINOR)
    falls = [whole - correlate(MAIN), whole - correlate(MINOR)]
    assert measured(MAIN, MINOR)["rule_removal"] == (pytest.approx(np.mean(falls)), "ok")
    harmful = (correlate(MAIN, WRONG) - correlate(MAIN) + correlate(MAIN, WRONG) - correlate(WRONG)) / 2
    assert measured(MAIN, WRONG)["rule_removal"] == (pytest.approx(harmful), "ok")
    assert measured(MAIN)["rule_removal"] == (None, "one_rule")
    assert measured(MAIN, Rule("silent"))["rule_removal"] == (None, "undefined")


def test_overlap_is_what_two_rules_share_of_what_either_says():
    assert measured(MAIN, MINOR)["rule_overlap"] == (0, "ok")
    same = Rule(MAIN.activates_on, 2)
    assert measured(MAIN, same)["rule_overlap"] == (pytest.approx(2 / 5), "ok")
    assert measured(MAIN, same, MINOR)["rule_overlap"] == (pytest.approx(2 / 5 / 3), "ok")
    assert measured(MAIN)["rule_overlap"] == (None, "one_rule")
    assert measured(Rule("silent"), Rule("silent"))["rule_overlap"] == (None, "silent")


def test_no_number_comes_from_nothing():
    assert set(measure_predictions((MAIN, MINOR), [], {}).values()) == {(None, "no_records")}
    broken = {**SIMULATED, MAIN.activates_on: [np.full(8, np.nan), np.zeros(8)]}
    found = measure_predictions((MAIN, MINOR), records(), broken)
    assert [measure.value for measure in found.values()] == [None, None, None]


def test_an_explanation_is_rated_by_its_rules_at_their_strengths():
    assert num_words((MAIN, MINOR)) == 6
    ratings = {MAIN.activates_on: 1.0, MINOR.activates_on: 4.5}
    assert mean_rating((MAIN, MINOR), ratings) == pytest.approx((5 * 1 + 3 * 4.5) / 8)
    assert mean_rating((MAIN._replace(strength=0), MINOR._replace(strength=0)), ratings) == pytest.approx(2.75)


@pytest.mark.parametrize(("name", "says"), [("nobody", "not defined"), ("oracle", "engine is oracle")])
def test_a_rater_must_be_an_arm_that_can_rate(name, says, tmp_path):
    with pytest.raises(UserError, match=rf"score\.complexity\.simulator is '{name}'.*{says}") as error:
        load_config(CONFIGS / "planted.yaml", [f"run_dir={tmp_path}", f"score.complexity.simulator={name}"])
    assert len(str(error.value).splitlines()) == 2


def test_rows_fit_the_table(tmp_path):
    from rayinterp.feature_id import FeatureId

    tables = Tables(str(tmp_path))
    rows = complexity_rows(FeatureId("a", 1), "e@1", "s@1", measured(MAIN))
    tables.append("complexity", rows)
    tables.append("complexity", rows)
    assert tables.count("complexity") == 3 and set(rows[0]) == set(SCHEMAS["complexity"].names)


def test_a_run_measures_every_explanation_once(planted_run):
    rows = planted_run.tables.read("complexity").to_pylist()
    by_measure = {m: {(r["explainer"], r["feature"]): r for r in rows if r["measure"] == m} for m in MEASURES}
    explained = planted_run.tables.read("explanations", where="explanation is not null").to_pylist()
    for measure in MEASURES[:-1]:
        assert set(by_measure[measure]) == {(row["explainer"], row["feature"]) for row in explained}
    assert not by_measure["rating"]
    right = arm_of(planted_run, "right")
    assert [by_measure["num_rules"][right, i]["value"] for i in range(3)] == [1, 1, 2]
    assert [by_measure["num_rules_95"][right, i]["value"] for i in range(2)] == [1, 1]
    two = {measure: by_measure[measure][right, 2] for measure in MEASURES[:-1]}
    assert two["rule_overlap"]["value"] == 0 and two["rule_removal"]["value"] > 0
    assert {by_measure["rule_overlap"][right, i]["status"] for i in range(2)} == {"one_rule"}
    assert by_measure["num_rules_95"][right, 0]["simulator"] == arm_id(
        "oracle", planted_run.config.simulators["oracle"]
    )


def arm_of(run, name):
    (arm,) = {row for row in run.tables.read("explanations")["explainer"].to_pylist() if row.partition("@")[0] == name}
    return arm


def test_what_is_missing_is_measured_and_nothing_else(planted_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(planted_run.config.run_dir, folder)
    tables = Tables(str(folder))
    before = sorted(tables.read("complexity").to_pylist(), key=str)
    scores = tables.read("scores").num_rows
    tables.delete("complexity", "feature = 0")
    run_stage(open_run(planted_config(folder)), "score")
    assert sorted(tables.read("complexity").to_pylist(), key=str) == before
    assert tables.read("scores").num_rows == scores


class FakeClient:
    """Rates a rule by its length; remembers what it was asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, *args):
        pass

    async def rate(self, texts):
        self.asked.extend(texts)
        return [np.log(np.eye(6)[len(text) % 6] + 1e-9) for text in texts]


def test_ratings_are_asked_for_once_and_go_on_where_they_stopped(planted_run, tmp_path, monkeypatch):
    folder = copy_upstream(planted_run, tmp_path / "run")
    tables = Tables(str(folder))
    tables.append("explanations", planted_run.tables.read("explanations"))
    rater = f"{{engine: transformers, model: {save_model(tmp_path / 'model')}}}"
    config = planted_config(folder, f"simulators.rater={rater}", "score.complexity.simulator=rater")
    explainers = sorted(tables.distinct("explanations", "explainer"))
    monkeypatch.setattr("rayinterp.rating.SimulatorClient", FakeClient)
    monkeypatch.setattr("rayinterp.rating.BATCH", 2)
    left = unrated(config, tables, explainers)
    assert left
    run_complexity(config, tables, explainers)
    rated = tables.read("complexity", where="measure = 'rating'").to_pylist()
    assert len(rated) == len(left) and {row["simulator"] for row in rated} == {rater_id(config)}
    for row in rated:
        (explanation,) = (e for (f, arm), e in left.items() if (str(f), arm) == (row["feature_key"], row["explainer"]))
        expected = mean_rating(explanation, {r.activates_on: len(r.activates_on) % 6 for r in explanation})
        assert row["value"] == pytest.approx(expected, abs=1e-4)
    tables.delete("complexity", "measure = 'rating' and feature = 1")
    FakeClient.asked.clear()
    run_complexity(config, tables, explainers)
    assert set(FakeClient.asked) == {r.activates_on for (f, _), e in left.items() if f.index == 1 for r in e}
    assert tables.count("complexity", "measure = 'rating'") == len(left)
    assert not unrated(config, tables, explainers)


def test_the_expected_digit():
    assert expected_value(np.log(np.array([[0, 0, 0.5, 0, 0.5, 0]]) + 1e-12))[0] == pytest.approx(3, abs=1e-4)
