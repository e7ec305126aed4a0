"""A made-up language of 248 words, the rules that it can say, and features planted in it.

    words < sorts < classes        "the word 'toolora'" < "words for old tools" < "words for tools"; each is a term
    rule = a term, or "TERM soon after TERM"; a sentence is rules joined by ", or "

Lists of words, as lexical explanations write them, are terms too: "the words 'toolora', 'toololin'".

A word begins as the name of its class does, so that a sentence encoder hears a rule's words in a text. Four layers of
features: words, classes, words in a context, unions of unrelated rules. What a feature does on a text is always read
off its truth, so explanations can be held against it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from rayinterp.explanation import Explanation, Rule

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Kind = Literal["word", "class", "context", "union"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Of truths, from the plainest to the most involved."""

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
AFTER, OR = " soon after ", ", or "
DISTANCE = 4
"""How many words "soon after" reaches back."""

FEATURES_PER_LAYER = 8
"""Planted features of each kind."""
LENGTH, PER_DOCUMENT = 16, 4
"""Words of a sentence, sentences of a document; sequences are cut from documents of that length."""
FIRING, NEAR_MISSES = 0.5, 0.2
"""Shares of sentences that are given what some feature fires on, or nearly that."""


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
    """The rule with these parts."""
    return target + AFTER + context if context else target


def covered(term: str) -> Bool[np.ndarray, "vocabulary"]:
    """Which words a term means; none for what is not in the language."""
    if term in COVERS:
        return COVERS[term]
    means = np.zeros(len(VOCABULARY), dtype=bool)
    if _LIST.fullmatch(term):
        means[[INDEX[word] for word in re.findall(r"\w+(?=')", term) if word in INDEX]] = True
    return means


_LIST = re.compile(r"(the words? )?'\w+'(, '\w+')*")


def wider(term: str) -> str:
    """The next larger term: the word's sort, the sort's class, and of a class the class itself."""
    terms = terms_of(VOCABULARY[int(np.argmax(covered(term)))])
    return terms[min(terms.index(term) + 1, 2)] if term in terms else terms[1]


def broadened(explanation: Explanation) -> Explanation:
    """What a careless reader would say: the classes of all targets, contexts forgotten."""
    return tuple(dict.fromkeys(Rule(wider(wider(parts(rule.activates_on)[0])), rule.strength) for rule in explanation))


def fires(sentence: str, words: Int[np.ndarray, "n seq"]) -> Bool[np.ndarray, "n seq"]:
    """Where any of the sentence's rules holds; what is not in the language never does."""
    return np.any([_holds(rule, words) for rule in sentence.split(OR)], axis=0)


def _holds(rule: str, words: Int[np.ndarray, "n seq"]) -> Bool[np.ndarray, "n seq"]:
    target, context = parts(rule)
    holds = covered(target)[words]
    if context:
        before, soon = covered(context)[words], np.zeros_like(holds)
        for back in range(1, DISTANCE + 1):
            soon[:, back:] |= before[:, :-back]
        holds = holds & soon
    return holds


def strength(explanation: Explanation, words: Int[np.ndarray, "n seq"]) -> Float[np.ndarray, "n seq"]:
    """The largest strength of the rules that hold."""
    return np.max([rule.strength * fires(rule.activates_on, words) for rule in explanation], axis=0).astype(np.float32)


@cache
def _encoded(words: tuple[str, ...]) -> list[int]:
    return [INDEX.get(word.strip(), 0) for word in words]


def encode(texts: Sequence[tuple[str, ...]]) -> Int[np.ndarray, "n seq"]:
    """Texts of equal length as word numbers; a word of another language counts as a little word."""
    return np.array([_encoded(text) for text in texts])


def truth(kind: Kind, rng: np.random.Generator) -> Explanation:
    """A feature of a kind."""
    first, second = (CLASSES[i] for i in rng.permutation(len(CLASSES))[:2])

    def term(of_class: str, *levels: int) -> str:
        return str(rng.choice([name for level in levels for name in BY_LEVEL[level] if name in _below(of_class)]))

    if kind == "word":
        return (Rule(term(first, 0)),)
    if kind == "class":
        return (Rule(term(first, 1, 2)),)
    if kind == "context":
        return (Rule(joined(term(first, int(rng.integers(2))), term(second, 2))),)
    levels = rng.integers(2, size=2)
    return Rule(term(first, int(levels[0]))), Rule(term(second, int(levels[1])), int(rng.integers(3, 6)))


