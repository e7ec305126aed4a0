"""A planted world as the subject of a harvest: activations that follow from the words alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from rayinterp.planted import World
from rayinterp.subject import SparseActivations, SubjectCheck, sparsify

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class PlantedSubject:
    """Fires where the planted rules say.

    Args:
        features: Indices by SAE.
    """

    def __init__(self, world: World, features: dict[str, list[int]]) -> None:
        self._world, self.features = world, features
        self.dtype = "float32"

    def activations(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        """Activations of the requested features, dense."""
        texts = [tuple(self._world.vocabulary[i] for i in row) for row in token_ids.tolist()]
        return {
            sae: torch.from_numpy(np.stack([self._world.activations(sae, i, texts) for i in indices], axis=-1))
            for sae, indices in self.features.items()
        }

    def check(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, SubjectCheck]:
        return {sae: SubjectCheck(variance_unexplained=0.0, median_norm=1.0) for sae in self.features}

    def stream(self, batches: Iterable[Int[torch.Tensor, "batch seq"]]) -> Iterator[dict[str, SparseActivations]]:
        for batch in batches:
            norms = torch.ones(batch.shape)
            yield {sae: sparsify(values, norms) for sae, values in self.activations(batch).items()}

    def holistic(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        places = range(token_ids.shape[1])
        shorter = [torch.cat([token_ids[:, :i], token_ids[:, i + 1 :]], dim=1) for i in places]
        means = [{sae: values.mean(1) for sae, values in self.activations(ids).items()} for ids in shorter]
        return {
            sae: values.mean(1, keepdim=True) - torch.stack([of[sae] for of in means], dim=1)
            for sae, values in self.activations(token_ids).items()
        }
