import shutil
from collections import defaultdict

import numpy as np
import pytest

from rayinterp.config import IndexConfig, RecordsConfig, SplitQuota
from rayinterp.errors import UserError
from rayinterp.feature_id import FeatureId
from rayinterp.index import TableVectors, build_index, to_matrix
from rayinterp.nearest import VectorBlock, exact_search
from rayinterp.planted import FEATURES, fires
from rayinterp.projection import learn_projection, projected_similarity
from rayinterp.records import displayed, load_corpus, load_records
from rayinterp.sources import (
    SPLITS,
    WIDE,
    Activity,
    Corpus,
    Neighbour,
    choose_block,
    choose_positives,
    generator_for,
    nearest_directions,
    query_places,
)
from rayinterp.tables import Tables

FEATURE = FeatureId("a", 1)
OTHER = FeatureId("a", 2)
ALL_SOURCES = ("random", "random_negative", "similar", "similar_negative", "similar_projected",
    "similar_projected_negative", "neighbour")  # fmt: skip
TRAIN = SPLITS.index("train")


class MemoryVectors:
    """Vectors at hand, handed out in two blocks that are not in order."""

    def __init__(self, matrix, splits):
        self.matrix, self.splits = matrix, splits

    def gather(self, places):
        return self.matrix[places]

    def search(self, queries, excluded, k):
        return exact_search(self.blocks(), queries, excluded, self.splits, len(SPLITS), k)

    def blocks(self):
        for places in np.array_split(np.random.default_rng(9).permutation(len(self.matrix)), 2):
            yield VectorBlock(places, self.matrix[places])


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    return Corpus(np.arange(600) * 7, np.arange(600) // 3, rng.choice(3, 600), np.zeros((600, 2), int))


@pytest.fixture
def vectors(corpus):
    matrix = np.random.default_rng(2).normal(size=(600, 8)).astype(np.float32)
    return MemoryVectors(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), corpus.splits)


def random_activity(seed):
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(600, 120, replace=False))
    maxima = rng.random(120).astype(np.float32) + 0.1
    return Activity(places, maxima, [np.array([0])] * 120, [np.array([m]) for m in maxima])


@pytest.fixture
def activity():
    return random_activity(1)


def settings(**values):
    quota = SplitQuota(positive=8, complementary=12)
    return RecordsConfig(**{"complementary": ALL_SOURCES, "train": quota, "valid": quota, "test": quota, **values})


def choose(feature, activity, corpus, vectors, config, seed=0):
    """The records of one feature, whose one neighbour is OTHER."""
    neighbours, others = {feature: [Neighbour(OTHER, 0.8)]}, {OTHER: random_activity(3)}
    return choose_block({feature: activity}, corpus, vectors, config, seed, neighbours, others)[feature]


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


def test_a_short_pool_is_short_and_never_refilled(corpus, vectors, activity):
    train = np.flatnonzero(corpus.splits[activity.places] == TRAIN)[:2]
    few = Activity(activity.places[train], activity.maxima[train], [], [])
    chosen = choose(FEATURE, few, corpus, vectors, settings(), seed=0)
    assert sum(len(chosen[split, "positive"].places) for split in SPLITS) == 2
    crowded = settings(test=SplitQuota(positive=8, complementary=500))
    chosen = choose(FEATURE, activity, corpus, vectors, crowded)
    silent = (corpus.splits == SPLITS.index("test")).sum() - (corpus.splits[activity.places] == 2).sum()
    assert len(chosen["test", "random_negative"].places) == len(chosen["test", "similar_negative"].places) == silent


def assert_source_holds(chosen, split, source, active):
    """A positive is active and no complementary record; what is called silent is."""
    places = set(chosen[split, source].places.tolist())
    if source == "positive":
        assert places <= active
    else:
        assert not places & set(chosen[split, "positive"].places.tolist())
    if source.endswith("_negative") or source == "neighbour":
        assert not places & active


def test_every_record_lies_in_its_split_and_negatives_are_silent(corpus, vectors, activity):
    active = set(activity.places.tolist())
    chosen = choose(FEATURE, activity, corpus, vectors, settings())
    assert {source for _, source in chosen} == {"positive", *ALL_SOURCES}
    for (split, source), choice in chosen.items():
        places = choice.places.tolist()
        assert len(places) == len(set(places)) == (8 if source == "positive" else 12), source
        assert set(corpus.splits[places]) == {SPLITS.index(split)}
        assert_source_holds(chosen, split, source, active)


