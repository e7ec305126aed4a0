"""Test records that the explanations' own words call for: on the planted run, against a scan written plainly."""

import shutil
from collections import Counter, defaultdict

import numpy as np
from sentence_transformers import SentenceTransformer

from rayinterp import embedded
from rayinterp.explanation import from_json
from rayinterp.feature_id import FeatureId
from rayinterp.index import to_matrix
from rayinterp.planted import FEATURES, VOCABULARY, fires
from rayinterp.retrieve import RULE_NEGATIVE, Found
from rayinterp.rule_negatives import load_rule_negatives, some_of_each_arm, union
from tests.conftest import planted_config, run_all

COUNT = 10


def explanations(run):
    found = defaultdict(dict)
    for row in run.tables.read("explanations").to_pylist():
        if row["explanation"]:
            found[row["feature"]][row["explainer"]] = from_json(row["explanation"])
    return found


def num_records(run, source=RULE_NEGATIVE):
    """By feature: how many records each arm and control was graded on."""
    where = f"source = '{source}' and scorer = 'correlation' and status != 'parse_error'"
    found = defaultdict(dict)
    for row in run.tables.read("scores", where=where).to_pylist():
        if row["num_records"]:
            found[row["feature"]][row["explainer"], row["control"]] = row["num_records"]
    return found


def test_the_union_takes_the_best_of_every_arm_first_and_each_sequence_once():
    def found(*ids):
        return [Found(sequence_id, 0.5, 0) for sequence_id in ids]

    merged = union({"b": found(1, 2, 3), "a": found(2, 9), "c": []})
    assert [(arm, rank, hit.sequence_id) for arm, rank, hit in merged] == [
        ("a", 0, 2), ("b", 0, 1), ("a", 1, 9), ("b", 2, 3)
    ]  # fmt: skip
    assert union({}) == []


def test_every_arm_adds_the_nearest_silent_test_sequences_of_its_own_words(planted_run):
    sequences = planted_run.tables.read("sequences", where="split = 'test'").sort_by("sequence_id").to_pylist()
    stored = to_matrix(planted_run.tables.read("embeddings", where="split = 'test'").sort_by("sequence_id"))
    encoder = SentenceTransformer(str(embedded.embedder_path(embedded.EMBEDDER)))
    rows = planted_run.tables.read("test_records").to_pylist()
    assert {row["feature"] for row in rows} == set(explanations(planted_run)) == {0, 1, 2}
    for feature, arms in explanations(planted_run).items():
        words = [[VOCABULARY[i] for i in sequence["token_ids"]] for sequence in sequences]
        is_silent = np.array([not any(fires(FEATURES[feature].truth, w)) for w in words])
        expected = set()
        for explanation in arms.values():
            queries = encoder.encode([rule.activates_on for rule in explanation], normalize_embeddings=True)
            nearest = np.where(is_silent, (stored.astype(float) @ queries.T.astype(float)).max(1), -1)
            expected |= {sequences[place]["sequence_id"] for place in np.argsort(-nearest, kind="stable")[:COUNT]}
        own = [row for row in rows if row["feature"] == feature]
        assert sorted(row["sequence_id"] for row in own) == sorted(expected)
        assert len({(row["explainer"], row["rank"]) for row in own}) == len(own)
        assert all(row["explainer"] in arms and 0 <= row["rank"] < COUNT for row in own)
        assert all(not any(row["activations"]) and len(row["tokens"]) == 16 for row in own)


def test_all_arms_and_controls_of_a_feature_are_graded_on_the_same_records(planted_run):
    features = [FeatureId("planted", index) for index in (0, 1, 2)]
    called_for = load_rule_negatives(planted_run.tables, features)
    graded = num_records(planted_run)
    for feature in features:
        assert set(graded[feature.index].values()) == {30 + len(called_for[feature])}
        assert {control for _, control in graded[feature.index]} == {"", "null", "shuffled", "token_lookup"}
        assert all(record.source == RULE_NEGATIVE and not record.activations.any() for record in called_for[feature])


