"""A subject whose features are known functions of the text, so that the pipeline can be checked against the truth.

Documents are random sentences over a small vocabulary of everyday words. A planted feature is a list of rules, each a
sentence together with the function that says where it fires; `OracleSimulator` reads the sentence and applies the
function, so a true explanation predicts perfectly, and any loss on the way is the pipeline's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rayinterp.explanation import Explanation, Rule
from rayinterp.simulate.simulator import RuleRequest
from rayinterp.subject import SparseActivations, SubjectCheck, sparsify

if TYPE_CHECKING:
    from jaxtyping import Float, Int

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


def decoder_directions(features: Sequence[int]) -> Float[np.ndarray, "k vocabulary"]:
    """A direction per feature: how strongly it fires on each word alone. Features that share words lie close."""
    return np.array([[fires(FEATURES[i].truth, [word])[0] for word in VOCABULARY] for i in features])


class PlantedTokenizer:
    """One token per word: the part of a tokenizer's interface that the corpus stage uses."""

    all_special_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [VOCABULARY.index(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(" " + VOCABULARY[i] for i in token_ids)


class PlantedSubject:
    """Fires where the planted rules say."""

    def __init__(self, features: dict[str, list[int]]) -> None:
        self.features = features
        self.dtype = "float32"

    def activations(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        """Activations of the requested features, dense."""
        rows = [[VOCABULARY[i] for i in row] for row in token_ids.tolist()]
        wanted = [FEATURES[index] for index in self.features[SAE]]
        values = [[[f.scale * s / 5 for s in fires(f.truth, row)] for f in wanted] for row in rows]
        return {SAE: torch.tensor(values).transpose(1, 2).float()}

    def check(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, SubjectCheck]:
        return {SAE: SubjectCheck(variance_unexplained=0.0, median_norm=1.0)}

    def stream(self, batches: Iterable[Int[torch.Tensor, "batch seq"]]) -> Iterator[dict[str, SparseActivations]]:
        for batch in batches:
            yield {SAE: sparsify(self.activations(batch)[SAE], torch.ones(batch.shape))}

    def holistic(self, token_ids: Int[torch.Tensor, "batch seq"]) -> dict[str, Float[torch.Tensor, "batch seq k"]]:
        places = range(token_ids.shape[1])
        shorter = [torch.cat([token_ids[:, :i], token_ids[:, i + 1 :]], dim=1) for i in places]
        without = torch.stack([self.activations(ids)[SAE].mean(1) for ids in shorter], dim=1)
        return {SAE: self.activations(token_ids)[SAE].mean(1, keepdim=True) - without}


class OracleSimulator:
    """Predicts what a planted rule's words mean; an unknown rule predicts silence."""

    def simulate(self, requests: list[RuleRequest]) -> list[list[np.ndarray]]:
        return [
            [
                np.array(fires((Rule(request.rule),), [t.strip() for t in sequence.tokens]), dtype=np.float32)
                for sequence in request.sequences
            ]
            for request in requests
        ]
