"""A made-up language of 248 words, features planted in it, their records, and a simulator that knows what rules mean.

    words < sorts < classes        "the word 'toolora'" < "words for old tools" < "words for tools"; each is a term
    rule = a term, or "TERM soon after TERM"

Texts are about a few sorts each. Some are given what the feature fires on, fewer a near miss: a word of the same class,
or the word without its context. So a random silent text says little about a rule that is too broad, and the nearest
silent texts to its words say a lot. What a feature does on a text is always read off its truth.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from rayinterp.explanation import Explanation, Rule
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import RuleRequest, TokenSequence
from rayinterp.sources import SPLITS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Kind = Literal["word", "class", "context", "union"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LITTLE_WORDS = ("the", "a", "of", "and", "in", "with", "to", "is")
CLASSES = (
    *("animals", "boats", "clothes", "drinks", "engines", "fruits", "games", "herbs", "insects", "jewels", "kitchens"),
    *("lamps", "metals", "numbers", "oils", "plants", "quilts", "rivers", "songs", "tools", "uniforms", "vessels"),
    *("weapons", "yarns"),
)
SORTS = ("old", "new")
ENDINGS = ("ra", "lin", "ket", "mos", "du")
PER_SORT, PER_CLASS = len(ENDINGS), len(SORTS) * len(ENDINGS)
VOCABULARY = (*LITTLE_WORDS, *(f"{c[:4]}{s[0]}{e}" for c in CLASSES for s in SORTS for e in ENDINGS))
INDEX = {word: number for number, word in enumerate(VOCABULARY)}
AFTER = " soon after "
DISTANCE = 4
"""How many words "soon after" reaches back."""

LENGTH, PER_DOCUMENT, POOL = 16, 4, 400
"""Words of a sequence, sequences of a document, sequences of a split."""
FIRING, NEAR_MISSES = 0.2, 0.06
"""Shares of sequences that are given what the feature fires on, or nearly that."""
NOISE = 0.02
"""Share of tokens on which the simulator says anything at all."""
CHEAP_NOISE = 0.06
"""The same of the simulator for looks."""


def terms_of(word: str) -> tuple[str, ...]:
    """The word itself, its sort and its class; nothing for a little word."""
    number = INDEX[word] - len(LITTLE_WORDS)
    if number < 0:
        return ()
    name, sort = CLASSES[number // PER_CLASS], SORTS[number % PER_CLASS // PER_SORT]
    return f"the word '{word}'", f"words for {sort} {name}", f"words for {name}"


COVERS: dict[str, Bool[np.ndarray, "vocabulary"]] = {}
"""Which words a term means."""
for _number, _word in enumerate(VOCABULARY):
    for _term in terms_of(_word):
        COVERS.setdefault(_term, np.zeros(len(VOCABULARY), dtype=bool))[_number] = True
BY_LEVEL = tuple(sorted({terms_of(word)[level] for word in VOCABULARY[len(LITTLE_WORDS) :]}) for level in range(3))
"""Terms for words, for sorts and for classes."""


def parts(rule: str) -> tuple[str, str | None]:
    """What fires, and what must stand before it."""
    target, _, context = rule.partition(AFTER)
    return target, context or None


def joined(target: str, context: str | None) -> str:
    return target + AFTER + context if context else target


def fires(rule: str, words: Int[np.ndarray, "n seq"]) -> Bool[np.ndarray, "n seq"]:
    """Where the rule holds."""
    target, context = parts(rule)
    holds = COVERS[target][words]
    if context:
        before, soon = COVERS[context][words], np.zeros_like(holds)
        for back in range(1, DISTANCE + 1):
            soon[:, back:] |= before[:, :-back]
        holds = holds & soon
    return holds


def strength(explanation: Explanation, words: Int[np.ndarray, "n seq"]) -> Float[np.ndarray, "n seq"]:
    """The largest strength of the rules that hold."""
    return np.max([rule.strength * fires(rule.activates_on, words) for rule in explanation], axis=0).astype(np.float32)


@cache
def _encoded(tokens: tuple[str, ...]) -> list[int]:
    return [INDEX[token] for token in tokens]


def encode(sequences: Sequence[TokenSequence]) -> Int[np.ndarray, "n seq"]:
    return np.array([_encoded(sequence.tokens) for sequence in sequences])


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
        words = encode(request.sequences)
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
    first, second = (CLASSES[i] for i in rng.permutation(len(CLASSES))[:2])

    def term(of_class: str, *levels: int) -> str:
        return str(rng.choice([name for level in levels for name in BY_LEVEL[level] if name in _below(of_class)]))

    if kind == "word":
        truth: Explanation = (Rule(term(first, 0)),)
    elif kind == "class":
        truth = (Rule(term(first, 1, 2)),)
    elif kind == "context":
        truth = (Rule(joined(term(first, int(rng.integers(2))), term(second, 2))),)
    else:
        levels = rng.integers(2, size=2)
        truth = (Rule(term(first, int(levels[0]))), Rule(term(second, int(levels[1])), int(rng.integers(3, 6))))
    base = (seed * 1000 + number) * len(SPLITS) * POOL
    pools = {split: _pool(truth, base + i * POOL, rng) for i, split in enumerate(SPLITS)}
    return Planted(kind, seed, number, truth, pools)


def _below(of_class: str) -> set[str]:
    """Terms for anything in a class."""
    words = COVERS[f"words for {of_class}"]
    return {term for word in np.flatnonzero(words) for term in terms_of(VOCABULARY[word])}


def _pool(truth: Explanation, first_id: int, rng: np.random.Generator) -> Pool:
    num_sorts = len(CLASSES) * len(SORTS)
    subjects = np.repeat(rng.integers(num_sorts, size=(POOL // PER_DOCUMENT, 3)), PER_DOCUMENT, axis=0)
    sorts = np.take_along_axis(subjects, rng.integers(3, size=(POOL, LENGTH)), axis=1)
    content = len(LITTLE_WORDS) + sorts * PER_SORT + rng.integers(PER_SORT, size=(POOL, LENGTH))
    words = np.where(rng.random((POOL, LENGTH)) < 0.5, content, rng.integers(len(LITTLE_WORDS), size=(POOL, LENGTH)))
    for i, chance in enumerate(rng.random(POOL)):
        if chance < FIRING + NEAR_MISSES:
            part = _fragment(truth, chance < FIRING, rng)
            start = rng.integers(LENGTH - len(part) + 1)
            words[i, start : start + len(part)] = part
    # A feature is not equally active wherever it is active.
    return Pool(first_id, words, (strength(truth, words) * rng.uniform(0.6, 1, words.shape)).astype(np.float32))


def _fragment(truth: Explanation, firing: bool, rng: np.random.Generator) -> list[int]:
    """Words on which one of the rules holds, or nearly does."""
    target, context = parts(truth[rng.integers(len(truth))].activates_on)
    inside = np.flatnonzero(COVERS[target])
    whole = np.flatnonzero(COVERS[terms_of(VOCABULARY[inside[0]])[2]])
    outside = np.setdiff1d(whole, inside)
    gap = rng.integers(len(LITTLE_WORDS), size=rng.integers(DISTANCE - 1)).tolist()
    before = [int(rng.choice(np.flatnonzero(COVERS[context]))), *gap] if context else []
    if firing:
        return [*before, int(rng.choice(inside))]
    if context and rng.random() < 0.7:
        return [int(rng.choice(inside))]
    return [*before, int(rng.choice(outside))] if len(outside) else [*before, int(rng.choice(inside))]
