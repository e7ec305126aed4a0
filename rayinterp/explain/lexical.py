"""Rules from the words, and words in context, that tell active from silent tokens, without an LLM: a root for the
search, and a yardstick.

It sees train records only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rayinterp.explanation import MAX_STRENGTH, Explanation, Rule
from rayinterp.records import ActivationRecord

MIN_PRECISION = 0.5
"""Share of a word's occurrences that must fire for it to be a rule's word."""
COVERAGE = 0.9
"""Words are added until they carry this share of the activation that such words carry."""
MAX_WORDS = 8
"""Words per rule: a longer list is a table, not an explanation."""
CONTEXT_WORDS = 4
"""Words before a word among which one may be what makes it fire."""
CONTEXT_PRECISION, MIN_OCCURRENCES = 0.75, 3
"""A word must fire in that share of at least so many occurrences in a context: there are many to be lucky in."""


class WordStatistics(NamedTuple):
    word: str
    after: str
    """A word soon before it without which it would not count; empty where it counts by itself."""
    mass: float
    """Sum of the activations at the word's tokens."""
    mean: float
    """Mean activation over its occurrences."""
    precision: float
    """Share of its occurrences that fire."""


def word_spans(tokens: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Words of a sequence (lower case) with the positions of their tokens; runs of punctuation count as words.

    A tokeniser may cut a word in pieces; a rule that quotes a piece would mean nothing to a reader.
    """
    text = "".join(tokens)
    token_of = [i for i, token in enumerate(tokens) for _ in token]
    spans = []
    for match in re.finditer(r"[^\W_]+(?:['’][^\W_]+)?|[^\w\s]+|_+", text):
        inside = sorted(set(token_of[match.start() : match.end()]))
        spans.append((match[0].lower(), inside))
    return spans


class _Occurrence(NamedTuple):
    word: str
    before: frozenset[str]
    activation: float


def _occurrences(records: Sequence[ActivationRecord]) -> list[_Occurrence]:
    found = []
    for record in records:
        spans = word_spans(record.sequence.tokens)
        for place, (word, positions) in enumerate(spans):
            before = frozenset(earlier for earlier, _ in spans[max(place - CONTEXT_WORDS, 0) : place])
            found.append(_Occurrence(word, before, max(float(record.activations[i]) for i in positions)))
    return found


def _statistics(word: str, after: str, occurrences: Sequence[_Occurrence]) -> WordStatistics:
    strengths = [occurrence.activation for occurrence in occurrences]
    count = len(strengths)
    return WordStatistics(word, after, sum(strengths), sum(strengths) / count, sum(x > 0 for x in strengths) / count)


def word_statistics(records: Sequence[ActivationRecord]) -> list[WordStatistics]:
    """Every word that fires reliably, by itself or soon after another one; largest mass first.

    Where there is none, the word that carries most. Empty where nothing fires.
    """
    by_word: dict[str, list[_Occurrence]] = defaultdict(list)
    for occurrence in _occurrences(records):
        by_word[occurrence.word].append(occurrence)
    words = [_statistics(word, "", occurrences) for word, occurrences in by_word.items()]
    firing = sorted((s for s in words if s.mass > 0), key=lambda s: (-s.mass, s.word))
    reliable = [s for s in firing if s.precision >= MIN_PRECISION]
    for s in firing:
        if s.precision < MIN_PRECISION:
            reliable += _contexts(by_word[s.word])
    return sorted(reliable, key=lambda s: (-s.mass, s.word, s.after)) or firing[:1]


def _contexts(occurrences: list[_Occurrence]) -> list[WordStatistics]:
    """Words after which this one fires reliably, each beyond what those before it explain."""
    chosen: list[WordStatistics] = []
    while len(chosen) < MAX_WORDS:
        after: dict[str, list[_Occurrence]] = defaultdict(list)
        for occurrence in occurrences:
            for earlier in occurrence.before - {occurrence.word}:
                after[earlier].append(occurrence)
        found = [
            _statistics(own[0].word, earlier, own) for earlier, own in after.items() if len(own) >= MIN_OCCURRENCES
        ]
        found = [s for s in found if s.precision >= CONTEXT_PRECISION]
        if not found:
            break
        best = min(found, key=lambda s: (-s.mass, s.after))
        chosen.append(best)
        occurrences = [occurrence for occurrence in occurrences if best.after not in occurrence.before]
    return chosen


def lexical_explanation(records: Sequence[ActivationRecord], rule_cap: int) -> Explanation | None:
    """Words grouped into rules by how strongly they fire; None where nothing fires."""
    statistics = word_statistics(records)
    wanted, covered = COVERAGE * sum(s.mass for s in statistics), 0.0
    rules: dict[tuple[int, str], list[WordStatistics]] = defaultdict(list)
    for s in statistics:
        if covered >= wanted:
            break
        covered += s.mass
        rules[min(max(round(s.mean), 1), MAX_STRENGTH), s.word if s.after else ""].append(s)
    groups = sorted(rules.items(), key=lambda group: -sum(s.mass for s in group[1]))[:rule_cap]
    return tuple(Rule(_sentence(group[:MAX_WORDS]), strength) for (strength, _), group in groups) or None


def _sentence(group: list[WordStatistics]) -> str:
    """A list of words, or one word in its contexts."""
    if group[0].after:
        return f"the word '{group[0].word}' soon after {_quoted(s.after for s in group)}"
    return f"the word{'s' if len(group) > 1 else ''} {_quoted(s.word for s in group)}"


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)
