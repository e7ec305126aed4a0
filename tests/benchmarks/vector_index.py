"""A million sentence vectors: each kind of index against the exact search of many features in one pass.

The vectors have the covariance of real ones: sentences of the embedded corpus, each moved by the difference of two
others. A feature's query is the mean of its nearest 400 in a sample; those and some more are what it is active on.
Every thousandth vector is followed by a near-duplicate of itself, which a feature active on the first alone must find.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pyarrow as pa
import ray
from sentence_transformers import SentenceTransformer

from rayinterp import embedded
from rayinterp.config import IndexConfig
from rayinterp.index import TableVectors, build_index
from rayinterp.records import BLOCK
from rayinterp.sources import SPLITS, Corpus
from rayinterp.tables import Tables, embeddings_schema
from tests.benchmarks.measure import Row

NAME = "vector_index"
NUM_VECTORS, NUM_SENTENCES = 1_000_000, 4_000
SMALL = 250_000
NUM_FEATURES, NUM_BY_INDEX = BLOCK, 64
NUM_POSITIVES, NUM_ACTIVE, SAMPLE, K = 400, 2000, 40_000, 30
WRITTEN = 50_000
COPIES_APART, NUM_COPIES = 1000, 100
KINDS = ("IVF_PQ", "IVF_HNSW_SQ", "IVF_FLAT")
MIN_RECALL, MIN_COPIES, MAX_GROWTH = 0.95, 0.99, 1.25


def sentences() -> np.ndarray:
    """Vectors of windows of the embedded corpus."""
    texts: list[str] = []
    for subset in embedded.CORPUS_SUBSETS:
        of_subset: list[str] = []
        for document in embedded.documents(subset):
            words = str(document["text"]).split()
            of_subset += [" ".join(words[start : start + 24]) for start in range(0, min(len(words), 960), 24)]
        texts += of_subset[: NUM_SENTENCES // len(embedded.CORPUS_SUBSETS)]
    encoder = SentenceTransformer(str(embedded.embedder_path(embedded.EMBEDDER)))
    return np.asarray(encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False))


def stretches(real: np.ndarray, num_vectors: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for start in range(0, num_vectors, WRITTEN):
        own, plus, minus = rng.integers(len(real), size=(3, min(WRITTEN, num_vectors - start)))
        vectors = real[own] + 0.5 * (real[plus] - real[minus])
        copied = vectors[::COPIES_APART]
        vectors[1::COPIES_APART] = copied + rng.normal(0, 0.1 * copied.std(), copied.shape)
        yield (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def write(tables: Tables, real: np.ndarray, num_vectors: int) -> Corpus:
    """Fills `embeddings`; sequence ids are places."""
    splits = np.random.default_rng(1).integers(len(SPLITS), size=num_vectors).astype(np.int8)
    schema = embeddings_schema(real.shape[1], pa.float16())

    def batches() -> Iterator[pa.RecordBatch]:
        start = 0
        for vectors in stretches(real, num_vectors):
            ids = np.arange(start, start + len(vectors))
            start += len(vectors)
            names = pa.array([SPLITS[code] for code in splits[ids]])
            flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), real.shape[1])
            yield pa.RecordBatch.from_arrays(
                [pa.array(ids), names, pa.array(ids // 1024, pa.int32()), flat], schema=schema
            )

    tables.create("embeddings", pa.Table.from_batches(batches(), schema))
    tables.finish("embeddings")
    ids = np.arange(num_vectors)
    return Corpus(ids, ids, splits, np.stack([ids // 1024, ids % 1024], axis=1))


def features(vectors: TableVectors, num_vectors: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Queries, and the places on which each feature is active."""
    rng = np.random.default_rng(2)
    sample = np.sort(rng.choice(num_vectors, SAMPLE, replace=False))
    rows = vectors.gather(sample)
    queries, active = [], []
    for seed in rng.choice(SAMPLE, NUM_FEATURES, replace=False):
        near = np.argsort(-(rows @ rows[seed]), kind="stable")
        queries.append(rows[near[:NUM_POSITIVES]].mean(0))
        active.append(np.sort(sample[near[:NUM_ACTIVE]]))
    return np.stack(queries), active


def timed(call: Callable[[], list]) -> tuple[list, float, float]:
    """What a call returns, its seconds, and by how much it raised this process's memory at most, in MB."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return found, seconds, (peak - before) / 1e6


def recall(expected: list, found: list) -> float:
    shares = [
        len(np.intersect1d(e.places, f.places)) / len(e.places)
        for of_query, of_found in zip(expected, found, strict=False)
        for e, f in zip(of_query, of_found, strict=True)
    ]
    return float(np.mean(shares))


def copies_found(vectors: TableVectors) -> float:
    """Share of the planted near-duplicates among what is found for the vectors that they are copies of."""
    places = np.arange(NUM_COPIES) * COPIES_APART * (NUM_VECTORS // COPIES_APART // NUM_COPIES)
    found = vectors.search(vectors.gather(places), list(places[:, None]), K)
    return float(np.mean([any(place + 1 in hits.places for hits in f) for place, f in zip(places, found, strict=True)]))


def run() -> list[Row]:
    real = sentences()
    with tempfile.TemporaryDirectory() as folder:
        small = Tables(f"{folder}/small")
        searched = TableVectors(small, write(small, real, SMALL), IndexConfig(search="exact"))
        _, _, small_memory = timed(lambda: searched.search(*features(searched, SMALL), K))
        tables = Tables(f"{folder}/large")
        corpus = write(tables, real, NUM_VECTORS)
        exact = TableVectors(tables, corpus, IndexConfig(search="exact"))
        queries, active = features(exact, NUM_VECTORS)
        expected, seconds, memory = timed(lambda: exact.search(queries, active, K))
        exact_rate = NUM_FEATURES / seconds
        of_copies = copies_found(exact)
        rows = [
            Row("exact search: near-duplicates found", of_copies, None, None, "", MIN_COPIES, of_copies >= MIN_COPIES),
            Row(f"memory of the exact search, {NUM_VECTORS:,} against {SMALL:,} vectors", memory, small_memory,
                small_memory / memory, "MB", 1 / MAX_GROWTH, memory <= MAX_GROWTH * small_memory)
        ]  # fmt: skip
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        for kind in KINDS:
            config = IndexConfig(search="index", kind=kind)
            _, building, _ = timed(lambda config=config: [build_index(config, tables, num_workers=2)])
            by_index = TableVectors(tables, corpus, config)
            part = slice(0, NUM_BY_INDEX)
            found, seconds, memory = timed(lambda by=by_index, part=part: by.search(queries[part], active[part], K))
            rate = NUM_BY_INDEX / seconds
            of, of_copies = recall(expected, found), copies_found(by_index)
            rows += [
                Row(f"{kind} of {NUM_VECTORS:,} vectors against the exact search", rate, exact_rate, rate / exact_rate,
                    "features/s", None, None),
                Row(f"{kind}: recall@{K}", of, None, None, "", MIN_RECALL, of >= MIN_RECALL),
                Row(f"{kind}: near-duplicates found", of_copies, None, None, "", MIN_COPIES, of_copies >= MIN_COPIES),
                Row(f"{kind}: size from which it is faster", NUM_VECTORS * exact_rate / rate, None, None, "vectors",
                    None, None),
                Row(f"{kind}: memory of its search", memory, None, None, "MB", None, None),
                Row(f"{kind}: time to build", building, None, None, "s", None, None),
            ]  # fmt: skip
            sys.stderr.write("".join(f"{row.name}: {row.ours:.4g}\n" for row in rows[-6:]))
        ray.shutdown()
    return rows
