"""Subjects whose features are known functions of the text, so that the pipeline can be checked against the truth.

    planted             six features over everyday words: three to be explained, a dead, a dense and a rare one
    planted/language    the made-up language of `planted_language`: four layers, from words to unions

A planted feature is a list of rules, each a sentence together with the function that says where it fires;
`OracleSimulator` reads the sentence and applies the function, so a true explanation predicts as well as any can, and
any loss on the way is the pipeline's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp import planted_language
from rayinterp.explanation import Explanation, Rule
from rayinterp.simulate.simulator import RuleRequest

if TYPE_CHECKING:
    from jaxtyping import Float

SAE = "planted"

GROUPS: dict[str, tuple[str, ...]] = {
    "sea": ("harbor", "sailor", "anchor", "ship", "tide"),
    "strings": ("violin", "cello", "viola"),
    "citrus": ("lemon", "lime", "orange"),
    "river": ("river", "stream"),
    "bank": ("bank",),
    "weather": ("rain", "snow", "wind", "storm", "cloud", "sun"),
    "home": ("table", "chair", "window", "door", "kitchen", "garden", "lamp"),
    "verbs": ("sees", "finds", "takes", "likes", "leaves", "keeps", "moves", "holds"),
    "function": ("the", "a", "near", "under", "with", "and", "of", "in"),
    "rare": ("zither",),
}
VOCABULARY: tuple[str, ...] = (*(word for group in GROUPS.values() for word in group), ".")

Fires = Callable[[Sequence[str]], "list[float]"]
"""Words of a sequence to a strength between 0 and 1 at each of them."""


def _any_of(*words: str) -> Fires:
    return lambda sequence: [float(word in words) for word in sequence]


def _after(word: str, earlier: tuple[str, ...], distance: int) -> Fires:
    """Fires on `word` where one of `earlier` stands at most `distance` words before it."""

    def fires(sequence: Sequence[str]) -> list[float]:
        return [
            float(w == word and any(e in earlier for e in sequence[max(0, i - distance) : i]))
            for i, w in enumerate(sequence)
        ]

    return fires


RULES: dict[str, Fires] = {
    "words about ships and the sea": _any_of(*GROUPS["sea"]),
    "the word 'bank' soon after a river or stream": _after("bank", GROUPS["river"], 4),
    "bowed string instruments": _any_of(*GROUPS["strings"]),
    "citrus fruits": _any_of(*GROUPS["citrus"]),
    "any word at all": lambda sequence: [1.0] * len(sequence),
    "the word 'zither'": _any_of("zither"),
}
"""What each planted rule means."""


class PlantedFeature(NamedTuple):
    truth: Explanation
    """The rules by which it fires; empty for a dead feature."""
    scale: float
    """Activation at strength 5."""


FEATURES: tuple[PlantedFeature, ...] = (
    PlantedFeature((Rule("words about ships and the sea", 5),), 8.0),
    PlantedFeature((Rule("the word 'bank' soon after a river or stream", 5),), 3.0),
    PlantedFeature((Rule("bowed string instruments", 5), Rule("citrus fruits", 2)), 12.0),
    PlantedFeature((), 1.0),
    PlantedFeature((Rule("any word at all", 5),), 1.0),
    PlantedFeature((Rule("the word 'zither'", 5),), 4.0),
)
"""A word list, a rule that needs context, a union of two unrelated rules; then dead, dense and too rare."""


def fires(explanation: Explanation, words: Sequence[str]) -> list[float]:
    """The largest of the rules' strengths (0-5) at each word; a rule that is not planted never fires."""
    per_rule = [
        [rule.strength * strength for strength in RULES[rule.activates_on](words)]
        for rule in explanation
        if rule.activates_on in RULES
    ]
    return [max(strengths) for strengths in zip(*per_rule, strict=True)] if per_rule else [0.0] * len(words)


