"""Index: a sentence embedding of every sequence. Writes `embeddings`.

Vectors are L2-normalised, so the mean cosine to a set of them is the dot product with their mean. `TableVectors` hands
them out by place; `nearest` searches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayinterp import embedded
from rayinterp.config import IndexConfig, RunConfig
from rayinterp.errors import UserError
from rayinterp.nearest import Hits, VectorBlock, exact_search, index_search
from rayinterp.pools import map_units, torch_threads
from rayinterp.progress import Progress, silent
from rayinterp.sources import SPLITS, Corpus
from rayinterp.tables import Tables, VectorIndex, embeddings_schema

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MIN_VECTORS_FOR_PQ = 65_536
VECTORS_PER_PARTITION = 256
"""What Lance samples to place each partition's centre."""


class Embedder:
    """What the actor pool runs: one shard in, fragments of `embeddings` out."""

    def __init__(self, config: RunConfig, tables: Tables) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(torch_threads(config.resources.index.most_actors))
        self._config, self._tables = config.index, tables
        self._model = SentenceTransformer(embedder_path(config.index.embedder))
        dim = self._model.get_embedding_dimension()
        assert dim is not None, f"{config.index.embedder} does not know the length of its vectors"
        self._schema = embeddings_schema(dim, pa.from_numpy_dtype(config.index.dtype))
        tables.create_empty("embeddings", self._schema)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        # Not in the constructor, whose refusal would reach the user as a dead actor.
        check_dimension(self._config.embedder, self._model.get_embedding_dimension(), self._tables)
        shard = int(item["shard"])
        columns = ["sequence_id", "split", "shard", "row", "text"]
        sequences = self._tables.read("sequences", columns, f"shard = {shard}").sort_by("row")
        vectors = self._model.encode(  # which sorts its texts by length
            sequences["text"].to_pylist(),
            batch_size=self._config.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        flat = pa.array(np.asarray(vectors).astype(self._config.dtype).ravel())
        columns = [sequences[name].combine_chunks() for name in ("sequence_id", "split", "shard")]
        rows = pa.Table.from_arrays(
            [*columns, pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])], schema=self._schema
        )
        return {"unit": shard, "fragments": self._tables.write_fragments("embeddings", rows)}


def embedder_path(name: str) -> str:
    return str(embedded.embedder_path(name)) if embedded.is_embedded(name) else name


def check_dimension(embedder: str, dim: int | None, tables: Tables) -> None:
    """Refuses an encoder whose vectors cannot be compared with those in the table.

    Raises:
        UserError: names both lengths.
    """
    dataset = tables.open("embeddings")
    stored = None if dataset is None else dataset.schema.field("vector").type.list_size
    if dim != stored:
        raise UserError(
            f"index.embedder {embedder!r} makes vectors of {dim} numbers, but the table embeddings holds vectors of "
            f"{stored}; name the encoder that made them, or give another run_dir"
        )


def to_matrix(embeddings: pa.Table) -> Float[np.ndarray, "n d"]:
    """The vector column as one float32 matrix."""
    vectors = embeddings["vector"].combine_chunks()
    flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(len(vectors), vectors.type.list_size)


class TableVectors:
    """The vectors of a run by place, read as they are needed: `sources.Vectors`."""

    BLOCK = 65_536
    """Vectors read at a time."""

    def __init__(self, tables: Tables, corpus: Corpus, config: IndexConfig) -> None:
        dataset = tables.open("embeddings")
        if dataset is None:
            raise UserError(f"{tables.root!r} holds no embeddings; run the index stage")
        self._corpus = corpus
        self._dataset: Any = dataset
        ids = dataset.to_table(columns=["sequence_id"])["sequence_id"].to_numpy()
        assert np.array_equal(np.sort(ids), corpus.sequence_ids), "sequences and embeddings differ"
        self._place_of_row = np.searchsorted(corpus.sequence_ids, ids)
        self._row_of_place = np.argsort(self._place_of_row)
        self._index = tables.vector_index("embeddings") if config.uses_index(len(ids)) else None

    def gather(self, places: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k d"]:
        rows, back = np.unique(self._row_of_place[places], return_inverse=True)
        return to_matrix(self._dataset.take(rows.tolist(), columns=["vector"]))[back]

    def blocks(self) -> Iterator[VectorBlock]:
        """All of them, a stretch at a time, in the order in which they are stored."""
        start = 0
        for batch in self._dataset.to_batches(columns=["vector"], batch_size=self.BLOCK):
            places = self._place_of_row[start : start + batch.num_rows]
            start += batch.num_rows
            yield VectorBlock(places, to_matrix(pa.Table.from_batches([batch])))

    def search(
        self, queries: Float[np.ndarray, "q d"], excluded: Sequence[Int[np.ndarray, "_"]], k: int
    ) -> list[list[Hits]]:
        """As `sources.Vectors.search`: exactly, or by the index where the config asks for it at this size."""
        if self._index is not None:
            return index_search(partial(self._ask, self._index), queries, excluded, len(SPLITS), k)
        return exact_search(self.blocks(), queries, excluded, self._corpus.splits, len(SPLITS), k)

    def _ask(
        self, index: VectorIndex, query: Float[np.ndarray, "d"], split: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = index.nearest(query.tolist(), count, f"split = '{SPLITS[split]}'")
        return np.searchsorted(self._corpus.sequence_ids, rows["sequence_id"].to_numpy()), to_matrix(rows)


def build_index(config: IndexConfig, tables: Tables, num_workers: int) -> None:
    """Builds the vector index.

    Raises:
        UserError: the kind of index needs more vectors than there are.
    """
    num_vectors = tables.count("embeddings")
    if config.kind == "IVF_PQ" and num_vectors < MIN_VECTORS_FOR_PQ:
        raise UserError(
            f"index.kind is IVF_PQ, which learns its codes from {MIN_VECTORS_FOR_PQ:,} vectors or more, and there are "
            f"{num_vectors:,}; set index.search=exact, which is fast at this size, in another run_dir"
        )
    partitions = max(1, min(round(num_vectors**0.5), num_vectors // VECTORS_PER_PARTITION))
    tables.create_vector_index("embeddings", config.kind, partitions, num_workers)


def run_index(config: RunConfig, tables: Tables, progress: Progress = silent) -> dict[str, int]:
    """Embeds the shards that are left; returns the number of vectors."""
    all_shards = tables.distinct("sequences", "shard")
    left = sorted(all_shards - tables.finished_units("embeddings"))
    if left:
        results = map_units(Embedder, (config, tables), [{"shard": shard} for shard in left], config.resources.index)
        done = len(all_shards) - len(left)
        progress(done, len(all_shards))
        for _ in tables.stream_commit("embeddings", results):
            done += 1
            progress(done, len(all_shards))
    if not tables.is_finished("embeddings"):
        tables.finish("embeddings")
    if config.index.uses_index(tables.count("embeddings")) and not tables.has_vector_index("embeddings"):
        build_index(config.index, tables, num_workers=config.resources.index.num_actors)
    return {"vectors": tables.count("embeddings")}
