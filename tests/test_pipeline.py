"""The whole pipeline on the planted subject: what is known to be true must come out, and only that."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayinterp.errors import UserError
from rayinterp.explanation import from_json
from rayinterp.planted import FEATURES
from rayinterp.run import STAGES, open_run, run_stage
from rayinterp.tables import SCHEMAS, Tables
from tests.conftest import UPSTREAM_TABLES, copy_upstream, planted_config, run_all
from tests.tables_equal import assert_tables_equal


def scores(run, explainer, scorer="correlation", control=""):
    where = f"scorer = '{scorer}' and control = '{control}' and explainer like '{explainer}%'"
    rows = run.tables.read("scores", where=where).to_pylist()
    return {(row["feature"], row["source"]): row for row in rows}


def copy_of(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.config.run_dir, folder)
    return folder


def test_the_true_explanation_scores_almost_perfectly_on_test(planted_run):
    found = scores(planted_run, "right@")
    assert len(found) == 3 * 3
    for (_, source), row in found.items():
        assert row["split"] == "test"
        assert row["value"] > 0.95
        assert row["ci_low"] > 0.9
        assert row["status"] == ("wide" if source == "rule_negative" else "ok")
        assert row["num_records"] == 60 or source == "rule_negative"
        assert row["false_positives_per_sequence"] == row["false_negatives_per_sequence"] == 0
    assert all(row["value"] > 0.95 for row in scores(planted_run, "right@", "r2").values())


def test_a_wrong_explanation_scores_near_zero(planted_run):
    found = scores(planted_run, "wrong@")
    for feature in (0, 1):
        row = found[feature, "random_negative"]
        assert abs(row["value"]) < 0.1
        assert row["false_positives_per_sequence"] > 0 and row["false_negatives_per_sequence"] > 0


def test_an_answer_that_did_not_parse_is_a_status_and_never_an_explanation(planted_run):
    row = scores(planted_run, "wrong@")[2, "random_negative"]
    assert (row["value"], row["status"]) == (None, "no_explanation")
    where = "feature_key = 'planted/2' and explainer like 'wrong@%'"
    (explanation,) = planted_run.tables.read("explanations", where=where).to_pylist()
    assert (explanation["explanation"], explanation["status"]) == (None, "no_explanation")
    (candidate,) = planted_run.tables.read("candidates", where=where).to_pylist()
    assert candidate["status"] == "parse_error"
    assert "could not find" in candidate["thought"]


def test_controls_stand_beside_every_score(planted_run):
    for source in planted_run.config.records.complementary:
        shuffled = scores(planted_run, "right@", control="shuffled")
        lookup, null = scores(planted_run, "", control="token_lookup"), scores(planted_run, "", control="null")
        for feature in (0, 1, 2):
            value = shuffled[feature, source]["value"]
            assert value is None or abs(value) < 0.2
            assert null[feature, source]["status"] == "constant_prediction"
            assert lookup[feature, source]["value"] > 0.3
    tried = [row["value"] for row in scores(planted_run, "right@", control="shuffled").values()]
    assert sum(value is not None for value in tried) >= 3
    # A word list is all there is to feature 0; feature 1 needs the context, which a table of tokens lacks.
    assert lookup[0, "random_negative"]["value"] > lookup[1, "random_negative"]["value"] + 0.1


def test_the_search_keeps_the_truth_and_recognises_duplicates(planted_run):
    rows = planted_run.tables.read("explanations", where="explainer like 'tree@%'").to_pylist()
    assert {row["feature"]: from_json(row["explanation"]) for row in rows} == {i: FEATURES[i].truth for i in range(3)}
    nodes = planted_run.tables.read("candidates", where="explainer like 'tree@%'").to_pylist()
    assert sum(node["status"] == "duplicate" for node in nodes) == 3
    assert {node["kind"] for node in nodes} == {"llm", "lexical"}


def test_equal_requests_of_two_arms_are_paid_for_once(planted_run):
    where = "feature_key = 'planted/0'"
    requests = [
        json.loads(row) for row in planted_run.tables.read("llm_calls", ["request"], where)["request"].to_pylist()
    ]
    knows = [request for request in requests if request["endpoint"] == requests[0]["endpoint"]]
    wrong = [request for request in requests if request["endpoint"] != requests[0]["endpoint"]]
    # `right` and the first root of `tree` ask the same; the second root has a seed of its own.
    assert sorted((len(knows), len(wrong))) == [1, 2]
    assert len({json.dumps(request["messages"]) for request in requests}) == 1


def test_test_records_are_read_by_the_score_stage_alone(planted_run):
    """What the search was scored on and shown: train and valid sequences, never one of test."""
    tables = planted_run.tables
    test_texts = ["".join(row["tokens"]).strip() for row in tables.read("records", where="split = 'test'").to_pylist()]
    shown = "\n".join(tables.read("llm_calls")["request"].to_pylist()).replace("<<", "").replace(">>", "")
    assert not [text for text in test_texts if text in shown]
    train = ["".join(row["tokens"]).strip() for row in tables.read("records", where="split = 'train'").to_pylist()]
    assert [text for text in train if text in shown]


def test_a_second_run_changes_no_table(planted_run):
    versions = {name: planted_run.tables.open(name).version for name in SCHEMAS if planted_run.tables.exists(name)}
    run = open_run(planted_run.config)
    for stage in STAGES[:-1]:
        run_stage(run, stage)
    assert versions == {name: run.tables.open(name).version for name in versions}


def test_the_tables_do_not_depend_on_workers(planted_run, tmp_path, monkeypatch):
    """One worker in the shared run, four here, and blocks of features of another size."""
    monkeypatch.setattr("rayinterp.records.BLOCK", 2)
    resources = "{num_actors: 4, num_cpus: 0.25}"
    overrides = [f"resources.{stage}={resources}" for stage in ("corpus", "harvest", "index")]
    other = run_all(planted_config(tmp_path / "run", *overrides), ("corpus", "harvest", "index", "records"))
    assert all(planted_run.tables.count(name) > 0 for name in UPSTREAM_TABLES)
    assert_tables_equal(planted_run.tables, other.tables, UPSTREAM_TABLES)


def test_a_block_of_records_that_was_begun_is_written_once(planted_run, tmp_path):
    """As after a kill between its records and the counts that mark it as finished."""
    folder = copy_upstream(planted_run, tmp_path / "run")
    tables = Tables(str(folder))
    tables.delete("record_counts", "feature >= 0")
    run_stage(open_run(planted_config(folder)), "records")
    assert_tables_equal(planted_run.tables, tables, ("records", "record_counts"))


def test_another_explainer_pays_only_for_itself(planted_run, tmp_path):
    folder = copy_of(planted_run, tmp_path)
    before = Tables(str(folder)).count("explanations")
    config = planted_config(folder, "explainers.words={method: lexical, simulator: oracle}")
    run = run_all(config)
    assert run.tables.count("explanations") == before + 3
    assert run.tables.count("llm_calls") == planted_run.tables.count("llm_calls")


def test_scoring_before_explaining_does_not_settle_anything(planted_run, tmp_path):
    """An arm that has not run yet must not be marked as having found nothing."""
    folder = copy_of(planted_run, tmp_path)
    config = planted_config(folder, "explainers.words={method: lexical, simulator: oracle}")
    run = open_run(config)
    run_stage(run, "score")
    assert not scores(run, "words@")
    run = run_all(config)
    assert len(scores(run, "words@")) == 3 * 3


def test_a_failing_llm_is_an_error_and_its_features_are_left_for_the_next_run(planted_run, tmp_path, monkeypatch):
    folder = copy_of(planted_run, tmp_path)
    monkeypatch.setenv("RAYINTERP_TEST_KEY", "sk-secret")
    # Nobody listens on the discard port.
    url = "http://127.0.0.1:9/v1"
    down = f"{{provider: openai, model: m, base_url: '{url}', api_key_env: RAYINTERP_TEST_KEY, max_retries: 0}}"
    tree = "{method: tree, llm: down, simulator: oracle}"
    config = planted_config(folder, f"llms.down={down}", f"explainers.another={tree}")
    before = Tables(str(folder)).count("explanations")
    run = open_run(config)
    with pytest.raises(UserError, match="APIConnectionError") as error:
        run_stage(run, "explain")
    assert "sk-secret" not in str(error.value)
    assert run.tables.count("explanations") == before
    up = planted_config(folder, "llms.down={provider: scripted, model: m}", f"explainers.another={tree}")
    run_stage(open_run(up), "explain")
    assert run.tables.count("explanations") == before + 3


def test_a_source_without_records_has_a_row_that_says_so(planted_run):
    from rayinterp.feature_id import FeatureId
    from rayinterp.grade import grade
    from rayinterp.grade_plan import FeatureWork
    from rayinterp.records import load_records
    from rayinterp.simulate.simulator import CONTROL_NULLS

    feature = FeatureId("planted", 0)
    records = load_records(planted_run.tables, feature, ("train", "test"))
    records["test"] = [record for record in records["test"] if record.source != "similar_negative"]
    silent = [record.activations * 0 for record in records["test"]]
    simulated = dict.fromkeys((*CONTROL_NULLS, "words about ships and the sea"), silent)
    work = FeatureWork(feature, "settings", {"right@x": FEATURES[0].truth}, {})
    rows = grade(work, "oracle@x", {**records, "valid": []}, simulated, {}, planted_run.config).scores
    statuses = {(row["source"], row["status"]) for row in rows if row["explainer"] and row["scorer"] == "correlation"}
    assert statuses == {
        ("similar_negative", "no_records"),
        ("random_negative", "constant_prediction"),
        ("rule_negative", "no_records"),
    }


def test_a_changed_upstream_field_is_refused_by_name(planted_run):
    config = planted_config(Path(planted_run.config.run_dir), "corpus.shard_size=100")
    with pytest.raises(UserError, match=r"corpus\.shard_size: 256 -> 100"):
        open_run(config)


def test_the_run_directory_says_what_made_it(planted_run):
    folder = Path(planted_run.config.run_dir)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["packages"]["ray"] and manifest["packages"]["pylance"]
    assert manifest["stages"]["corpus"]["sequences"] == 3000
    assert "shard_size: 256" in (folder / "run.yaml").read_text()


def test_a_stage_without_its_input_says_what_to_run(tmp_path, ray_session):
    run = open_run(planted_config(tmp_path / "run"))
    with pytest.raises(UserError, match="corpus, harvest, index"):
        run_stage(run, "records")


def parts(tables, stage):
    """(done, total) of a stage, from the tables."""
    if stage == "harvest":
        return tables.count("activations", "feature = -1"), len(tables.distinct("sequences", "shard"))
    if stage == "index":
        return tables.count("embeddings"), tables.count("sequences")
    return tables.count("explanations"), 9


EXPLAIN_TABLES = ("candidates", "explanations", "llm_calls")
KILLED_IN = {
    # stage that is killed: (stages that run, tables that are compared)
    "harvest": (("corpus", "harvest"), UPSTREAM_TABLES[:5]),
    "index": (("corpus", "harvest", "index"), UPSTREAM_TABLES[:6]),
    "explain": (STAGES[:5], (*UPSTREAM_TABLES, *EXPLAIN_TABLES)),
}


@pytest.mark.parametrize("stage", ["harvest", pytest.param("index", marks=pytest.mark.slow), "explain"])
def test_killed_in_the_middle_and_started_again_it_ends_with_the_same_tables(stage, planted_run, tmp_path):
    """SIGKILL of the driver once the stage has committed a part of its work; then a second run to the end."""
    folder, (stages, compared) = tmp_path / "run", KILLED_IN[stage]
    tables = Tables(str(folder))
    if stage == "explain":  # what comes before it is finished, and copied
        copy_upstream(planted_run, folder)
    # A cluster of its own: the session's must outlive it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.run_planted", str(folder), *stages]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=stderr)
        try:
            deadline = time.monotonic() + 400
            while process.poll() is None and parts(tables, stage)[0] == 0:
                assert time.monotonic() < deadline, f"{stage} did not begin in time"
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done, total = parts(tables, stage)
    assert 0 < done < total, f"killed at {done} of {total}: {(tmp_path / 'stderr').read_text()[-2000:]}"
    resumed = run_all(planted_config(folder), stages)
    assert_tables_equal(planted_run.tables, resumed.tables, compared)
