"""Index: a sentence embedding of every sequence. Writes `embeddings`.

Vectors are L2-normalised, so the mean cosine to a set of them is the dot product with their mean. `TableVectors` hands
them out by place; `nearest` searches them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data

from rayinterp import embedded
from rayinterp.config import RunConfig
from rayinterp.harvest import torch_threads
from rayinterp.nearest import VectorBlock
from rayinterp.progress import Progress, silent
from rayinterp.tables import Tables, embeddings_schema

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Embedder:
    """What the actor pool runs: one shard in, fragments of `embeddings` out."""

    def __init__(self, config: RunConfig, tables: Tables) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(torch_threads(config.resources.index.pool(os.cpu_count() or 1)[1]))
        self._config, self._tables = config.index, tables
        self._model = SentenceTransformer(embedder_path(config.index.embedder))
        dim = self._model.get_embedding_dimension()
        assert dim is not None, f"{config.index.embedder} does not know the length of its vectors"
        self._schema = embeddings_schema(dim, pa.from_numpy_dtype(config.index.dtype))
        tables.create_empty("embeddings", self._schema)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shard = int(item["shard"])
        columns = ["sequence_id", "split", "shard", "row", "text"]
        sequences = self._tables.read("sequences", columns, f"shard = {shard}").sort_by("row")
        vectors = self._model.encode(
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


def to_matrix(embeddings: pa.Table) -> Float[np.ndarray, "n d"]:
    """The vector column as one float32 matrix."""
    vectors = embeddings["vector"].combine_chunks()
    return vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(vectors), -1)


class TableVectors:
    """The vectors of a run by place, read as they are needed: `sources.Vectors`."""

    BLOCK = 65_536
    """Vectors read at a time."""

    def __init__(self, tables: Tables, sequence_ids: Int[np.ndarray, "n"]) -> None:
        """`sequence_ids` are those of the corpus, ascending: a place is an index into them."""
        dataset = tables.open("embeddings")
        assert dataset is not None, "no embeddings"
        self._dataset: Any = dataset
        self.dim: int = dataset.schema.field("vector").type.list_size
        ids = dataset.to_table(columns=["sequence_id"])["sequence_id"].to_numpy()
        assert np.array_equal(np.sort(ids), sequence_ids), "sequences and embeddings differ"
        self._place_of_row = np.searchsorted(sequence_ids, ids)
        self._row_of_place = np.argsort(self._place_of_row)

    def gather(self, places: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k d"]:
        rows, back = np.unique(self._row_of_place[places], return_inverse=True)
        return to_matrix(self._dataset.take(rows.tolist(), columns=["vector"]))[back]

    def blocks(self) -> Iterator[VectorBlock]:
        start = 0
        for batch in self._dataset.to_batches(columns=["vector"], batch_size=self.BLOCK):
            places = self._place_of_row[start : start + batch.num_rows]
            start += batch.num_rows
            yield VectorBlock(places, to_matrix(pa.Table.from_batches([batch])))


def run_index(config: RunConfig, tables: Tables, progress: Progress = silent) -> dict[str, int]:
    """Embeds the shards that are left; returns the number of vectors."""
    all_shards = tables.distinct("sequences", "shard")
    left = sorted(all_shards - tables.finished_units("embeddings"))
    if left:
        resources = config.resources.index
        smallest, largest = resources.pool(len(left))
        results = ray.data.from_items([{"shard": shard} for shard in left], override_num_blocks=len(left)).map(
            Embedder,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(config, tables),
            compute=ray.data.ActorPoolStrategy(min_size=smallest, max_size=largest),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
        )
        done = len(all_shards) - len(left)
        progress(done, len(all_shards))
        for _ in tables.stream_commit("embeddings", results):
            done += 1
            progress(done, len(all_shards))
    if not tables.is_finished("embeddings"):
        tables.finish("embeddings")
    return {"vectors": tables.count("embeddings")}
