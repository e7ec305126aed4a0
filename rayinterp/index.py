"""Index: a sentence embedding of every sequence. Writes `embeddings`.

Vectors are L2-normalised, so the mean cosine to a set of them is the dot product with their mean. `nearest` searches
exactly and in batches; below some five million vectors that is fast enough to need no approximate index.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data

from rayinterp import embedded
from rayinterp.config import RunConfig
from rayinterp.harvest import torch_threads
from rayinterp.progress import Progress, silent
from rayinterp.tables import Tables, embeddings_schema

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


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


def nearest(
    similarity: Float[np.ndarray, "n"], allowed: Bool[np.ndarray, "n"], sequence_ids: np.ndarray, k: int
) -> np.ndarray:
    """Places of the `k` most similar allowed sequences, best first; ties go to the smaller id; fewer if there are."""
    places = np.flatnonzero(allowed)
    order = np.lexsort((sequence_ids[places], -similarity[places]))
    return places[order[:k]]


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