@pytest.mark.parametrize("source", ["similar", "similar_negative"])
def test_similar_records_are_the_nearest_of_the_whole_corpus(corpus, vectors, activity, source):
    chosen = choose(FEATURE, activity, corpus, vectors, settings())
    matrix = vectors.matrix.astype(np.float64)
    train = [p for p in activity.places if corpus.splits[p] == TRAIN]
    positives = {p for split in SPLITS for p in chosen[split, "positive"].places.tolist()}
    forbidden = set(activity.places.tolist()) if source == "similar_negative" else positives
    # Brute force: the mean of the cosines to every query, one sequence at a time.
    means = {p: np.mean([matrix[p] @ matrix[q] for q in train]) for p in range(600)}
    for code, split in enumerate(SPLITS):
        allowed = [p for p in range(600) if corpus.splits[p] == code and p not in forbidden]
        best = sorted(allowed, key=lambda p: -means[p])[:12]
        assert chosen[split, source].places.tolist() == best
        assert chosen[split, source].similarity == pytest.approx([means[p] for p in best], abs=1e-6)


@pytest.mark.parametrize("source", ["similar_projected", "similar_projected_negative"])
def test_projected_records_are_the_nearest_of_a_wide_pool_after_the_projection(corpus, vectors, activity, source):
    chosen = choose(FEATURE, activity, corpus, vectors, settings())
    wide = settings(**{split: SplitQuota(positive=8, complementary=12 * WIDE) for split in SPLITS})
    pools = choose(FEATURE, activity, corpus, vectors, wide)
    query = query_places(activity, corpus, 400)
    generator = generator_for(0, FEATURE, "projection")
    silent = np.setdiff1d(np.flatnonzero(corpus.splits == TRAIN), activity.places)
    shown = np.sort(generator.permutation(silent)[:400])
    projection = learn_projection(vectors.matrix[query], vectors.matrix[shown], generator)
    plain = source.replace("_projected", "")
    for split in SPLITS:
        pool = pools[split, plain].places
        projected = vectors.matrix.astype(float) @ projection
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        means = {p: np.mean([projected[p] @ projected[q] for q in query]) for p in pool.tolist()}
        best = sorted(means, key=lambda p: -means[p])[:12]
        assert chosen[split, source].places.tolist() == best
        assert chosen[split, source].places.tolist() != chosen[split, plain].places.tolist()


def test_a_projection_brings_positives_of_one_kind_together():
    rng, shift = np.random.default_rng(0), 0.6
    # What the positives share stands in one coordinate; the other nineteen are louder and say nothing.
    positives, silent = rng.normal(size=(60, 20)), rng.normal(size=(200, 20))
    positives[:, 0], silent[:, 0] = shift, -shift
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (positives, silent)]
    projection = learn_projection(*unit, np.random.default_rng(1))
    held_out = rng.normal(size=(100, 20))
    held_out[:50, 0], held_out[50:, 0] = shift, -shift
    held_out /= np.linalg.norm(held_out, axis=1, keepdims=True)
    plain = held_out @ unit[0].mean(0)
    learned = projected_similarity(held_out, unit[0], projection)

    def separation(similarity):
        return (similarity[:50].mean() - similarity[50:].mean()) / similarity.std()

    assert separation(learned) > 1.3 * separation(plain)  # seen: 1.96 against 1.26; 2 is the most there is
    assert learn_projection(unit[0][:3], unit[1], np.random.default_rng(1)) is None


def test_a_feature_that_is_active_everywhere_in_train_has_short_sources_and_no_error(corpus, vectors):
    places = np.flatnonzero(corpus.splits == TRAIN)
    everywhere = Activity(places, np.ones(len(places), dtype=np.float32), [], [])
    chosen = choose(FEATURE, everywhere, corpus, vectors, settings())
    assert len(chosen["train", "similar_projected_negative"].places) == 0
    assert len(chosen["train", "random_negative"].places) == len(chosen["train", "neighbour"].places) == 0
    assert len(chosen["test", "similar_projected_negative"].places) == 12
    assert len(chosen["test", "positive"].places) == 0


