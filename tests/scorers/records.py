"""A feature's test records, made by hand: the word `ship` fires."""

import numpy as np

from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence

FEATURE = FeatureId("planted", 0)


def record(number: int, text: str, source: str, document: int | None = None) -> ActivationRecord:
    tokens = tuple(f" {word}" for word in text.split())
    activations = np.array([5.0 * (token == " ship") for token in tokens], dtype=np.float32)
    return ActivationRecord(
        TokenSequence(number, tokens), document or number, source, tuple(range(len(tokens))), activations
    )


def drawn(num_active: int = 12, num_silent: int = 12) -> list[ActivationRecord]:
    """Positives, and as many of two sources; two sequences are in both of them."""
    active = [record(i, f"number {i} is a ship at sea", "positive") for i in range(num_active)]
    silent = [
        record(100 * n + i, f"number {i} is a lemon of kind {n}", source)
        for n, source in enumerate(("similar_negative", "random_negative"), 1)
        for i in range(num_silent)
    ]
    shared = [one._replace(source="random_negative") for one in silent[:2]]
    return [*active, *silent, *shared]