def documents(seed: int, num_documents: int = 2000, num_words: int = 120) -> Iterator[dict]:
    """Random sentences in the Pile's schema; the same for the same seed."""
    rng = random.Random(seed)
    # A document has a subject, so that a sentence encoder can tell documents apart.
    topics = ("sea", "strings", "citrus", "river", "weather", "home")
    for number in range(num_documents):
        topic = rng.choice(topics)
        words: list[str] = []
        while len(words) < num_words:
            words += _sentence(rng, topic)
        if number % 400 == 0:
            words[num_words // 2] = "zither"
        yield {"text": " ".join(words), "meta": {"pile_set_name": f"planted-{topic}"}}


def _sentence(rng: random.Random, topic: str) -> list[str]:
    def noun() -> list[str]:
        group = rng.choice((topic, topic, "bank", "home", "weather"))
        return [rng.choice(("the", "a")), rng.choice(GROUPS[group])]

    return [*noun(), rng.choice(GROUPS["verbs"]), *noun(), rng.choice(("near", "under", "with")), *noun(), "."]


class World(NamedTuple):
    """A planted subject, with the texts that it is about."""

    vocabulary: tuple[str, ...]
    saes: dict[str, int]
    """Features of each SAE."""
    activations: Callable[[str, int, list[tuple[str, ...]]], Float[np.ndarray, "batch seq"]]
    """Of one feature (SAE, index) on texts of equal length, as words."""
    documents: Callable[[int], Iterator[dict]]
    """Texts for a seed."""


def _everyday_activations(sae: str, index: int, texts: list[tuple[str, ...]]) -> Float[np.ndarray, "batch seq"]:
    feature = FEATURES[index]
    return np.array([[feature.scale * s / 5 for s in fires(feature.truth, text)] for text in texts], dtype=np.float32)


def _language_activations(sae: str, index: int, texts: list[tuple[str, ...]]) -> Float[np.ndarray, "batch seq"]:
    return planted_language.activations(planted_language.FEATURES[sae][index], planted_language.encode(texts))


WORLDS: dict[str, World] = {
    "planted": World(VOCABULARY, {SAE: len(FEATURES)}, _everyday_activations, documents),
    "planted/language": World(
        planted_language.VOCABULARY,
        {sae: len(truths) for sae, truths in planted_language.FEATURES.items()},
        _language_activations,
        planted_language.documents,
    ),
}
"""By the name that `subject.model` and `corpus.dataset` give."""


def decoder_directions(world: World, sae: str, features: Sequence[int]) -> Float[np.ndarray, "k vocabulary"]:
    """A direction per feature: how strongly it fires on each word alone. Features that share words lie close."""
    words = [(word,) for word in world.vocabulary]
    return np.array([world.activations(sae, index, words)[:, 0] for index in features])


class PlantedTokenizer:
    """One token per word: the part of a tokenizer's interface that the corpus stage uses."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, vocabulary: tuple[str, ...] = VOCABULARY) -> None:
        self._vocabulary = vocabulary
        self._ids = {word: i for i, word in enumerate(vocabulary)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self._ids[word] for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(" " + self._vocabulary[i] for i in token_ids)


class OracleSimulator:
    """Predicts what a planted rule's words mean; an unknown rule predicts silence."""

    def simulate(self, requests: list[RuleRequest]) -> list[list[np.ndarray]]:
        return [
            self._predict(request.rule, [sequence.tokens for sequence in request.sequences]) for request in requests
        ]

    def _predict(self, rule: str, texts: list[tuple[str, ...]]) -> list[Float[np.ndarray, "seq"]]:
        explanation = (Rule(rule),)
        if rule in RULES:
            return [np.array(fires(explanation, [token.strip() for token in t]), dtype=np.float32) for t in texts]
        lengths = {len(text) for text in texts}
        if len(lengths) == 1:  # all at once: a text alone takes nearly as long
            return list(planted_language.strength(explanation, planted_language.encode(texts)))
        return [planted_language.strength(explanation, planted_language.encode([text]))[0] for text in texts]
