"""The LLM of the planted language: it reads the same prompts as any other and answers by chance or by heart.

    blind   guesses at random, sooner what many firing tokens in the prompt have in common; heeds feedback now and then
    truth   what is planted: the ceiling of any explainer
    broad   the classes of what is planted, contexts forgotten: sounds right, and is not

The blind one knows the language and not the truth, so that searches can be compared at the same quality of ideas.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rayinterp import planted_language as language
from rayinterp.explain.client import Generate, LLMReply, LLMRequest
from rayinterp.explanation import MAX_STRENGTH, Explanation, ParseError, Rule, parse_string, parse_structured, to_json
from rayinterp.feature_id import FeatureId

HEEDED = 0.7
"""Share of revisions that do something about what the feedback says."""
CONTEXT, NEEDED_CONTEXT = 0.25, 0.75
"""Share of guesses with a context; where the prompt shows what tokens need, and it stands before them."""
MAX_RULES = 5
"""Where the prompt does not say."""


class Firing(NamedTuple):
    """A token on which the feature is active in a text of the prompt."""

    word: str
    before: tuple[str, ...]
    """Words that "soon after" reaches."""
    activation: float
    needed: tuple[str, ...] = ()
    """Those of them without which the feature would fire less, where the prompt says so."""


class Guesser:
    """Guesses rules from firing tokens.

    Args:
        silent: Words of texts on which the feature is silent.
    """

    def __init__(self, firings: Sequence[Firing], rule_cap: int = MAX_RULES, silent: Iterable[str] = ()) -> None:
        self._firings, self._rule_cap = firings, rule_cap
        self._silent = Counter(term for word in silent for term in language.terms_of(word))

    def root(self, rng: np.random.Generator) -> Explanation:
        """A first guess."""
        return self._told_apart([self._guess(self._firings, rng) for _ in range(rng.integers(1, 4))])

    def revision(self, explanation: Explanation, feedback: str, rng: np.random.Generator) -> Explanation:
        """Another one, by what is said of the last."""
        rules = list(explanation)
        for _ in range(rng.integers(1, 3)):
            rules = self._revised(rules, feedback, rng)
        return self._told_apart(rules)

    def _told_apart(self, rules: list[Rule]) -> Explanation:
        strengths = {rule.activates_on: rule.strength for rule in rules}  # of equal rules the last one said
        return tuple(sorted(Rule(*rule) for rule in [*strengths.items()][: self._rule_cap]))

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
            context = self._common([firing.needed or firing.before for firing in meant], rng)
        elif move == "narrow":
            target = self._common([[firing.word] for firing in meant], rng, narrower_than=target) or target
        elif move == "widen" and context and rng.random() < 0.5:
            context = language.wider(context) if rng.random() < 0.5 else None
        elif move == "widen":
            target = language.wider(target)
        change = {"weaken": -1, "strengthen": 1}.get(move, 0)
        return Rule(language.joined(target, context), min(max(rule.strength + change, 1), MAX_STRENGTH))

    def _guess(self, firings: Sequence[Firing], rng: np.random.Generator) -> Rule:
        target = self._common([[firing.word] for firing in firings], rng)
        assert target, "nothing fires on train"
        meant = [firing for firing in firings if covers(Rule(target), firing.word)]
        chance = NEEDED_CONTEXT if sum(bool(firing.needed) for firing in meant) * 2 > len(meant) else CONTEXT
        before = [firing.needed or firing.before for firing in meant]
        context = self._common(before, rng) if rng.random() < chance else None
        mean = float(np.mean([firing.activation for firing in meant]))
        return Rule(language.joined(target, context), min(max(round(mean), 1), MAX_STRENGTH))

    def _common(
        self, words: Iterable[Iterable[str]], rng: np.random.Generator, narrower_than: str | None = None
    ) -> str | None:
        """A term, by the square of the number of groups of words that it has a word in; None where there is none."""
        counts = Counter(term for group in words for term in {t for word in group for t in language.terms_of(word)})
        limit = language.covered(narrower_than).sum() if narrower_than else np.inf
        terms = sorted(term for term in counts if language.covered(term).sum() < limit)
        weights = np.array([counts[term] ** 2 / (1 + self._silent[term]) for term in terms], dtype=float)
        return str(rng.choice(terms, p=weights / weights.sum())) if terms else None


def covers(rule: Rule, word: str) -> bool:
    """Whether the rule is about the word, its context aside."""
    return bool(language.covered(language.parts(rule.activates_on)[0])[language.INDEX[word]])


def wrong_words(feedback: str) -> tuple[list[str], list[str]]:
    """Words that were predicted too high, and too low, as the feedback quotes them."""
    errors = re.findall(r'^"(\w+)": predicted (\d), actual (\d)$', feedback, re.MULTILINE)
    over = [word for word, predicted, actual in errors if predicted > actual]
    falsified = re.findall(r'"(\w+)" \d', feedback.partition("Wrongly predicted: ")[2])
    known = language.INDEX
    return (
        [word for word in [*over, *falsified] if word in known],
        [word for word, predicted, actual in errors if predicted < actual and word in known],
    )


def planted_client(model: str) -> Generate:
    """Answers as `blind`, `truth` or `broad`."""

    async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
        messages = [message["content"] for message in request.messages]
        if model == "blind":
            explanation = blind_answer(messages, np.random.default_rng(request.seed))
        else:
            feature = FeatureId.parse(feature_key)
            truth = language.FEATURES[feature.sae][feature.index]
            explanation = truth if model == "truth" else language.broadened(truth)
        sentence = language.OR.join(rule.activates_on for rule in explanation)
        text = to_json(explanation) if "JSON" in messages[0] else sentence
        return LLMReply(text, "stop", sum(len(message.split()) for message in messages), len(text.split()))

    return generate


def blind_answer(messages: Sequence[str], rng: np.random.Generator) -> Explanation:
    """A guess from what an explainer's conversation shows."""
    asked = [message for message in messages if "Text 1: " in message][-1]
    cap = re.search(r"at most (\d+) rules", messages[0])
    guesser = Guesser(read_firings(asked), int(cap[1]) if cap else MAX_RULES, _silent_words(asked))
    if messages[-1] == asked:
        return guesser.root(rng)
    return guesser.revision(_read_answer(messages[-2]), messages[-1], rng)


