"""Controls: what a score must beat to mean anything. Computed for every feature, shown beside every aggregate.

null           texts that say nothing about the feature (not those that calibrate the simulator)
shuffled       the explanations of other features of the same SAE
token_lookup   a table from token id to its mean activation on train: no explanation at all
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayinterp.records import ActivationRecord
from rayinterp.sources import generator_for
from rayinterp.subject import FeatureId

if TYPE_CHECKING:
    from jaxtyping import Float


def token_lookup(
    train: Sequence[ActivationRecord], records: Sequence[ActivationRecord]
) -> list[Float[np.ndarray, "seq"]]:
    """Predicts each token's mean activation over the train records; tokens not seen there are silent."""
    values: dict[int, list[float]] = defaultdict(list)
    for record in train:
        for token, activation in zip(record.token_ids, record.activations.tolist(), strict=True):
            values[token].append(activation)
    means = {token: float(np.mean(seen)) for token, seen in values.items()}
    return [np.array([means.get(token, 0.0) for token in r.token_ids], dtype=np.float32) for r in records]


def shuffled_features(feature: FeatureId, others: Sequence[FeatureId], count: int, seed: int) -> list[FeatureId]:
    """Other features of the same SAE whose explanations are tried on this one; fewer if there are fewer."""
    pool = sorted(other for other in others if other.sae == feature.sae and other != feature)
    order = generator_for(seed, feature, "shuffled").permutation(len(pool))[:count]
    return [pool[i] for i in order]
