import numpy as np
import pytest

from rayinterp.nearest import VectorBlock, exact_search


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def blocks(vectors, num_blocks, seed=0):
    order = np.random.default_rng(seed).permutation(len(vectors))
    for places in np.array_split(order, num_blocks):
        yield VectorBlock(places, vectors[places])


def brute_force(vectors, query, excluded, splits, split, k):
    similarity = vectors.astype(np.float64) @ query.astype(np.float64)
    allowed = [p for p in range(len(vectors)) if splits[p] == split and p not in set(excluded.tolist())]
    return sorted(allowed, key=lambda p: (-similarity[p], p))[:k]


@pytest.mark.parametrize("num_blocks", [1, 7])
def test_the_search_finds_what_a_scan_of_the_whole_corpus_finds(num_blocks):
    rng = np.random.default_rng(0)
    vectors, queries, splits = unit(rng, 2000, 24), unit(rng, 9, 24) * 0.3, rng.integers(3, size=2000)
    excluded = [np.sort(rng.choice(2000, 40 * n, replace=False)) for n in range(9)]
    found = exact_search(blocks(vectors, num_blocks), queries, excluded, splits, 3, k=30)
    for query in range(9):
        for split in range(3):
            hits = found[query][split]
            expected = brute_force(vectors, queries[query], excluded[query], splits, split, 30)
            assert hits.places.tolist() == expected
            assert hits.similarity == pytest.approx(vectors[expected].astype(np.float64) @ queries[query], abs=1e-12)


def test_the_answer_does_not_depend_on_blocks_or_on_other_queries():
    rng = np.random.default_rng(1)
    vectors, queries, splits = unit(rng, 500, 16), unit(rng, 20, 16), rng.integers(2, size=500)
    excluded = [np.array([], dtype=int)] * 20
    together = exact_search(blocks(vectors, 3), queries, excluded, splits, 2, k=10)
    alone = exact_search(blocks(vectors, 5, seed=4), queries[7:8], excluded[:1], splits, 2, k=10)
    for split in range(2):
        assert together[7][split].places.tolist() == alone[0][split].places.tolist()
        assert together[7][split].similarity.tolist() == alone[0][split].similarity.tolist()


def test_equal_vectors_come_in_the_order_of_their_places():
    vectors = np.tile(unit(np.random.default_rng(2), 1, 8), (50, 1))
    found = exact_search(blocks(vectors, 4), vectors[:1], [np.array([0, 2])], np.zeros(50, dtype=int), 1, k=5)
    assert found[0][0].places.tolist() == [1, 3, 4, 5, 6]


def test_a_split_that_is_too_small_gives_what_it_has():
    rng = np.random.default_rng(3)
    vectors, splits = unit(rng, 30, 8), np.array([0] * 27 + [1] * 3)
    found = exact_search(blocks(vectors, 2), vectors[:1], [np.array([28])], splits, 3, k=10)
    assert [len(hits.places) for hits in found[0]] == [10, 2, 0]


def test_planted_near_duplicates_of_the_query_are_found():
    rng = np.random.default_rng(4)
    vectors, splits = unit(rng, 5000, 48), np.zeros(5000, dtype=int)
    planted = {}
    queries = unit(rng, 20, 48)
    for query in range(20):
        places = rng.choice(5000, 10, replace=False)
        near = queries[query] + rng.normal(0, 0.02, (10, 48))
        vectors[places] = near / np.linalg.norm(near, axis=1, keepdims=True)
        planted[query] = set(places.tolist())
    found = exact_search(blocks(vectors, 6), queries, [np.array([], dtype=int)] * 20, splits, 1, k=30)
    # A later query may have overwritten an earlier one's.
    recall = [len(planted[q] & set(found[q][0].places.tolist())) / 10 for q in range(15, 20)]
    assert np.mean(recall) >= 0.99
