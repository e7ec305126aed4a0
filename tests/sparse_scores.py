"""Test records of an imaginary feature and an imperfect prediction of them, drawn so that the true scores are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rayinterp.score import SCORERS, score_all

SEQ = 32
NUM_POOLED = 400
"""Draws behind the true scores."""


class Draw(NamedTuple):
    true: np.ndarray
    predicted: np.ndarray
    document_ids: np.ndarray
    kinds: list[str]


def draw_records(rng: np.random.Generator, num_each: int = 30) -> Draw:
    """So many positive and silent records, of documents that give one to three of a kind, and some of both kinds.

    How strongly and how often the feature fires goes by document, as do false alarms, and whether the explanation holds
    there at all (in three of four).
    """
    left = {"positive": num_each, "silent": num_each}
    documents: list[int] = []
    kinds: list[str] = []
    num_documents = 0
    while any(left.values()):
        both = ["positive", "silent"]
        for kind in both if rng.random() < 0.15 else [both[rng.integers(2)]]:
            num = min(left[kind], 1 + int(rng.choice(3, p=(0.7, 0.2, 0.1))))
            left[kind] -= num
            documents += [num_documents] * num
            kinds += [kind] * num
        num_documents += 1
    of = np.array(documents)
    shape = (len(of), SEQ)

    def by_document(values: np.ndarray) -> np.ndarray:
        return values[of][:, None]

    fires = rng.random(shape) < by_document(rng.beta(1.5, 15, num_documents))
    fires[np.arange(len(of)), rng.integers(0, SEQ, len(of))] = True
    fires &= np.array(kinds)[:, None] == "positive"
    strength = by_document(rng.lognormal(0.5, 0.6, num_documents)) * rng.lognormal(0, 0.4, shape)
    true = np.where(fires, np.clip(strength, 0.05, 6), 0)
    understood = by_document(rng.random(num_documents) < 0.75)
    alarm = by_document(rng.beta(0.5, 20, num_documents) * (rng.random(num_documents) < 0.5))
    seen = np.where(understood, 0.7 * true * rng.lognormal(0, 0.5, shape) + 0.6 * fires, 0.1 * true)
    noise = 0.15 * np.abs(rng.normal(size=shape)) + (rng.random(shape) < alarm) * rng.uniform(1, 4, shape)
    return Draw(true, np.clip(seen + noise, 0, 5), of, kinds)


def true_scores() -> dict[str, float]:
    """The scores of very many records drawn the same way."""
    draws = [draw_records(np.random.default_rng([7, i])) for i in range(NUM_POOLED)]
    true, predicted = (np.concatenate([draw[side] for draw in draws]).ravel() for side in (0, 1))
    scores = score_all([true], [predicted], [0], np.random.default_rng(0), 1, False)
    return {name: score.value for name, score in scores.items() if score.value is not None}


class Coverage(NamedTuple):
    covered: float
    """Share of the intervals that hold the true score."""
    width: float
    """Median width."""


def measure_coverage(num_repeats: int, num_bootstrap: int) -> dict[str, Coverage]:
    """Of the 95 % interval of every scorer, over so many draws of 30 + 30 records."""
    truth = true_scores()
    found: dict[str, list[tuple[bool, float]]] = {name: [] for name in SCORERS}
    for repeat in range(num_repeats):
        rng = np.random.default_rng([8, repeat])
        draw = draw_records(rng)
        scores = score_all(
            list(draw.true), list(draw.predicted), draw.document_ids.tolist(), rng, num_bootstrap, False, draw.kinds
        )
        for name, score in scores.items():
            assert score.low is not None and score.high is not None
            found[name].append((score.low <= truth[name] <= score.high, score.high - score.low))
    return {
        name: Coverage(float(np.mean([f[0] for f in rows])), float(np.median([f[1] for f in rows])))
        for name, rows in found.items()
    }
