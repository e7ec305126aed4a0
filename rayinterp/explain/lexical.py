"""Rules from the words that tell active from silent tokens, without an LLM: a root for the search, and a yardstick.

It sees train records only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rayinterp.explanation import MAX_STRENGTH, Explanation, Rule
from rayinterp.records import ActivationRecord

MIN_PRECISION = 0.5
"""Share of a word's occurrences that must fire for it to be a rule's word."""
COVERAGE = 0.9
"""Words are added until they carry this share of the activation that such words carry."""
MAX_WORDS = 8
"""Words per rule: a longer list is a table, not an explanation."""


class WordStatistics(NamedTuple):
    word: str
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


def word_statistics(records: Sequence[ActivationRecord]) -> list[WordStatistics]:
    """Every word that fires at least once, largest mass first."""
    strengths: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for word, positions in word_spans(record.sequence.tokens):
            strengths[word].append(max(float(record.activations[i]) for i in positions))
    statistics = [
        WordStatistics(word, sum(s), sum(s) / len(s), sum(x > 0 for x in s) / len(s)) for word, s in strengths.items()
    ]
    return sorted((s for s in statistics if s.mass > 0), key=lambda s: (-s.mass, s.word))


def lexical_explanation(records: Sequence[ActivationRecord], rule_cap: int) -> Explanation | None:
    """Words grouped into rules by how strongly they fire; None where nothing fires."""
    statistics = word_statistics(records)
    if not statistics:
        return None
    precise = [s for s in statistics if s.precision >= MIN_PRECISION] or statistics[:1]
    wanted, covered = COVERAGE * sum(s.mass for s in precise), 0.0
    by_strength: dict[int, list[WordStatistics]] = defaultdict(list)
    for s in precise:
        if covered >= wanted:
            break
        covered += s.mass
        by_strength[min(max(round(s.mean), 1), MAX_STRENGTH)].append(s)
    groups = sorted(by_strength.items(), key=lambda group: -sum(s.mass for s in group[1]))[:rule_cap]
    return tuple(Rule(_sentence([s.word for s in group[:MAX_WORDS]]), strength) for strength, group in groups)


def _sentence(words: list[str]) -> str:
    quoted = ", ".join(f"'{word}'" for word in words)
    return f"the word {quoted}" if len(words) == 1 else f"the words {quoted}"
