"""Embedding: the cosine of an explanation and a text, by the encoder and the vectors of the index.

explanation -> sentence encoder -> dot product with vectors of `embeddings` -> activating against silent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayinterp.index import to_matrix
from rayinterp.scorers.values import Answers
from rayinterp.tables import Tables, sql_in

if TYPE_CHECKING:
    from jaxtyping import Float

Embed = Callable[[list[str]], "Float[np.ndarray, 'texts d']"]
"""Vectors of length 1."""


def cosines(
    vectors: Float[np.ndarray, "records d"], texts: Sequence[str], embedded: Float[np.ndarray, "texts d"]
) -> dict[str, Answers]:
    """Cosine to every record, by text; both sides are of length 1."""
    similarity = embedded.astype(np.float64) @ vectors.astype(np.float64).T
    return {text: Answers(tuple(row.tolist())) for text, row in zip(texts, similarity, strict=True)}


def read_vectors(tables: Tables, sequence_ids: Sequence[int]) -> Float[np.ndarray, "n d"]:
    """Sentence embeddings of some sequences, in their order."""
    rows = tables.read("embeddings", ["sequence_id", "vector"], sql_in("sequence_id", sequence_ids))
    place = {sequence: row for row, sequence in enumerate(rows["sequence_id"].to_pylist())}
    return to_matrix(rows)[[place[sequence] for sequence in sequence_ids]]