def test_a_cap_hears_every_arm_and_near_and_far_records_alike(planted_run):
    feature, arms = FeatureId("a", 1), "abcdefgh"
    of_arms = {arm: [(arm, rank) for rank in range(10)] for arm in arms}
    assert some_of_each_arm(feature, of_arms, 16) == some_of_each_arm(feature, of_arms, 16)
    assert sorted(some_of_each_arm(feature, of_arms, 16)) == [(arm, rank) for arm in arms for rank in (2, 7)]
    # An arm that called for little leaves its turns to the others.
    assert sorted(some_of_each_arm(feature, {**of_arms, "a": [("a", 3)]}, 79)) == [
        ("a", 3), *((arm, rank) for arm in arms[1:] for rank in range(10))
    ]  # fmt: skip
    # With more arms than records, each is heard on some features.
    heard = [{arm for arm, _ in some_of_each_arm(FeatureId("a", n), of_arms, 2)} for n in range(40)]
    assert all(len(pair) == 2 for pair in heard) and set().union(*heard) == set(arms)

    features = [FeatureId("planted", index) for index in (0, 1, 2)]
    called_for = load_rule_negatives(planted_run.tables, features)
    capped = load_rule_negatives(planted_run.tables, features, 4)
    arm_of = {row["sequence_id"]: row["explainer"] for row in planted_run.tables.read("test_records").to_pylist()}
    for feature in features:
        ids = [record.sequence.sequence_id for record in capped[feature]]
        assert len(ids) == 4 and set(ids) <= {record.sequence.sequence_id for record in called_for[feature]}
    by_arm = Counter(arm_of[record.sequence.sequence_id] for record in capped[features[0]])
    assert list(by_arm.values()) == [2, 2]  # `tree` says what `right` says, and called for nothing more


def test_an_arm_that_joins_later_adds_its_own_and_the_others_are_graded_again(planted_run, tmp_path):
    shutil.copytree(planted_run.config.run_dir, tmp_path / "run")
    answer = """'[{"activates_on": "bowed string instruments", "strength": 5}]'"""
    config = planted_config(
        tmp_path / "run",
        f"llms.musical={{provider: scripted, model: scripted, answers: {{planted/0: {answer}}}}}",
        "explainers.musical={method: one_shot, llm: musical, simulator: oracle}",
    )
    run = run_all(config, ("explain", "score"))
    before, after = num_records(planted_run), num_records(run)
    (same,) = set(after[0].values())
    assert max(before[0].values()) < same <= max(before[0].values()) + COUNT
    assert set(before[0]) < set(after[0]) and any(arm.startswith("musical@") for arm, _ in after[0])
    assert after[1] == before[1] and after[2] == before[2]
    where = "source = 'similar_negative' and explainer like 'right@%'"
    old, new = (r.tables.read("scores", where=where).drop_columns("settings").to_pylist() for r in (planted_run, run))
    assert len(old) == len(new) and all(row in new for row in old)  # made again, to the same values


def test_the_source_can_be_left_out_and_a_change_of_what_scores_depend_on_makes_them_again(planted_run, tmp_path):
    shutil.copytree(planted_run.config.run_dir, tmp_path / "run")
    run = run_all(planted_config(tmp_path / "run", "score.num_rule_negatives=0"), ("score",))
    graded = "num_records > 0"
    assert run.tables.distinct("scores", "source", graded) == {"similar_negative", "random_negative"}
    before = planted_run.tables.read("scores", where=f"source != '{RULE_NEGATIVE}' and {graded}")
    assert run.tables.count("scores", graded) == len(before)
    again = run_all(planted_config(tmp_path / "run", "score.num_bootstrap=77"), ("score",))
    assert {s.partition(",")[0] for s in again.tables.distinct("scores", "settings", graded)} == {
        "studentised bootstrap 77"
    }
    assert RULE_NEGATIVE in again.tables.distinct("scores", "source", graded)
