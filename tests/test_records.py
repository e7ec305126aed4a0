from collections import defaultdict

import numpy as np
import pytest

from rayinterp.config import RecordsConfig, SplitQuota
from rayinterp.index import nearest, to_matrix
from rayinterp.planted import FEATURES, fires
from rayinterp.records import (
    Activity,
    Corpus,
    choose,
    choose_positives,
    displayed,
    generator_for,
    load_records,
    similarity_to_positives,
)
from rayinterp.subject import FeatureId

FEATURE = FeatureId("a", 1)


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    splits = rng.choice(["train", "valid", "test"], 600)
    return Corpus(np.arange(600) * 7, np.arange(600) // 3, splits, np.zeros((600, 2), int), vectors)


@pytest.fixture
def activity():
    rng = np.random.default_rng(1)
    places = np.sort(rng.choice(600, 120, replace=False))
    maxima = rng.random(120).astype(np.float32) + 0.1
    return Activity(places, maxima, [np.array([0])] * 120, [np.array([m]) for m in maxima])


def settings(**values):
    quota = SplitQuota(positive=8, complementary=12)
    sources = ("random", "random_negative", "similar", "similar_negative")
    return RecordsConfig(**{"complementary": sources, "train": quota, "valid": quota, "test": quota, **values})


def test_top_positives_are_the_highest_and_quantiles_reach_down():
    maxima = np.arange(100, dtype=np.float32)
    rng = np.random.default_rng(0)
    assert sorted(maxima[choose_positives(maxima, 10, "top", rng)]) == list(range(90, 100))
    spread = maxima[choose_positives(maxima, 10, "quantile", rng)]
    assert [int(m) // 10 for m in sorted(spread)] == list(range(10))
    mixed = maxima[choose_positives(maxima, 10, "mix", rng)]
    assert len(set(mixed)) == 10
    assert set(range(95, 100)) <= set(mixed)
    assert min(mixed) < 25


def test_a_short_pool_is_short_and_never_refilled(corpus, activity):
    few = Activity(activity.places[:2], activity.maxima[:2], activity.positions[:2], activity.values[:2])
    chosen = choose(FEATURE, few, corpus, settings(), seed=0)
    assert sum(len(chosen[split, "positive"].places) for split in ("train", "valid", "test")) == 2


def test_every_record_lies_in_its_split_and_negatives_are_silent(corpus, activity):
    active = set(activity.places.tolist())
    chosen = choose(FEATURE, activity, corpus, settings(), seed=0)
    for (split, source), choice in chosen.items():
        places = choice.places.tolist()
        assert len(places) == len(set(places)) == (8 if source == "positive" else 12)
        assert set(corpus.splits[places]) == {split}
        if source == "positive":
            assert set(places) <= active
        else:
            assert not set(places) & set(chosen[split, "positive"].places.tolist())
        if source.endswith("_negative"):
            assert not set(places) & active


def test_similar_negatives_are_the_nearest_of_the_whole_corpus(corpus, activity):
    chosen = choose(FEATURE, activity, corpus, settings(), seed=0)
    train = [p for p in activity.places if corpus.splits[p] == "train"]
    active = set(activity.places.tolist())
    # Brute force: the mean of the cosines to every query, one sequence at a time.
    means = {p: np.mean([corpus.vectors[p] @ corpus.vectors[q] for q in train]) for p in range(600)}
    for split in ("train", "valid", "test"):
        silent = [p for p in range(600) if corpus.splits[p] == split and p not in active]
        best = sorted(silent, key=lambda p: -means[p])[:12]
        assert chosen[split, "similar_negative"].places.tolist() == best
        similarity = chosen[split, "similar_negative"].similarity[best]
        assert similarity == pytest.approx([means[p] for p in best], abs=1e-5)


def test_the_query_is_train_positives_only_and_the_strongest(corpus, activity):
    query = similarity_to_positives(activity, corpus, 5)
    train = [i for i, p in enumerate(activity.places) if corpus.splits[p] == "train"]
    strongest = sorted(train, key=lambda i: -activity.maxima[i])[:5]
    expected = corpus.vectors @ corpus.vectors[activity.places[strongest]].mean(0)
    assert query == pytest.approx(expected, abs=1e-6)


def test_chance_belongs_to_the_feature(corpus, activity):
    first = choose(FEATURE, activity, corpus, settings(), seed=0)
    np.random.default_rng(5).random(100)
    again = choose(FEATURE, activity, corpus, settings(), seed=0)
    other = choose(FeatureId("a", 2), activity, corpus, settings(), seed=0)
    key = ("train", "random_negative")
    assert first[key].places.tolist() == again[key].places.tolist() != other[key].places.tolist()
    # Another source in the config changes nothing about this one.
    fewer = choose(FEATURE, activity, corpus, settings(complementary=("random_negative",)), seed=0)
    assert fewer[key].places.tolist() == first[key].places.tolist()
    assert generator_for(0, FEATURE, "x").random() != generator_for(1, FEATURE, "x").random()


def test_nearest_breaks_ties_by_id():
    similarity = np.array([0.5, 0.9, 0.5, 0.5])
    allowed = np.array([True, False, True, True])
    assert nearest(similarity, allowed, np.array([30, 1, 10, 20]), 2).tolist() == [2, 3]


def test_a_weak_activation_is_never_hidden():
    assert displayed(np.array([0.0, 0.01, 0.49, 2.5, 4.6, 9.0])) == [0, 1, 1, 2, 5, 5]


def test_records_are_scaled_by_the_largest_train_activation(planted_run):
    records = load_records(planted_run.tables, FeatureId("planted", 2), ("train", "valid", "test"))
    for split, group in records.items():
        assert [r.source for r in group] == sorted((r.source for r in group), key=lambda s: (s != "positive", s))
        for record in group:
            truth = fires(FEATURES[2].truth, [token.strip() for token in record.sequence.tokens])
            assert record.activations == pytest.approx(truth, abs=1e-5), split
    top = max(r.activations.max() for r in records["train"])
    assert top == pytest.approx(5)


def test_no_document_is_in_two_splits_of_a_feature(planted_run):
    splits = defaultdict(set)
    for row in planted_run.tables.read("records", ["document_id", "split"]).to_pylist():
        splits[row["document_id"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_a_feature_without_records_has_rows_that_say_why(planted_run):
    rows = planted_run.tables.read("record_counts").to_pylist()
    by_feature = defaultdict(set)
    for row in rows:
        by_feature[row["feature"]].add(row["status"])
        found = f"feature_key = '{row['feature_key']}' and split = '{row['split']}' and source = '{row['source']}'"
        assert planted_run.tables.count("records", found) == row["found"] <= row["requested"]
    assert by_feature[3] == {"dead"} and by_feature[4] == {"dense"} and by_feature[5] == {"too_few"}
    assert by_feature[0] == {"ok"}


def test_embeddings_are_normalised_and_complete(planted_run):
    table = planted_run.tables.read("embeddings")
    assert np.linalg.norm(to_matrix(table), axis=1) == pytest.approx(1, abs=2e-3)
    assert set(table["sequence_id"].to_pylist()) == planted_run.tables.distinct("sequences", "sequence_id")