def test_neighbours_are_the_strongest_of_the_closest_feature_that_this_one_is_silent_on(corpus, vectors, activity):
    close, far = random_activity(3), random_activity(4)
    few = Activity(close.places[::8], close.maxima[::8], [], [])
    neighbours = {
        FEATURE: [Neighbour(OTHER, 0.8), Neighbour(FeatureId("a", 3), 0.5), Neighbour(FeatureId("a", 4), 0.1)]
    }
    others = {OTHER: few, FeatureId("a", 3): far}
    config = settings(complementary=("neighbour",))
    chosen = choose_block({FEATURE: activity}, corpus, vectors, config, 0, neighbours, others)[FEATURE]
    active = set(activity.places.tolist())
    for code, split in enumerate(SPLITS):
        expected = []
        for other in (few, far):
            for place, _ in sorted(zip(other.places.tolist(), -other.maxima, strict=True), key=lambda pair: pair[1]):
                if corpus.splits[place] == code and place not in active and place not in expected:
                    expected.append(place)
        found = chosen[split, "neighbour"]
        assert found.places.tolist() == expected[:12]
        from_close = sum(place in set(few.places.tolist()) for place in expected[:12])
        assert 0 < from_close < 12
        assert found.similarity.tolist()[:from_close] == [0.8] * from_close
    alone = choose_block({FEATURE: activity}, corpus, vectors, config, 0, {}, {})[FEATURE]
    assert len(alone["train", "neighbour"].places) == 0


def test_the_closest_decoder_directions_of_the_same_sae():
    directions = {"a": np.array([[1.0, 0], [0.9, 0.1], [-1, 0], [0, 0], [0.5, 0.5]]), "b": np.array([[1.0, 0]])}
    found = nearest_directions(directions, {"a": [3, 5, 7, 9, 11], "b": [0]}, count=2)
    assert [str(n.feature) for n in found[FeatureId("a", 3)]] == ["a/5", "a/11"]
    assert found[FeatureId("a", 3)][1].cosine == pytest.approx(0.5**0.5)
    assert found[FeatureId("a", 7)] == found[FeatureId("a", 9)] == found[FeatureId("b", 0)] == []


def test_the_query_is_train_positives_only_and_the_strongest(corpus, activity):
    train = [i for i, p in enumerate(activity.places) if corpus.splits[p] == TRAIN]
    strongest = sorted(train, key=lambda i: -activity.maxima[i])[:5]
    assert query_places(activity, corpus, 5).tolist() == activity.places[strongest].tolist()


def test_chance_belongs_to_the_feature(corpus, vectors, activity):
    first = choose(FEATURE, activity, corpus, vectors, settings())
    np.random.default_rng(5).random(100)
    again = choose(FEATURE, activity, corpus, vectors, settings())
    other = choose(FeatureId("a", 9), activity, corpus, vectors, settings())
    key = ("train", "random_negative")
    assert first[key].places.tolist() == again[key].places.tolist() != other[key].places.tolist()
    # Another source in the config, or another feature in the block, changes nothing about this one.
    fewer = choose(FEATURE, activity, corpus, vectors, settings(complementary=("random_negative",)))
    assert fewer[key].places.tolist() == first[key].places.tolist()
    assert generator_for(0, FEATURE, "x").random() != generator_for(1, FEATURE, "x").random()
    block = {FeatureId("a", n): random_activity(n) for n in range(10, 15)} | {FEATURE: activity}
    neighbours, others = {FEATURE: [Neighbour(OTHER, 0.8)]}, {OTHER: random_activity(3)}
    together = choose_block(block, corpus, vectors, settings(), 0, neighbours, others)[FEATURE]
    assert {key: choice.places.tolist() for key, choice in together.items()} == {
        key: choice.places.tolist() for key, choice in first.items()
    }


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


