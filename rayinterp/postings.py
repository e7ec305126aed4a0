"""Posting lists: where each feature is active in a shard, and what the lists of all shards say of a feature.

    sparse activations of a shard -> one row of `activations` per active feature    (`to_postings`)
    a feature's rows over all shards -> one row of `features`                        (`feature_statistics`)

A row carries a sketch of its values, so that quantiles over the corpus come from adding up sketches: positions and
values are written once and not read again until someone asks for the feature. This module knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayinterp.config import HarvestConfig
from rayinterp.subject import SparseActivations
from rayinterp.tables import SCHEMAS, Tables

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MARKER = -1
"""The `feature` of the row that says a shard is finished."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

ACCURACY = 0.01
"""Relative error of a quantile."""
GAMMA = (1 + ACCURACY) / (1 - ACCURACY)


def sketch(values: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Logarithmic bucket of each positive value: (GAMMA^(b-1), GAMMA^b].

    Counts per bucket add up exactly and in any order, and give every quantile within ACCURACY: DDSketch (Masson, Rim
    and Lee, VLDB 2019), section 2.
    """
    return np.ceil(np.log(values.astype(np.float64)) / np.log(GAMMA)).astype(np.int16)


def sketch_quantiles(
    buckets: Int[np.ndarray, "m"], counts: Int[np.ndarray, "m"], quantiles: Sequence[float]
) -> Float[np.ndarray, "q"]:
    """Quantiles of the values behind a sketch; buckets may repeat."""
    order = np.argsort(buckets, kind="stable")
    below = np.cumsum(counts[order])
    ranks = np.asarray(quantiles) * (below[-1] - 1)
    chosen = buckets[order][np.searchsorted(below, ranks, side="right")]
    return 2 * GAMMA ** chosen.astype(np.float64) / (GAMMA + 1)


def join_batches(batches: Sequence[SparseActivations]) -> SparseActivations:
    """The batches of a shard as one, rows counted through."""
    starts = np.cumsum([0, *(len(batch.norms) for batch in batches)])
    rows = [batch.rows + start for batch, start in zip(batches, starts, strict=False)]
    joined = (np.concatenate([getattr(batch, name) for batch in batches]) for name in SparseActivations._fields[1:])
    return SparseActivations(np.concatenate(rows), *joined)


def to_postings(activations: SparseActivations, sae: str, features: Sequence[int], shard: int) -> pa.Table:
    """Rows of `activations`: one per feature that is active in the shard, in ascending order."""
    schema = SCHEMAS["activations"]
    if len(activations.values) == 0:
        return schema.empty_table()
    # 16 bits are sorted by radix, in linear time.
    key = activations.columns.astype(np.uint16) if len(features) <= 1 << 16 else activations.columns
    order = np.argsort(key, kind="stable")
    columns, rows, values = activations.columns[order], activations.rows[order], activations.values[order]
    starts = _starts(columns[1:] != columns[:-1])
    row_starts = _starts((columns[1:] != columns[:-1]) | (rows[1:] != rows[:-1]))
    ends = np.append(starts[1:], len(columns))
    owner = np.searchsorted(starts, row_starts, side="right") - 1
    """Which active feature each row belongs to."""
    num_rows = np.bincount(owner)
    offsets = np.empty(len(row_starts) + len(starts), dtype=np.int32)
    offsets[np.arange(len(row_starts)) + owner] = row_starts - starts[owner]
    offsets[np.cumsum(num_rows) + np.arange(len(starts))] = ends - starts
    ids = np.asarray(features, dtype=np.int32)[columns[starts]]
    buckets, counts, num_buckets = _histograms(values, starts)
    arrays = {
        "feature_key": [f"{sae}/{i}" for i in ids.tolist()],
        "sae": [sae] * len(ids),
        "feature": ids,
        "shard": np.full(len(ids), shard, dtype=np.int32),
        "rows": _lists(rows[row_starts].astype(np.int32), num_rows),
        "max_activations": _lists(np.maximum.reduceat(values, row_starts), num_rows),
        "offsets": _lists(offsets, num_rows + 1),
        "positions": _lists(activations.positions[order].astype(np.uint16), ends - starts),
        "values": _lists(values, ends - starts),
        "sum": np.add.reduceat(values.astype(np.float64), starts),
        "histogram_buckets": _lists(buckets, num_buckets),
        "histogram_counts": _lists(counts, num_buckets),
    }
    nulls = {field.name: pa.nulls(len(ids), field.type) for field in schema if field.name not in arrays}
    return pa.table({**arrays, **nulls}, schema=schema)


def _starts(changes: Bool[np.ndarray, "n-1"]) -> Int[np.ndarray, "m"]:
    return np.append(0, np.flatnonzero(changes) + 1)


def _lists(values: np.ndarray, lengths: Int[np.ndarray, "m"]) -> pa.ListArray:
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _histograms(
    values: Float[np.ndarray, "n"], starts: Int[np.ndarray, "m"]
) -> tuple[Int[np.ndarray, "b"], Int[np.ndarray, "b"], Int[np.ndarray, "m"]]:
    """(buckets, counts, buckets per feature) of values that lie feature by feature."""
    lengths = np.diff(np.append(starts, len(values)))
    owner = np.repeat(np.arange(len(starts)), lengths)
    low = np.iinfo(np.int16).min
    keys, counts = np.unique(owner << 16 | sketch(values).astype(np.int64) - low, return_counts=True)
    return (
        ((keys & 0xFFFF) + low).astype(np.int16),
        counts.astype(np.int32),
        np.bincount(keys >> 16, minlength=len(starts)),
    )


class Place(NamedTuple):
    """Where the sequences of the corpus lie, by shard and row."""

    sequence_ids: Int[np.ndarray, "sequences"]
    """In (shard, row) order."""
    is_train: Bool[np.ndarray, "sequences"]
    shard_starts: Int[np.ndarray, "shards+1"]


def places(tables: Tables) -> Place:
    sequences = tables.read("sequences", ["sequence_id", "split", "shard", "row"])
    sequences = sequences.sort_by([("shard", "ascending"), ("row", "ascending")])
    shard = sequences["shard"].to_numpy()
    return Place(
        sequences["sequence_id"].to_numpy(),
        np.asarray(sequences["split"].to_pylist()) == "train",
        np.searchsorted(shard, np.arange(shard[-1] + 2)),
    )


STATISTICS = ("feature", "shard", "rows", "max_activations", "sum", "histogram_buckets", "histogram_counts")
"""Columns of `activations` that statistics are made of."""


def feature_statistics(
    sae: str, features: Sequence[int], postings: pa.Table, place: Place, num_tokens: int, config: HarvestConfig
) -> pa.Table:
    """Rows of `features` from the posting lists of some features of one SAE, in any order."""
    postings = postings.sort_by([("feature", "ascending"), ("shard", "ascending")])
    feature, shards = postings["feature"].to_numpy(), postings["shard"].to_numpy()
    rows, num_rows = _flat(postings, "rows")
    where = np.repeat(place.shard_starts[shards], num_rows) + rows
    maxima, _ = _flat(postings, "max_activations")
    buckets, num_buckets = _flat(postings, "histogram_buckets")
    counts, _ = _flat(postings, "histogram_counts")
    row_ends, bucket_ends = (np.append(0, np.cumsum(lengths)) for lengths in (num_rows, num_buckets))
    found = []
    for index in features:
        lists = slice(*np.searchsorted(feature, [index, index + 1]))
        row: dict[str, Any] = {"feature_key": f"{sae}/{index}", "sae": sae, "feature": index}
        if lists.start == lists.stop:
            zeros = {"num_sequences": 0, "num_tokens": 0, "density": 0.0, "max_activation": 0.0}
            found.append({**row, **zeros, "quantiles": [], "top_sequence_ids": [], "top_activations": []})
            found[-1]["status"] = "dead"
            continue
        own = slice(row_ends[lists.start], row_ends[lists.stop])
        bins = slice(bucket_ends[lists.start], bucket_ends[lists.stop])
        num_values = int(counts[bins].sum())
        sequence_ids, top = place.sequence_ids[where[own]], maxima[own]
        train = place.is_train[where[own]]
        # Ties go to the smaller sequence id, so that the order is a function of the corpus.
        order = np.lexsort((sequence_ids, -top))[: config.num_top]
        density = num_values / num_tokens
        few = int(train.sum()) < config.min_sequences
        quantiles = sketch_quantiles(buckets[bins], counts[bins], QUANTILES)
        found.append(
            {
                **row,
                "num_sequences": len(top),
                "num_tokens": num_values,
                "density": density,
                "max_activation": float(top[train].max()) if train.any() else 0.0,
                "mean_activation": float(postings["sum"].to_numpy()[lists].sum() / num_values),
                "quantiles": np.minimum(quantiles, top.max()).astype(np.float32),
                "top_sequence_ids": sequence_ids[order],
                "top_activations": top[order],
                "status": "dense" if density > config.max_density else "too_few" if few else "live",
            }
        )
    return pa.Table.from_pylist(found, SCHEMAS["features"])


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, Int[np.ndarray, "rows"]]:
    """A list column's values side by side, and the length of each list."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy())
