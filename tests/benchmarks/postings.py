"""Reading one feature out of 16k features x 100k sequences, by its index and by a scan; and the space that it takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from rayinterp.postings import to_postings
from rayinterp.subject import SparseActivations
from rayinterp.tables import Tables
from tests.benchmarks.measure import Row

NAME = "postings"
NUM_FEATURES, NUM_SHARDS, SHARD, LENGTH = 16_384, 98, 1024, 32
NUM_PER_TOKEN = 16
"""Active features per token."""
NUM_READS, NUM_SCANS = 50, 3


def shard_activations(shard: int) -> SparseActivations:
    """Random activations; feature i is active in proportion to 1 / (i + 100), as frequencies of SAE features fall."""
    rng = np.random.default_rng(shard)
    weights = np.cumsum(1 / (np.arange(NUM_FEATURES) + 100))
    drawn = np.searchsorted(weights, rng.random((SHARD * LENGTH, NUM_PER_TOKEN)) * weights[-1])
    token = np.repeat(np.arange(SHARD * LENGTH), NUM_PER_TOKEN)
    # A feature is active once at a token.
    kept = np.unique(token * NUM_FEATURES + drawn.ravel())
    token, feature = np.divmod(kept, NUM_FEATURES)
    values = rng.lognormal(0, 1, len(kept)).astype(np.float32)
    row, position = np.divmod(token, LENGTH)
    return SparseActivations(
        row.astype(np.int32),
        position.astype(np.int32),
        feature.astype(np.int32),
        values,
        np.ones((SHARD, LENGTH), dtype=np.float32),
    )


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        tables = Tables(folder)
        tables.create_empty("activations")
        num_values, seconds = 0, []
        for shard in range(NUM_SHARDS):
            activations = shard_activations(shard)
            num_values += len(activations.values)
            start = time.perf_counter()
            table = to_postings(activations, "a", range(NUM_FEATURES), shard)
            tables.commit("activations", tables.write_fragments("activations", table))
            seconds.append(time.perf_counter() - start)
        tables.finish("activations")
        rng = np.random.default_rng(0)
        reads = [
            timed(lambda f=f: tables.read("activations", where=f"feature_key = 'a/{f}'"))
            for f in rng.choice(NUM_FEATURES, NUM_READS, replace=False).tolist()
        ]
        scans = [
            timed(lambda f=f: tables.open("activations").to_table(filter=f"feature = {f}", use_scalar_index=False))
            for f in range(NUM_SCANS)
        ]
        space = size_of(Path(folder) / "activations.lance")
    read, scan = 1000 * statistics.median(reads), 1000 * statistics.median(scans)
    rate = num_values / NUM_SHARDS / statistics.median(seconds) / 1e6
    return [
        Row("postings, one feature of 16k x 100k sequences", read, scan, scan / read, "ms", None, None),
        Row("postings, on disk (row, position, value)", space / num_values, 12.0, 12 * num_values / space,
            "bytes per non-zero", None, None),
        Row("postings, built and written", rate, None, None, "million non-zeros/s", None, None),
    ]  # fmt: skip


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
