"""A projection per feature in which its positives lie close together: re-ranks similar sequences.

Learned with InfoNCE (van den Oord, Li and Vinyals 2018, eq. 4) on train positives alone: two positives of the feature
should be closer than a positive and a silent sequence of train. Chance comes from the generator that is handed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

DIM = 64
"""Dimensions projected to."""
NUM_STEPS, BATCH, LEARNING_RATE, TEMPERATURE = 100, 32, 0.01, 0.1
MIN_POSITIVES = 4
"""With fewer there is nothing to learn from: plain similarity is kept."""


def learn_projection(
    positives: Float[np.ndarray, "p d"], silent: Float[np.ndarray, "n d"], generator: np.random.Generator
) -> Float[np.ndarray, "d k"] | None:
    """The projection, or None where there are too few examples."""
    if len(positives) < MIN_POSITIVES or len(silent) < MIN_POSITIVES:
        return None
    import torch  # seconds, which every worker that knows of records would pay

    d = positives.shape[1]
    start = generator.normal(0, d**-0.5, (d, min(DIM, d)))
    weight = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=LEARNING_RATE)
    active, other = torch.from_numpy(positives).float(), torch.from_numpy(silent).float()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is learned must not depend on the machine's cores
    try:
        for _ in range(NUM_STEPS):
            pairs = np.stack([generator.choice(len(positives), 2, replace=False) for _ in range(BATCH)])
            negatives = generator.integers(len(silent), size=BATCH)
            anchor, partner, against = (
                torch.nn.functional.normalize(rows @ weight, dim=-1)
                for rows in (active[pairs[:, 0]], active[pairs[:, 1]], other[negatives])
            )
            own = (anchor * partner).sum(-1, keepdim=True)
            logits = torch.cat([own, anchor @ against.T], dim=1) / TEMPERATURE
            loss = torch.nn.functional.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return weight.detach().numpy()


def projected_similarity(
    vectors: Float[np.ndarray, "n d"], positives: Float[np.ndarray, "p d"], projection: Float[np.ndarray, "d k"]
) -> Float[np.ndarray, "n"]:
    """Mean cosine to the positives after projection."""

    def project(rows: np.ndarray) -> np.ndarray:
        projected = rows.astype(np.float64) @ projection.astype(np.float64)
        return projected / np.linalg.norm(projected, axis=1, keepdims=True)

    return project(vectors) @ project(positives).mean(0)
