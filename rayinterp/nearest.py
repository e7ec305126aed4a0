"""Nearest sequences by sentence embedding: many queries at once, over the whole corpus, exactly.

    vectors, block by block  x  queries of a block of features  ->  best of each split so far  ->  best of each split

Memory follows the block and the number of queries, not the corpus. Candidates come from single-precision products, a
few more than asked for; what is kept is ordered by products in double precision, ties by sequence id, so that the
answer does not depend on which queries share a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MARGIN = 16
"""Candidates kept beyond those asked for, since single precision may order close ones differently."""


class VectorBlock(NamedTuple):
    """A stretch of the corpus."""

    places: Int[np.ndarray, "n"]
    """Places in the corpus (the order of sequence ids)."""
    vectors: Float[np.ndarray, "n d"]
    """L2-normalised, float32."""


class Hits(NamedTuple):
    """What one query found in one split, best first; fewer than asked for where the split has no more."""

    places: Int[np.ndarray, "k"]
    similarity: Float[np.ndarray, "k"]


def exact_search(
    blocks: Iterable[VectorBlock],
    queries: Float[np.ndarray, "q d"],
    excluded: Sequence[Int[np.ndarray, "_"]],
    splits: Int[np.ndarray, "corpus"],
    num_splits: int,
    k: int,
) -> list[list[Hits]]:
    """The `k` places nearest to each query in each split, by dot product: `[query][split]`.

    Args:
        excluded: Places that a query must not find, by query.
        splits: Split of every place in the corpus, 0 to num_splits - 1.
    """
    kept = k + MARGIN
    best = np.full((num_splits, len(queries), kept), -np.inf)
    best_places = np.full((num_splits, len(queries), kept), len(splits))
    column = np.full(len(splits), -1, dtype=np.int64)
    for places, vectors in blocks:
        similarity = queries.astype(np.float32) @ vectors.T
        column[places] = np.arange(len(places))
        for query, out in enumerate(excluded):
            own = column[out]
            similarity[query, own[own >= 0]] = -np.inf
        column[places] = -1
        of_split = splits[places]
        for split in range(num_splits):
            columns = np.flatnonzero(of_split == split)
            candidates = columns[_top(similarity, columns, kept)]
            allowed = np.isfinite(np.take_along_axis(similarity, candidates, axis=1))
            exact = np.einsum("qkd,qd->qk", vectors[candidates].astype(np.float64), queries.astype(np.float64))
            merged = np.concatenate([best[split], np.where(allowed, exact, -np.inf)], axis=1)
            merged_places = np.concatenate([best_places[split], places[candidates]], axis=1)
            order = np.lexsort((merged_places, -merged), axis=1)[:, :kept]
            best[split] = np.take_along_axis(merged, order, axis=1)
            best_places[split] = np.take_along_axis(merged_places, order, axis=1)
    return [
        [
            Hits(best_places[split, query, :k][finite], best[split, query, :k][finite])
            for split in range(num_splits)
            for finite in [np.isfinite(best[split, query, :k])]
        ]
        for query in range(len(queries))
    ]


MOST_WIDENING = 5
"""Times that an index is asked again, for four times as many rows each, where too few of them may be used."""


def index_search(
    ask: Callable[[Float[np.ndarray, "d"], int, int], tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n d"]]],
    queries: Float[np.ndarray, "q d"],
    excluded: Sequence[Int[np.ndarray, "_"]],
    num_splits: int,
    k: int,
) -> list[list[Hits]]:
    """As `exact_search`, from an approximate index: what it finds is ordered by products in double precision.

    Args:
        ask: (query, split, number of rows) to places of that split, nearest first, and their vectors.
    """
    found: list[list[Hits]] = []
    for query, out in zip(queries, excluded, strict=True):
        of_query = []
        for split in range(num_splits):
            asked = k + MARGIN
            places, vectors = ask(query, split, asked)
            for _ in range(MOST_WIDENING):
                if len(places) < asked or np.sum(~np.isin(places, out)) >= k:
                    break
                asked *= 4
                places, vectors = ask(query, split, asked)
            usable = ~np.isin(places, out)
            places, vectors = places[usable], vectors[usable]
            similarity = vectors.astype(np.float64) @ query.astype(np.float64)
            order = np.lexsort((places, -similarity))[:k]
            of_query.append(Hits(places[order], similarity[order]))
        found.append(of_query)
    return found


def _top(similarity: Float[np.ndarray, "q n"], columns: Int[np.ndarray, "m"], k: int) -> Int[np.ndarray, "q k"]:
    """Which of some columns are the k largest of each row, in no order."""
    if len(columns) <= k:
        return np.broadcast_to(np.arange(len(columns)), (len(similarity), len(columns)))
    import torch  # seconds, which every worker that knows of records would pay

    chosen = torch.from_numpy(similarity)[:, torch.from_numpy(columns)]  # torch's top-k takes half of numpy's time
    return torch.topk(chosen, k, dim=1, sorted=False).indices.numpy()
