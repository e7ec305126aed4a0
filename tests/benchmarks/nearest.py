"""Similar negatives of 1,000 features over 100k sequences: all in blocks, against one plain scan per feature."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rayinterp.nearest import VectorBlock, exact_search
from rayinterp.records import BLOCK
from tests.benchmarks.measure import Row, compare

NAME = "nearest"
NUM_FEATURES, NUM_SEQUENCES, DIM, K = 1000, 100_000, 384, 30
NUM_CLUSTERS, NUM_POSITIVES, NUM_ACTIVE = 2000, 400, 600
NUM_PLAIN = 256
"""Features that the plain scan does; its time is per feature."""
READ = 65_536
MIN_RECALL = 0.95


def corpus(rng: np.random.Generator) -> np.ndarray:
    """Vectors in clusters, as sentences of a corpus are; float16, as stored."""
    centres = rng.normal(size=(NUM_CLUSTERS, DIM))
    vectors = centres[rng.integers(NUM_CLUSTERS, size=NUM_SEQUENCES)] + rng.normal(size=(NUM_SEQUENCES, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def run() -> list[Row]:
    rng = np.random.default_rng(0)
    stored, splits = corpus(rng), rng.integers(3, size=NUM_SEQUENCES).astype(np.int8)
    active = [np.sort(rng.choice(NUM_SEQUENCES, NUM_ACTIVE, replace=False)) for _ in range(NUM_FEATURES)]
    positives = [np.sort(rng.choice(places, NUM_POSITIVES, replace=False)) for places in active]
    queries = np.stack([stored[places].astype(np.float32).mean(0) for places in positives])

    def blocks() -> Iterator[VectorBlock]:
        for start in range(0, NUM_SEQUENCES, READ):
            part = stored[start : start + READ].astype(np.float32)
            yield VectorBlock(np.arange(start, start + len(part)), part)

    def ours(num_features: int = NUM_FEATURES) -> list:
        found = []
        for start in range(0, num_features, BLOCK):
            part = slice(start, min(start + BLOCK, num_features))
            found += exact_search(blocks(), queries[part], active[part], splits, 3, K)
        return found

    def one_scan_per_feature(num_features: int = NUM_PLAIN) -> list:
        """Every sequence's mean cosine to the positives, then the nearest silent ones of each split."""
        vectors, found = stored.astype(np.float32), []
        for feature in range(num_features):
            similarity = vectors @ vectors[positives[feature]].mean(0)
            silent = np.ones(NUM_SEQUENCES, dtype=bool)
            silent[active[feature]] = False
            of_feature = []
            for split in range(3):
                places = np.flatnonzero(silent & (splits == split))
                of_feature.append(places[np.argsort(-similarity[places], kind="stable")[:K]])
            found.append(of_feature)
        return found

    expected, got = one_scan_per_feature(), ours(NUM_PLAIN)
    recalls = [len(np.intersect1d(expected[f][s], got[f][s].places)) / K for f in range(NUM_PLAIN) for s in range(3)]
    row = compare(
        f"similar negatives, {BLOCK} features a pass over 100k vectors",
        lambda: ours(NUM_PLAIN),
        one_scan_per_feature,
        NUM_PLAIN,
        "features/s",
        target=5.0,
    )
    recall = float(np.mean(recalls))
    return [row, Row(f"its recall@{K} against the scan", recall, None, None, "", MIN_RECALL, recall >= MIN_RECALL)]
