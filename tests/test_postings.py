import numpy as np
import pytest
import torch

from rayinterp.config import HarvestConfig
from rayinterp.postings import (
    ACCURACY,
    QUANTILES,
    Place,
    feature_statistics,
    join_batches,
    sketch,
    sketch_quantiles,
    to_postings,
)
from rayinterp.subject import sparsify


def sparse(dense):
    return sparsify(torch.as_tensor(dense, dtype=torch.float32), torch.ones(dense.shape[:2]))


def random_activations(seed, rows=12, seq=6, k=9, share=0.1):
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 2, (rows, seq, k)) * (rng.random((rows, seq, k)) < share)


def rebuild(table, features, shape, shard):
    """The dense activations that posting lists stand for."""
    dense = np.zeros(shape, dtype=np.float32)
    for row in table.to_pylist():
        assert row["shard"] == shard and row["feature_key"] == f"a/{row['feature']}"
        assert row["rows"] == sorted(set(row["rows"])) and row["offsets"][0] == 0
        assert row["offsets"][-1] == len(row["positions"]) == len(row["values"])
        for i, sequence in enumerate(row["rows"]):
            span = slice(row["offsets"][i], row["offsets"][i + 1])
            dense[sequence, row["positions"][span], features.index(row["feature"])] = row["values"][span]
            assert row["max_activations"][i] == max(row["values"][span])
    return dense


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_posting_lists_hold_the_non_zeros_and_nothing_else(share):
    dense, features = random_activations(0, share=share), [2, 3, 5, 7, 11, 13, 17, 19, 23]
    dense[:, :, 4] = 0
    batches = [sparse(dense[:5]), sparse(dense[5:6]), sparse(dense[6:])]
    table = to_postings(join_batches(batches), "a", features, shard=7)
    assert table["feature"].to_pylist() == [f for c, f in enumerate(features) if dense[:, :, c].any()]
    np.testing.assert_array_equal(rebuild(table, features, dense.shape, 7), dense.astype(np.float32))


def test_more_features_than_sixteen_bits_keep_their_order():
    dense = np.zeros((2, 3, 70_000))
    dense[1, 0, [1, 65_535, 65_536, 69_999]] = [1, 2, 3, 4]
    table = to_postings(sparse(dense), "a", range(70_000), shard=0)
    assert table["feature"].to_pylist() == [1, 65_535, 65_536, 69_999]
    assert table["values"].to_pylist() == [[1], [2], [3], [4]]


def test_a_shard_without_activations_gives_no_rows():
    assert to_postings(sparse(np.zeros((2, 3, 4))), "a", range(4), shard=0).num_rows == 0


def test_quantiles_of_added_sketches_are_those_of_all_values_within_the_accuracy():
    rng = np.random.default_rng(0)
    parts = [rng.lognormal(mean, 3, 1000) for mean in (-4, 0, 5)]
    buckets = np.concatenate([sketch(part) for part in parts])
    found = sketch_quantiles(buckets, np.ones(len(buckets), dtype=int), QUANTILES)
    expected = np.quantile(np.concatenate(parts), QUANTILES, method="lower")
    assert np.abs(found / expected - 1).max() <= ACCURACY * 1.0001


def statistics(shards, order, features=(0, 1, 2), **config):
    """Statistics of shards of dense activations; every third sequence is not of train."""
    tables = [to_postings(sparse(shards[s]), "a", range(9), s) for s in order]
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    ids = np.arange(starts[-1]) * 10
    place = Place(ids, np.arange(len(ids)) % 3 != 0, starts)
    num_tokens = sum(shard[:, :, 0].size for shard in shards)
    import pyarrow as pa

    return feature_statistics("a", features, pa.concat_tables(tables), place, num_tokens, HarvestConfig(**config))


def test_statistics_are_those_of_the_dense_activations():
    shards = [random_activations(seed) for seed in range(3)]
    dense = np.concatenate(shards)[:, :, 1].astype(np.float32)
    row = statistics(shards, [0, 1, 2], min_sequences=5, max_density=0.9, num_top=4).to_pylist()[1]
    maxima = dense.max(1)
    assert row["num_sequences"] == (maxima > 0).sum()
    assert row["num_tokens"] == (dense > 0).sum()
    assert row["density"] == (dense > 0).mean()
    assert row["max_activation"] == maxima[np.arange(36) % 3 != 0].max()
    assert row["mean_activation"] == pytest.approx(dense[dense > 0].mean(), rel=1e-6)
    best = np.argsort(-maxima, kind="stable")[:4]
    assert row["top_sequence_ids"] == (best * 10).tolist()
    assert row["top_activations"] == maxima[best].tolist()
    assert row["status"] == "live"


def test_statistics_do_not_depend_on_the_order_in_which_shards_were_committed():
    shards = [random_activations(seed) for seed in range(3)]
    assert statistics(shards, [0, 1, 2]).equals(statistics(shards, [2, 0, 1]))


def test_dead_dense_and_rare_features_get_their_status():
    dense = np.zeros((12, 6, 9))
    dense[:, :, 1] = 1
    dense[4, 2, 2] = 3
    rows = statistics([dense], [0], min_sequences=2).to_pylist()
    assert [row["status"] for row in rows] == ["dead", "dense", "too_few"]
    assert (rows[0]["max_activation"], rows[0]["mean_activation"]) == (0, None)


def test_equal_maxima_are_ordered_by_sequence_id():
    dense = np.zeros((12, 6, 9))
    dense[[7, 3, 5], 0, 0] = 2
    row = statistics([dense[:6], dense[6:]], [1, 0]).to_pylist()[0]
    assert row["top_sequence_ids"] == [30, 50, 70]
