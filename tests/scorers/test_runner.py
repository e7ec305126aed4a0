"""The scorers on the planted run: what they find, what they pay for, and what they do when calls fail."""

import shutil

import numpy as np
import pytest
import ray
from scipy.stats import mannwhitneyu

from rayinterp.config import scorer_id
from rayinterp.explain.rows import arm_ids
from rayinterp.explanation import Rule, to_json, wording
from rayinterp.feature_id import FeatureId
from rayinterp.scorers.plan import plan_scorers, texts_of
from rayinterp.scorers.runner import run_scorers
from rayinterp.scorers.values import Graded
from rayinterp.simulate.simulator import CONTROL_NULLS
from rayinterp.tables import Committer, Tables
from tests.conftest import copy_upstream, planted_config
from tests.scorers.fakes import Fakes
from tests.tables_equal import assert_tables_equal

ASKS = (
    "score.scorers.detection={method: detection, llm: knows}",
    "score.scorers.fuzzing={method: fuzzing, llm: knows, max_records: 10}",
    "score.scorers.intruder={method: intruder, llm: knows, num_shown: 4, max_records: 10}",
)
SURPRISAL = (
    "simulators={oracle: {engine: oracle}, reader: {engine: transformers, model: m}}",
    "score.scorers.surprisal={method: surprisal, simulator: reader}",
)
EMBEDDING = ("score.scorers.embedding={method: embedding}",)
ONE_ACTOR = "resources.search={num_actors: 1, num_cpus: 1}"
SOURCES = {"similar_negative", "random_negative", "rule_negative"}
DOLLAR = ("llms.knows.usd_per_million_prompt_tokens=1e6", "llms.knows.usd_per_million_completion_tokens=0")
"""A call."""


@pytest.fixture
def copied(planted_run, tmp_path):
    """Explained, and with rule negatives, but not graded."""
    folder = copy_upstream(planted_run, tmp_path / "run")
    for name in ("explanations", "test_records"):
        Tables(str(folder)).append(name, planted_run.tables.read(name))
    return folder


def score(folder, services, *overrides, over_budget=lambda usd: None):
    config = planted_config(folder, *overrides)
    tables = Tables(str(folder))
    plans = plan_scorers(config, tables, [arm_ids(config, name)[0] for name in config.explainers])
    committer = ray.remote(Committer).options(num_cpus=0).remote(tables)
    try:
        counts = run_scorers(config, tables, plans, committer, over_budget=over_budget, connect=services)
    finally:
        ray.kill(committer)
    return counts, tables, config


def values(tables, config, scorer, source, control="", explainer=None):
    """By feature key."""
    explainer = "" if explainer is None else arm_ids(config, explainer)[0]
    where = (
        f"simulator = '{scorer_id(config, scorer)}' and source = '{source}' and control = '{control}' "
        f"and explainer = '{explainer}'"
    )
    return {row["feature_key"]: row["value"] for row in tables.read("scores", where=where).to_pylist()}


def test_what_explains_a_planted_feature_scores_1_and_controls_do_not(copied, tmp_path):
    counts, tables, config = score(copied, Fakes(tmp_path / "bill"), *ASKS, *SURPRISAL)
    assert {row["source"] for row in tables.read("scores").to_pylist()} == SOURCES
    for source in ("similar_negative", "random_negative"):
        for scorer in ("detection", "fuzzing", "surprisal"):
            assert values(tables, config, scorer, source, explainer="right") == {f"planted/{n}": 1.0 for n in range(3)}
            wrong = values(tables, config, scorer, source, explainer="wrong")
            assert wrong.keys() == {"planted/0", "planted/1", "planted/2"} and wrong["planted/2"] is None
            assert wrong["planted/0"] < 0.9
            controls = values(tables, config, scorer, source, "null")
            assert controls == {f"planted/{n}": 0.5 for n in range(3)}
            shuffled = values(tables, config, scorer, source, "shuffled", "right")
            assert shuffled.keys() == controls.keys() and np.mean(list(shuffled.values())) < 0.75
        assert values(tables, config, "intruder", source) == {f"planted/{n}": 1.0 for n in range(3)}
    assert counts["detection ok"] and counts["intruder wide"] and counts["detection no_explanation"]
    rows = tables.read("scores", where="scorer = 'detection' and status = 'no_explanation'").to_pylist()
    assert {(row["feature_key"], row["num_unparsed"]) for row in rows} == {("planted/2", None)}  # the explainer's

    paid = (tmp_path / "bill").read_text().split()
    assert len(paid) == len(set(paid)) == tables.count("llm_calls", "stage = 'score'")
    before = tables.version("scores")
    score(copied, Fakes(tmp_path / "bill"), *ASKS, *SURPRISAL)
    assert tables.version("scores") == before and (tmp_path / "bill").read_text().split() == paid
    # Other settings: graded again, from the answers that there are.
    _, tables, config = score(copied, Fakes(tmp_path / "bill"), *ASKS, "score.num_bootstrap=7")
    assert (tmp_path / "bill").read_text().split() == paid
    settings = tables.read("scores", where="scorer = 'detection'")["settings"].to_pylist()
    assert all("bootstrap 7," in one for one in settings)