def _below(of_class: str) -> set[str]:
    """Terms for anything in a class."""
    words = COVERS[f"words for {of_class}"]
    return {term for word in np.flatnonzero(words) for term in terms_of(VOCABULARY[word])}


def _planted() -> dict[str, tuple[Explanation, ...]]:
    """One SAE a kind, always the same; no two features are alike."""
    saes = {}
    for layer, kind in enumerate(KINDS):
        rng, truths = np.random.default_rng([20, layer]), dict[Explanation, None]()
        while len(truths) < FEATURES_PER_LAYER:
            truths[truth(kind, rng)] = None
        saes[f"layer_{layer}"] = tuple(truths)
    return saes


FEATURES: dict[str, tuple[Explanation, ...]] = _planted()
"""Truths by SAE and index."""


def activations(of: Explanation, words: Int[np.ndarray, "n seq"]) -> Float[np.ndarray, "n seq"]:
    """What a planted feature does: no word makes it fire quite as strongly as another."""
    key = np.random.default_rng(zlib.crc32(repr(of).encode()))
    return (strength(of, words) * key.uniform(0.6, 1, len(VOCABULARY))[words]).astype(np.float32)


def sentences(count: int, rng: np.random.Generator, per_document: int) -> Int[np.ndarray, "count length"]:
    """Random words, half of them little ones; every `per_document` sentences are about the same three sorts."""
    num_sorts, num_documents = len(CLASSES) * len(SORTS), -(-count // per_document)
    subjects = np.repeat(rng.integers(num_sorts, size=(num_documents, 3)), per_document, axis=0)[:count]
    sorts = np.take_along_axis(subjects, rng.integers(3, size=(count, LENGTH)), axis=1)
    content = len(LITTLE_WORDS) + sorts * PER_SORT + rng.integers(PER_SORT, size=(count, LENGTH))
    return np.where(rng.random((count, LENGTH)) < 0.5, content, rng.integers(len(LITTLE_WORDS), size=(count, LENGTH)))


def documents(seed: int, num_documents: int = 4000) -> Iterator[dict]:
    """Texts in the Pile's schema; the same for the same seed."""
    rng = np.random.default_rng([seed, 1])
    words = sentences(num_documents * PER_DOCUMENT, rng, PER_DOCUMENT)
    truths = [of for of_layer in FEATURES.values() for of in of_layer]
    for i, chance in enumerate(rng.random(len(words))):
        if chance < FIRING + NEAR_MISSES:
            put_fragment(words[i], truths[rng.integers(len(truths))], chance < FIRING, rng)
    for document in words.reshape(num_documents, -1):
        yield {"text": " ".join(VOCABULARY[i] for i in document), "meta": {"pile_set_name": "planted-language"}}


def put_fragment(words: Int[np.ndarray, "length"], of: Explanation, firing: bool, rng: np.random.Generator) -> None:
    """Overwrites some of a sentence's words with some on which one of the rules holds, or nearly does."""
    target, context = parts(of[rng.integers(len(of))].activates_on)
    inside = np.flatnonzero(COVERS[target])
    whole = np.flatnonzero(COVERS[terms_of(VOCABULARY[inside[0]])[2]])
    outside = np.setdiff1d(whole, inside)
    gap = rng.integers(len(LITTLE_WORDS), size=rng.integers(DISTANCE - 1)).tolist()
    before = [int(rng.choice(np.flatnonzero(COVERS[context]))), *gap] if context else []
    if firing:
        fragment = [*before, int(rng.choice(inside))]
    elif context and rng.random() < 0.7:
        fragment = [int(rng.choice(inside))]
    else:
        fragment = [*before, int(rng.choice(outside if len(outside) else inside))]
    start = rng.integers(len(words) - len(fragment) + 1)
    words[start : start + len(fragment)] = fragment


def recovers(explanation: Explanation, of: Explanation, words: Int[np.ndarray, "n seq"]) -> bool:
    """Whether an explanation fires on exactly the tokens on which a feature does."""
    return bool(np.array_equal(strength(explanation, words) > 0, strength(of, words) > 0))
