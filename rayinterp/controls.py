"""Controls: what a score must beat to mean anything. Computed for every feature, shown beside every aggregate.

null           texts that say nothing about the feature (not those that calibrate the simulator)
shuffled       the explanations of other features of the same SAE
token_lookup   a table from token to its mean activation on train: no explanation at all
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import RuleRequest, TokenSequence
from rayinterp.sources import generator_for

if TYPE_CHECKING:
    from jaxtyping import Float


class TokenLookupSimulator:
    """Predicts each token's mean activation over train records, whatever the rule; tokens not seen there are silent."""

    def __init__(self, train: Sequence[ActivationRecord]) -> None:
        values: dict[str, list[float]] = defaultdict(list)
        for record in train:
            for token, activation in zip(record.sequence.tokens, record.activations.tolist(), strict=True):
                values[token].append(activation)
        self._means = {token: float(np.mean(seen)) for token, seen in values.items()}

    def simulate(self, requests: list[RuleRequest]) -> list[list[Float[np.ndarray, "seq"]]]:
        """As `Simulator` asks for; on the scale of explanations, which a lookup may exceed."""
        return [[self._predict(sequence) for sequence in request.sequences] for request in requests]

    def _predict(self, sequence: TokenSequence) -> Float[np.ndarray, "seq"]:
        return np.array([self._means.get(token, 0.0) for token in sequence.tokens], dtype=np.float32)


def by_sae(features: Iterable[FeatureId]) -> dict[str, list[FeatureId]]:
    """Features of each SAE, in order: what `shuffled_features` draws from, made once for all of them."""
    pools: dict[str, list[FeatureId]] = {}
    for feature in sorted(features):
        pools.setdefault(feature.sae, []).append(feature)
    return pools


def shuffled_features(
    feature: FeatureId, pools: Mapping[str, Sequence[FeatureId]], count: int, seed: int
) -> list[FeatureId]:
    """Other features of the same SAE whose explanations are tried on this one; fewer if there are fewer.

    Takes the same time whatever the number of features.
    """
    pool = pools.get(feature.sae, ())
    place = bisect_left(pool, feature)
    has_it = place < len(pool) and pool[place] == feature
    num_others = len(pool) - has_it
    drawn = generator_for(seed, feature, "shuffled").choice(num_others, min(count, num_others), replace=False)
    return [pool[i + (has_it and i >= place)] for i in drawn.tolist()]
