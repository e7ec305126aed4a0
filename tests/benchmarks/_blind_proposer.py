"""A blind stand-in for the LLM that writes explanations: the same guesses, whichever search asks.

It knows the rule language, sees the train positives, and of the explanation that it revises what the feedback says in
words. It does not know the truth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rayinterp.explain.explainer import Outcome
from rayinterp.explain.search import Node, TreeSearch
from rayinterp.explanation import MAX_STRENGTH, Rule
from rayinterp.records import ActivationRecord
from tests.benchmarks import _planted_language as language

HEEDED = 0.7
"""Share of revisions that do something about what the feedback says."""


class Firing(NamedTuple):
    """A token on which a train positive is active."""

    word: str
    before: tuple[str, ...]
    """Words that "soon after" reaches."""
    activation: float


class BlindProposer:
    """Guesses at random, sooner what many active tokens have in common; the same guesses for every search."""

    def __init__(self, train: Iterable[ActivationRecord], seed: int, rule_cap: int = 5) -> None:
        self._seed, self._rule_cap = seed, rule_cap
        self.calls = 0
        self._firings = [
            Firing(tokens[i], tokens[max(0, i - language.DISTANCE) : i], float(record.activations[i]))
            for record in train
            for tokens in (record.sequence.tokens,)
            for i in np.flatnonzero(record.activations)
        ]

    async def __call__(self, search: TreeSearch, node: Node) -> Outcome:
        self.calls += 1
        rng = np.random.default_rng([self._seed, node.node])
        if node.parent is None:
            rules = [self._guess(self._firings, rng) for _ in range(rng.integers(1, 4))]
        else:
            parent = search.nodes[node.parent]
            assert parent.explanation is not None and parent.feedback is not None
            rules = list(parent.explanation)
            for _ in range(rng.integers(1, 3)):
                rules = self._revised(rules, parent.feedback, rng)
        strengths = {rule.activates_on: rule.strength for rule in rules}  # of equal rules the last one said
        explanation = tuple(sorted(Rule(*rule) for rule in [*strengths.items()][: self._rule_cap]))
        return Outcome(explanation, "ok", None, 0, 0, None)

    def _revised(self, rules: list[Rule], feedback: str, rng: np.random.Generator) -> list[Rule]:
        """One change, mostly one that the feedback suggests."""
        over, under = wrong_words(feedback)
        heeded = rng.random() < HEEDED
        missed = [firing for firing in self._firings if firing.word in under]
        if heeded and missed and (not over or rng.random() < 0.5):
            return [*rules, self._guess(missed, rng)]
        blamed = [i for i, rule in enumerate(rules) if any(covers(rule, word) for word in over)]
        place = int(rng.choice(blamed)) if heeded and blamed else int(rng.integers(len(rules)))
        narrowing, anything = ("narrow", "context", "drop", "weaken"), ("add", "replace", "widen", "strengthen")
        move = rng.choice(narrowing if heeded and blamed else narrowing + anything)
        rest = rules[:place] + rules[place + 1 :]
        if move == "add":
            return [*rules, self._guess(self._firings, rng)]
        if move == "replace" or (move == "drop" and not rest):
            return [*rest, self._guess(self._firings, rng)]
        if move == "drop":
            return rest
        return [*rest, self._changed(rules[place], str(move), rng)]

    def _changed(self, rule: Rule, move: str, rng: np.random.Generator) -> Rule:
        target, context = language.parts(rule.activates_on)
        meant = [firing for firing in self._firings if covers(rule, firing.word)] or self._firings
        if move == "context":
            context = common([firing.before for firing in meant], rng)
        elif move == "narrow":
            target = common([[firing.word] for firing in meant], rng, narrower_than=target) or target
        elif move == "widen" and context and rng.random() < 0.5:
            context = wider(context) if rng.random() < 0.5 else None
        elif move == "widen":
            target = wider(target)
        change = {"weaken": -1, "strengthen": 1}.get(move, 0)
        return Rule(language.joined(target, context), min(max(rule.strength + change, 1), MAX_STRENGTH))

    def _guess(self, firings: list[Firing], rng: np.random.Generator) -> Rule:
        target = common([[firing.word] for firing in firings], rng)
        assert target, "nothing fires on train"
        meant = [firing for firing in firings if covers(Rule(target), firing.word)]
        context = common([firing.before for firing in meant], rng) if rng.random() < 0.25 else None
        mean = float(np.mean([firing.activation for firing in meant]))
        return Rule(language.joined(target, context), min(max(round(mean), 1), MAX_STRENGTH))


def covers(rule: Rule, word: str) -> bool:
    """Whether the rule is about the word, its context aside."""
    return bool(language.COVERS[language.parts(rule.activates_on)[0]][language.INDEX[word]])


def wider(term: str) -> str:
    word = language.VOCABULARY[int(np.argmax(language.COVERS[term]))]
    terms = language.terms_of(word)
    return terms[min(terms.index(term) + 1, 2)]


def common(words: Iterable[Iterable[str]], rng: np.random.Generator, narrower_than: str | None = None) -> str | None:
    """A term, by the square of the number of groups of words that it has a word in; None where there is none."""
    counts = Counter(term for group in words for term in {t for word in group for t in language.terms_of(word)})
    limit = language.COVERS[narrower_than].sum() if narrower_than else np.inf
    terms = sorted(term for term in counts if language.COVERS[term].sum() < limit)
    weights = np.array([counts[term] ** 2 for term in terms], dtype=float)
    return str(rng.choice(terms, p=weights / weights.sum())) if terms else None


def wrong_words(feedback: str) -> tuple[list[str], list[str]]:
    """Words that were predicted too high, and too low, as the feedback quotes them."""
    errors = re.findall(r'^"(\w+)": predicted (\d), actual (\d)$', feedback, re.MULTILINE)
    over = [word for word, predicted, actual in errors if predicted > actual]
    falsified = re.findall(r'"(\w+)" \d', feedback.partition("Wrongly predicted: ")[2])
    known = language.INDEX
    return [w for w in [*over, *falsified] if w in known], [w for w, p, a in errors if p < a]
