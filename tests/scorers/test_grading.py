"""What the score stage grades when it cannot grade everything: caps on records, and budgets that another run lifts."""

import time
from pathlib import Path

import pytest
import ray

from rayinterp.errors import EngineError
from rayinterp.explain.rows import arm_ids
from rayinterp.feature_id import FeatureId
from rayinterp.grade import Graded, run_score, some_of_each_source
from rayinterp.grade_plan import FeatureWork, ScorePlan, score_row
from rayinterp.records import load_records
from rayinterp.run import open_run, run_stage
from rayinterp.simulate.simulator import CONTROL_NULLS
from rayinterp.sources import spread
from rayinterp.tables import Committer, Tables
from tests.conftest import copy_upstream, planted_config
from tests.simulate.tiny_simulators import save_model

WRITTEN = ("scores", "predictions", "complexity")
SMALL = ("score.num_rule_negatives=0", "score.num_shuffled=0", "score.num_bootstrap=20")


@pytest.fixture
def explained(planted_run, tmp_path):
    """A run directory with explanations, not graded."""
    folder = copy_upstream(planted_run, tmp_path / "run")
    Tables(str(folder)).append("explanations", planted_run.tables.read("explanations"))
    return folder


def graded(folder, *overrides):
    """The stage `score`; returns its tables and the versions that it leaves."""
    run = open_run(planted_config(folder, *SMALL, *overrides))
    run_stage(run, "score")
    return run.tables, {name: run.tables.version(name) for name in WRITTEN}


def first_block_alone(block, simulator, config, tables, committer):
    """In place of grading."""
    feature, graded = block[0].feature, Path(config.run_dir) / "graded"
    if feature.index:
        while not graded.exists():
            time.sleep(0.05)
        time.sleep(1)  # for the driver to be told
        raise EngineError("device lost")
    graded.touch()
    row = score_row(feature, "e@1", "", simulator, "correlation", "random", status="ok", settings="")
    return Graded([row], [], [])


def test_what_was_graded_outlives_a_block_that_fails(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.grade.grade_block", first_block_alone)
    monkeypatch.setattr("rayinterp.grade.COMMIT_SECONDS", 60.0)
    tables = Tables(str(tmp_path))
    work = [[FeatureWork(FeatureId("a", n), "", {}, {})] for n in range(2)]
    committer = ray.remote(Committer).options(num_cpus=0).remote(tables)
    ray.get(committer.add.remote({"simulations": [{"simulator": "s@1", "rule_hash": "r", "sequence_id": 1}]}))
    with pytest.raises(EngineError, match="device lost"):
        run_score(planted_config(tmp_path), tables, ScorePlan([("oracle", one) for one in work], [], 0), committer)
    assert tables.read("scores")["feature_key"].to_pylist() == ["a/0"]
    assert tables.count("simulations") == 1, "what was paid for is durable too"


def test_what_is_taken_of_a_ranking_is_spread_over_it():
    assert spread(range(30), 6) == [2, 7, 12, 17, 22, 27]
    assert spread("abc", 1) == ["b"] and spread("abc", 3) == spread("abc", 4) == spread("abc", None) == list("abc")
    for n in range(1, 40):
        for count in range(1, n):
            ranks = spread(range(n), count)
            assert len(set(ranks)) == count and ranks == sorted(ranks)
            assert ranks[0] == pytest.approx(n - 1 - ranks[-1], abs=1)  # as far from the first as from the last


def test_a_cap_takes_strong_and_weak_positives_alike(planted_run):
    records = load_records(planted_run.tables, FeatureId("planted", 2), ("test",))["test"]
    peaks = [record.activations.max() for record in records if record.source == "positive"]
    kept = some_of_each_source(records, 6)
    assert [record.source for record in kept] == [s for s in dict.fromkeys(r.source for r in records) for _ in range(6)]
    found = [record.activations.max() for record in kept if record.source == "positive"]
    assert found == [peaks[rank] for rank in (2, 7, 12, 17, 22, 27)] and min(found) < min(peaks[:15])
    assert some_of_each_source(records, None) == records


def test_a_feature_beyond_the_budget_is_graded_once_it_fits(explained, tmp_path):
    model = save_model(tmp_path / "model")
    # With all three arms the first two features fit, with `right` alone the third does too: a record of three sources,
    # on test and on valid; two rules of the third feature's truth.
    most = 3 * (3 * len(CONTROL_NULLS) + 2 * (1 + 1 + 2))
    reader = f"engine: transformers, model: {model}, num_few_shots: 1, dtype: float32, calibration: none"
    simulators = f"simulators={{oracle: {{engine: oracle}}, reader: {{{reader}, max_records: 1, max_pairs: {most}}}}}"
    limited = (simulators, "score.simulators=[reader]")
    alone = (*limited, "explainers={right: {method: one_shot, llm: knows, simulator: oracle}}")

    tables, versions = graded(explained, *limited)
    assert tables.distinct("scores", "feature_key", "status = 'no_budget'") == {"planted/2"}
    assert tables.distinct("scores", "feature_key", "num_records > 0") == {"planted/0", "planted/1"}
    assert graded(explained, *limited)[1] == versions  # nothing to do, nothing written

    tables, versions = graded(explained, *alone)
    right = arm_ids(planted_config(explained), "right")[0]
    of_right = f"feature_key = 'planted/2' and explainer = '{right}'"
    scores = tables.read("scores", where=of_right).to_pylist()
    assert len(scores) == 5 * 2 and {row["num_records"] for row in scores} == {2}
    assert tables.count("predictions", of_right) == 3
    assert tables.distinct("scores", "explainer", "status = 'no_budget'") == {
        arm_ids(planted_config(explained), "tree")[0]
    }
    # Its one record of a source is from the middle of the ranks.
    kept = tables.read("predictions", where=f"{of_right} and source = 'positive'")["sequence_id"].to_pylist()
    where = f"feature_key = 'planted/2' and split = 'test' and source = 'positive' and sequence_id = {kept[0]}"
    assert tables.read("records", where=where)["rank"].to_pylist() == [15]
    assert graded(explained, *alone)[1] == versions
    # Beyond the budget again, it keeps what it has.
    tables, versions = graded(explained, *limited)
    assert tables.read("scores", where=of_right).to_pylist() == scores


def test_an_explanation_that_the_llm_failed_on_is_graded_once_there_is_one(explained):
    tables, config = Tables(str(explained)), planted_config(explained)
    where = f"feature_key = 'planted/0' and explainer = '{arm_ids(config, 'right')[0]}'"
    (row,) = tables.read("explanations", where=where).to_pylist()
    tables.delete("explanations", where)
    tables.append("explanations", [{**row, "explanation": None, "status": "llm_error"}])
    _, versions = graded(explained)
    assert tables.distinct("scores", "status", where) == {"llm_error"}
    assert graded(explained)[1] == versions
    tables.delete("explanations", where)
    tables.append("explanations", [row])
    graded(explained)
    scores = tables.read("scores", where=f"{where} and control = '' and scorer = 'correlation'").to_pylist()
    assert len(scores) == 2 and all(score["value"] > 0.95 for score in scores)