def test_a_failed_call_is_a_row_and_is_made_good_by_the_next_run(copied, tmp_path):
    bill = tmp_path / "bill"
    counts, tables, config = score(copied, Fakes(bill, fails="planted/1"), ASKS[0])
    assert values(tables, config, "detection", "random_negative", explainer="right") == {
        "planted/0": 1.0,
        "planted/1": None,
        "planted/2": 1.0,
    }
    assert counts["detection llm_error"] == 3 * 3  # explainers, sources
    paid = bill.read_text().split()
    counts, tables, config = score(copied, Fakes(bill), ASKS[0])
    assert values(tables, config, "detection", "random_negative", explainer="right")["planted/1"] == 1.0
    assert "detection llm_error" not in counts
    everything = bill.read_text().split()
    assert everything[: len(paid)] == paid and len(everything) == len(set(everything))
    # An arm that joins pays for what it says alone.
    before = tables.read("scores").to_pylist()
    joined = "explainers.joined={method: lexical, simulator: oracle}"
    arm = arm_ids(planted_config(copied, joined), "joined")[0]
    (row,) = tables.read("explanations", where="feature_key = 'planted/0'").slice(0, 1).to_pylist()
    tables.append("explanations", [{**row, "explainer": arm, "explanation": to_json((Rule("the word 'zither'"),))}])
    _, tables, config = score(copied, Fakes(bill), ASKS[0], joined)
    assert values(tables, config, "detection", "random_negative", explainer="joined") == {"planted/0": 0.5}
    everything = bill.read_text().split()
    assert len(everything) == len(set(everything)) == tables.count("llm_calls", "stage = 'score'")
    after = tables.read("scores").to_pylist()
    assert [one for one in after if one["explainer"] != arm] == before