_SHOWN = re.compile(r"^Text \d+: (.*)\nFires on: (.*)(?:\nFires less without: (.*))?$", re.MULTILINE)


def read_firings(prompt: str) -> list[Firing]:
    """Tokens of the language that fire in the texts of a prompt."""
    firings = []
    for text, fired, needed in _SHOWN.findall(prompt):
        words = text.replace("<<", "").replace(">>", "").split()
        places = [i for i, word in enumerate(text.split()) if word.startswith("<<")]
        strengths = [int(strength) for strength in re.findall(r'"[^"]*" (\d)', fired)]
        known = set(re.findall(r'"(\w+)"', needed))
        for place, strength in zip(places, strengths, strict=True):
            if words[place] in language.INDEX:
                before = tuple(w for w in words[max(0, place - language.DISTANCE) : place] if w in language.INDEX)
                heard = tuple(word for word in before if word in known and language.terms_of(word))
                firings.append(Firing(words[place], before, float(strength), heard))
    return firings


def _silent_words(prompt: str) -> list[str]:
    texts = re.findall(r"^Silent text \d+: (.*)$", prompt, re.MULTILINE)
    return [word for text in texts for word in text.split() if word in language.INDEX]


def _read_answer(answer: str) -> Explanation:
    """The explanation that is to be revised, in either form."""
    try:
        return parse_structured(answer, 2 * MAX_RULES)
    except ParseError:
        (sentence,) = parse_string(answer)
        return tuple(Rule(part) for part in sentence.activates_on.split(language.OR))
