"""Features planted in the made-up language, each with texts of its own, and a simulator that makes mistakes.

Some texts are given what the feature fires on, fewer a near miss: a word of the same class, or the word without its
context. So a random silent text says little about a rule that is too broad, and the nearest silent texts to its words
say a lot.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp.explanation import Explanation
from rayinterp.planted_language import (
    COVERS,
    LENGTH,
    LITTLE_WORDS,
    PER_DOCUMENT,
    VOCABULARY,
    Kind,
    encode,
    fires,
    parts,
    put_fragment,
    sentences,
    strength,
    truth,
)
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import RuleRequest, TokenSequence
from rayinterp.sources import SPLITS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

POOL = 400
"""Sequences of a split."""
FIRING, NEAR_MISSES = 0.2, 0.06
"""Shares of sequences that are given what the feature fires on, or nearly that."""
NOISE = 0.02
"""Share of tokens on which the simulator says anything at all."""
CHEAP_NOISE = 0.06
"""The same of the simulator for looks."""


class Oracle:
    """Predicts what a rule means; a share of tokens, always the same of a (rule, sequence), is guessed."""

    def __init__(self, noise: float) -> None:
        self._noise = noise
        self.pairs = 0
        """(rule, sequence) pairs it was asked for."""

    async def __call__(self, requests: list[RuleRequest]) -> list[list[np.ndarray]]:
        self.pairs += sum(len(request.sequences) for request in requests)
        return [list(self._predicted(request)) for request in requests]

    def _predicted(self, request: RuleRequest) -> Float[np.ndarray, "n seq"]:
        words = encode([sequence.tokens for sequence in request.sequences])
        ids = np.array([sequence.sequence_id for sequence in request.sequences], dtype=np.uint64)
        cells = ids[:, None] * np.uint64(LENGTH) + np.arange(LENGTH, dtype=np.uint64)
        key = zlib.crc32(f"{self._noise} {request.rule}".encode())
        wrong, guess = (_uniform(cells, key + salt * 2**32) for salt in range(2))
        return np.where(wrong < self._noise, 5 * guess, 5 * fires(request.rule, words)).astype(np.float32)


def _uniform(cells: np.ndarray, key: int) -> Float[np.ndarray, "n seq"]:
    """A number from 0 to 1 for each cell and key, by the mixing steps of splitmix64."""
    x = cells * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key * 0xD1B54A32D192ED03 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(11)) / 2**53


class Pool(NamedTuple):
    """The sequences of a split and what the feature does on them."""

    first_id: int
    words: Int[np.ndarray, "n seq"]
    activations: Float[np.ndarray, "n seq"]

    def record(self, i: int, source: str) -> ActivationRecord:
        number = self.first_id + int(i)
        tokens = tuple(VOCABULARY[word] for word in self.words[i])
        sequence = TokenSequence(number, tokens)
        return ActivationRecord(sequence, number // PER_DOCUMENT, source, tuple(self.words[i]), self.activations[i])

    def silent(self) -> Int[np.ndarray, "k"]:
        return np.flatnonzero(~self.activations.any(1))

    def nearest_silent(
        self, weights: Float[np.ndarray, "vocabulary"], count: int, source: str
    ) -> list[ActivationRecord]:
        """Silent sequences that hold most of what is weighted."""
        silent = self.silent()
        order = np.argsort(-weights[self.words[silent]].sum(1), kind="stable")
        return [self.record(i, source) for i in silent[order[:count]]]

    def rule_negatives(self, explanation: Explanation, count: int) -> list[ActivationRecord]:
        """Silent sequences that hold most words of the explanation, in whatever order: a sentence encoder's way."""
        terms = [term for rule in explanation for term in parts(rule.activates_on) if term]
        return self.nearest_silent(np.sum([COVERS[term] for term in terms], axis=0), count, "rule_negative")


class Planted(NamedTuple):
    """A feature whose truth is known, and its texts."""

    kind: Kind
    seed: int
    number: int
    truth: Explanation
    pools: dict[str, Pool]

    def records(self, counts: dict[str, int], similar: bool = False) -> dict[str, list[ActivationRecord]]:
        """So many positives and random negatives of each split; half of the latter similar ones where asked for."""
        rng = np.random.default_rng([self.seed, self.number, 1])
        records = {}
        for split, pool in self.pools.items():
            active = np.flatnonzero(pool.activations.any(1))
            count, num_similar = counts[split], counts[split] // 2 if similar else 0
            positives = [pool.record(i, "positive") for i in rng.permutation(active)[:count]]
            near = self.similar(split, num_similar)
            known = {record.sequence.sequence_id for record in near}
            others = [i for i in rng.permutation(pool.silent()) if pool.first_id + i not in known]
            randoms = [pool.record(i, "random_negative") for i in others[: count - num_similar]]
            records[split] = [*positives, *randoms, *near]
        return records

    def similar(self, split: str, count: int) -> list[ActivationRecord]:
        """Silent sequences that share most words with the positives of train."""
        train = self.pools["train"]
        words = np.bincount(train.words[train.activations.any(1)].ravel(), minlength=len(VOCABULARY)).astype(float)
        words[: len(LITTLE_WORDS)] = 0
        return self.pools[split].nearest_silent(words, count, "similar_negative")


def plant(kind: Kind, seed: int, number: int) -> Planted:
    """A feature, all of it drawn from (seed, number)."""
    rng = np.random.default_rng([seed, number, 0])
    of = truth(kind, rng)
    base = (seed * 1000 + number) * len(SPLITS) * POOL
    pools = {split: _pool(of, base + i * POOL, rng) for i, split in enumerate(SPLITS)}
    return Planted(kind, seed, number, of, pools)


def _pool(of: Explanation, first_id: int, rng: np.random.Generator) -> Pool:
    words = sentences(POOL, rng, PER_DOCUMENT)
    for i, chance in enumerate(rng.random(POOL)):
        if chance < FIRING + NEAR_MISSES:
            put_fragment(words[i], of, chance < FIRING, rng)
    # A feature is not equally active wherever it is active.
    return Pool(first_id, words, (strength(of, words) * rng.uniform(0.6, 1, words.shape)).astype(np.float32))