def test_an_llm_that_answers_nobody_is_given_up_after_a_few_features(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.explain.outage.MAX_FAILURES", 2)
    tried = tmp_path / "tried"
    services = Fakes(tmp_path / "bill", fails=".*", tried=tried)
    counts, tables, _ = score(copied, services, ASKS[2], "resources.searches_per_actor=1")
    assert counts == {"intruder llm_error": 3 * 3}
    assert len(set(tried.read_text().split())) == 2
    assert not tables.count("scores", "value is not null")


@pytest.mark.parametrize("refused", [150, 400])
def test_an_outage_is_waited_out_and_leaves_no_trace(refused, copied, tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.explain.outage.PAUSE_SECONDS", 0.2)
    undisturbed, bill, tried = tmp_path / "undisturbed", tmp_path / "bill", tmp_path / "tried"
    shutil.copytree(copied, undisturbed)
    score(undisturbed, Fakes(tmp_path / "another"), ASKS[2], ONE_ACTOR)
    counts, tables, _ = score(copied, Fakes(bill, tried=tried, down=(5, refused)), ASKS[2], ONE_ACTOR)
    assert not any("llm_error" in status for status in counts)
    assert len(tried.read_text().split()) == refused
    assert_tables_equal(Tables(str(undisturbed)), tables, ["scores", "llm_calls"])
    paid = bill.read_text().split()
    assert len(paid) == len(set(paid))


def test_an_outage_that_lasts_too_long_leaves_the_rest_for_the_next_run(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("rayinterp.explain.outage.PAUSE_SECONDS", 0.2)
    bill, patience = tmp_path / "bill", "resources.max_outage_seconds=1"
    counts, _, _ = score(copied, Fakes(bill, down=(8, 10**6)), ASKS[2], patience, ONE_ACTOR)
    assert counts["intruder llm_error"] and len(bill.read_text().split()) == 8
    counts, tables, config = score(copied, Fakes(bill), ASKS[2], patience, ONE_ACTOR)
    assert set(values(tables, config, "intruder", "random_negative").values()) == {1.0}
    paid = bill.read_text().split()
    assert len(paid) == len(set(paid)) and not any("llm_error" in status for status in counts)


def test_answers_that_do_not_parse_are_counted(copied, tmp_path):
    _, tables, _ = score(copied, Fakes(tmp_path / "bill", mumbles="planted/0"), *ASKS)
    for scorer, num in (("detection", 60), ("fuzzing", 20), ("intruder", 10)):
        where = f"scorer = '{scorer}' and feature_key = 'planted/0' and source = 'random_negative'"
        rows = tables.read("scores", where=where).to_pylist()
        assert {(row["value"], row["status"], row["num_unparsed"], row["num_records"]) for row in rows} == {
            (None, "parse_error", num, 0)
        }
    assert set(
        tables.read("scores", where="feature_key = 'planted/2' and value is not null")["num_unparsed"].to_pylist()
    ) == {0}


def test_a_budget_leaves_the_rest_for_later(copied, tmp_path):
    bill = tmp_path / "bill"
    one_at_a_time = "resources.searches_per_actor=1"
    _, tables, config = score(
        copied, Fakes(bill), ASKS[2], *DOLLAR, one_at_a_time, over_budget=lambda usd: "spent" if usd > 0 else None
    )
    found = values(tables, config, "intruder", "random_negative")
    assert sorted(found.values(), key=str) == [1.0, None, None]
    # What was paid for is graded by other settings though nothing is left to spend.
    _, tables, config = score(copied, Fakes(bill), ASKS[2], *DOLLAR, "score.num_bootstrap=9", over_budget=lambda u: "x")
    assert values(tables, config, "intruder", "random_negative") == found
    assert tables.count("scores", "status = 'no_budget'") == 2 * 3
    counts, tables, config = score(copied, Fakes(bill), ASKS[2], *DOLLAR)
    assert set(values(tables, config, "intruder", "random_negative").values()) == {1.0}
    assert not any("no_budget" in name for name in counts)
    paid = bill.read_text().split()
    assert len(paid) == len(set(paid))


def test_max_calls_reaches_the_first_features_only(copied, tmp_path):
    # Ten intruders of each of three sources, each asked about twice at most.
    limited = (*ASKS[2:], "llms.knows.max_calls=110")
    for _ in range(2):
        _, tables, config = score(copied, Fakes(tmp_path / "bill"), *limited)
        assert values(tables, config, "intruder", "random_negative") == {
            "planted/0": 1.0,
            "planted/1": None,
            "planted/2": None,
        }
        assert tables.count("scores", "status = 'no_budget'") == 2 * 3


def test_a_cap_takes_records_of_all_ranks(copied, tmp_path):
    _, tables, _ = score(copied, Fakes(tmp_path / "bill"), f"{ASKS[0][:-1]}, max_records: 10}}")
    asked = "\n".join(tables.read("llm_calls", ["request"], "feature_key = 'planted/0'")["request"].to_pylist())
    rows = tables.read("records", where="feature_key = 'planted/0' and split = 'test'").to_pylist()
    shown = {source: set() for source in ("positive", "similar_negative", "random_negative")}
    for row in rows:
        if "".join(row["tokens"]).strip() in asked:
            shown[row["source"]].add(row["rank"])
    assert shown["positive"] == set(range(1, 30, 3))
    assert all(ranks >= set(range(1, 30, 3)) for ranks in shown.values())  # two sources may share a silent record


def test_embedding_is_the_cosine_of_the_index(copied, tmp_path):
    from rayinterp.scorers.actor import connect

    _, tables, config = score(copied, connect, *EMBEDDING)
    found = values(tables, config, "embedding", "random_negative", explainer="right")
    assert found.keys() == {"planted/0", "planted/1", "planted/2"} and found["planted/0"] > 0.8
    encoder = connect(config, tables, None, "embedding", None).embed
    (vector,) = encoder(["words about ships and the sea"])
    rows = tables.read("records", where="feature_key = 'planted/0' and split = 'test'").to_pylist()
    stored = {row["sequence_id"]: np.array(row["vector"], float) for row in tables.read("embeddings").to_pylist()}
    cosine = {row["sequence_id"]: stored[row["sequence_id"]] @ vector for row in rows}
    on, off = ([cosine[r["sequence_id"]] for r in rows if r["source"] == s] for s in ("positive", "random_negative"))
    assert found["planted/0"] == pytest.approx(mannwhitneyu(on, off).statistic / (len(on) * len(off)), abs=1e-6)


def test_texts_that_are_graded(planted_run):
    from rayinterp.grade_plan import explained_by, read_explained

    config, tables = planted_run.config, planted_run.tables
    ids = {name: arm_ids(config, name)[0] for name in config.explainers}
    by_feature = read_explained(tables, list(ids.values()))
    feature = FeatureId("planted", 2)
    texts = texts_of(feature, by_feature, explained_by(by_feature), by_feature[feature].explanations, config)
    assert texts[Graded(ids["right"], "")] == "bowed string instruments; citrus fruits"
    assert texts[Graded("", "null")] in CONTROL_NULLS
    others = {wording(by_feature[FeatureId("planted", n)].explanations[ids["right"]]) for n in (0, 1)}
    assert texts[Graded(ids["right"], "shuffled")] in others
    assert wording((Rule("a", 0), Rule("b", 2))) == "b" and wording((Rule("a", 0),)) == "a"