def test_no_document_and_no_text_is_in_two_splits(planted_run):
    splits = defaultdict(set)
    for row in planted_run.tables.read("records", ["document_id", "tokens", "split"]).to_pylist():
        splits[row["document_id"]].add(row["split"])
        splits[" ".join("".join(row["tokens"]).split())].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_corpus_no_source_takes_a_document_over_a_split(seed):
    """A property of all sources: documents of any size, features that share most of them, quotas that run short."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(60, 500))
    documents = np.sort(rng.integers(0, max(3, size // int(rng.integers(1, 20))), size))
    split_of_document = rng.choice(3, documents.max() + 1, p=(0.4, 0.3, 0.3))
    corpus = Corpus(np.arange(size) * 3, documents, split_of_document[documents], np.zeros((size, 2), int))
    matrix = rng.normal(size=(size, 6)).astype(np.float32)
    vectors = MemoryVectors(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), corpus.splits)
    activities = {}
    for index in range(3):
        places = np.sort(rng.choice(size, int(rng.integers(1, size)), replace=False))
        if not (corpus.splits[places] == TRAIN).any():
            places = np.union1d(places, np.flatnonzero(corpus.splits == TRAIN)[:1])
        maxima = rng.random(len(places)).astype(np.float32) + 0.01
        activities[FeatureId("a", index)] = Activity(places, maxima, [], [])
    neighbours = {
        feature: [Neighbour(other, 0.5) for other in activities if other != feature] for feature in activities
    }
    quota = SplitQuota(positive=int(rng.integers(0, 40)), complementary=int(rng.integers(0, 60)))
    config = settings(train=quota, valid=quota, test=quota, positive=rng.choice(["top", "quantile", "mix"]))
    for feature, chosen in choose_block(activities, corpus, vectors, config, seed, neighbours, activities).items():
        active = set(activities[feature].places.tolist())
        split_of = defaultdict(set)
        for (split, source), choice in chosen.items():
            places = choice.places.tolist()
            assert len(places) == len(set(places)) <= (quota.positive if source == "positive" else quota.complementary)
            assert set(corpus.splits[places]) <= {SPLITS.index(split)}
            for document in documents[places].tolist():
                split_of[document].add(split)
            assert_source_holds(chosen, split, source, active)
        assert all(len(splits) == 1 for splits in split_of.values())


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


def test_vectors_of_a_run_come_by_place(planted_run):
    corpus = load_corpus(planted_run.tables)
    vectors = TableVectors(planted_run.tables, corpus, planted_run.config.index)
    table = planted_run.tables.read("embeddings").sort_by("sequence_id")
    matrix = to_matrix(table)
    places = np.array([7, 3, 3, 2999, 0])
    assert np.array_equal(vectors.gather(places), matrix[places])
    assert vectors.gather(places[:0]).shape == (0, 384)
    rebuilt = np.zeros_like(matrix)
    for block in vectors.blocks():
        rebuilt[block.places] = block.vectors
    assert np.array_equal(rebuilt, matrix)


def test_the_index_finds_what_the_exact_search_finds_and_goes_wider_past_what_is_excluded(planted_run, tmp_path):
    shutil.copytree(planted_run.tables.uri("embeddings"), Tables(str(tmp_path)).uri("embeddings"))
    tables, corpus = Tables(str(tmp_path)), load_corpus(planted_run.tables)
    with pytest.raises(UserError, match=r"IVF_PQ.*65,536.*3,000.*index\.search=exact"):
        build_index(IndexConfig(search="index"), tables, num_workers=1)
    config = IndexConfig(search="index", kind="IVF_FLAT")
    build_index(config, tables, num_workers=1)
    assert tables.has_vector_index("embeddings") and tables.is_finished("embeddings")
    exact = TableVectors(tables, corpus, IndexConfig(search="exact"))
    by_index = TableVectors(tables, corpus, config)
    matrix = exact.gather(np.arange(len(corpus.sequence_ids)))
    queries = np.stack([matrix[start : start + 20].mean(0) for start in range(0, 600, 60)])
    # Of the first query the nearest 300 of each split may not be found; of the second, nothing may.
    near = exact.search(queries[:1], [np.array([], dtype=int)], 300)[0]
    excluded = [np.concatenate([hits.places for hits in near]), np.arange(3000), *[np.array([], dtype=int)] * 8]
    expected, found = exact.search(queries, excluded, 30), by_index.search(queries, excluded, 30)
    recalls = []
    for query in range(10):
        for ours, theirs in zip(found[query], expected[query], strict=True):
            assert not set(ours.places.tolist()) & set(excluded[query].tolist())
            assert list(ours.similarity) == sorted(ours.similarity, reverse=True)
            assert len(ours.places) == len(theirs.places) == (0 if query == 1 else 30)
            recalls.append(len(set(ours.places.tolist()) & set(theirs.places.tolist())) / max(1, len(theirs.places)))
    assert np.mean([recall for recall in recalls if recall]) > 0.95


def test_auto_takes_the_index_from_the_size_that_the_config_names():
    config = IndexConfig(exact_below=1000)
    assert [config.uses_index(n) for n in (999, 1000)] == [False, True]
    assert not IndexConfig(search="exact", exact_below=1).uses_index(10)
    assert IndexConfig(search="index").uses_index(1)


def test_a_table_without_a_vector_index_is_refused_where_the_config_asks_for_one(planted_run):
    with pytest.raises(UserError, match=r"no vector index of embeddings.*index stage.*index\.search=exact"):
        TableVectors(planted_run.tables, load_corpus(planted_run.tables), IndexConfig(search="index"))
    with pytest.raises(UserError, match="no embeddings; run the index stage"):
        TableVectors(Tables("nowhere"), load_corpus(planted_run.tables), IndexConfig())
