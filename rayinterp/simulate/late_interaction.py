"""A simulator without an LLM: a token is as active as its vector is close to a word of the rule.

    sequence   -> token vectors of a sentence encoder (once)   \
    rule       -> vectors of its words (once)                    excess of each cosine over the word's threshold;
    background -> 99th percentile of each word's cosines:        the largest of the rule's words -> 0 to 5
                  its threshold (once a rule)                  /

Any two tokens are a little alike: what a word of the rule shares with one token in a hundred of any text says nothing.
All rules of a candidate on all its sequences are one matrix product. The encoder has its own tokens; its similarities
are carried to the subject's tokens by character offsets. What shares a padded batch moves the last bits of a vector:
who asks in another order gets the same predictions up to rounding, and no memo keeps the first ones. Blind to what a
list of words cannot say: syntax, negation, position.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from rayinterp.explanation import MAX_STRENGTH
from rayinterp.simulate.simulator import RuleRequest, TokenSequence

if TYPE_CHECKING:
    from jaxtyping import Float16, Float32, Int64

MAX_CACHED_TOKENS = 200_000
"""Encoder tokens kept: 150 MB with 384 dimensions."""
MAX_CACHED_RULES = 2_000
"""Rules whose words and thresholds are kept: 30 MB with ten words of 384 dimensions each."""
BACKGROUND_QUANTILE = 0.99
"""How rare a cosine must be before it counts: at 0.95 common words get through, at 0.999 some rules fall silent."""

QUOTED = re.compile(r"""(?<!\w)(?:'(.+?)'|"(.+?)"|‘(.+?)’|“(.+?)”|`(.+?)`)(?!\w)""")


class EncodedText(NamedTuple):
    """A text as the encoder sees it, special tokens left out."""

    vectors: Float16[np.ndarray, "enc dim"]
    """Unit vectors."""
    spans: Int64[np.ndarray, "enc 2"]
    """First character and one past the last character of each token."""


class RuleWords(NamedTuple):
    """What a rule is compared by; a word is a token of the encoder."""

    vectors: Float32[np.ndarray, "word dim"]
    """Each in the context of the whole rule."""
    thresholds: Float32[np.ndarray, "word"]
    """The cosine that each reaches with one token in a hundred of the background."""


def background_texts() -> list[str]:
    """Some ninety short texts of as many kinds: were one subject large, its words would have high thresholds."""
    text = resources.files("rayinterp.simulate").joinpath("background.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\n")


def quoted_spans(rule: str) -> list[tuple[int, int]]:
    """Where a rule quotes something, without the quotation marks."""
    return [match.span(match.lastindex or 0) for match in QUOTED.finditer(rule)]


def overlapping(spans: Int64[np.ndarray, "enc 2"], wanted: Iterable[tuple[int, int]]) -> Int64[np.ndarray, "wanted 2"]:
    """For each wanted character range, the first encoder token that overlaps it and one past the last."""
    edges = np.asarray(list(wanted), dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(spans[:, 1], edges[:, 0], side="right")
    stop = np.searchsorted(spans[:, 0], edges[:, 1], side="left")
    return np.stack([first, stop], axis=1)


def places_of(spans: Int64[np.ndarray, "enc 2"], tokens: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's tokens that overlap each of the subject's, one list after another, and the lists' lengths.

    White space overlaps nothing.
    """
    edges = np.cumsum([0, *map(len, tokens)])
    ranges = overlapping(spans, pairwise(edges.tolist()))
    lengths = np.maximum(ranges[:, 1] - ranges[:, 0], 0) * np.array([bool(token.strip()) for token in tokens])
    starts = np.repeat(ranges[:, 0], lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts + within, lengths


def word_vectors(rule: EncodedText, text: str) -> Float32[np.ndarray, "word dim"]:
    """Vectors of what the rule quotes, or of all of it."""
    ranges = overlapping(rule.spans, quoted_spans(text))
    chosen = [index for first, stop in ranges.tolist() for index in range(first, stop)]
    return (rule.vectors[chosen] if chosen else rule.vectors).astype(np.float32)


def largest_of_each(
    values: Float32[torch.Tensor, "n *rest"], lengths: Int64[torch.Tensor, "groups"], empty: float
) -> Float32[torch.Tensor, "groups *rest"]:
    """Largest value of each stretch of rows; `empty` where a stretch has none."""
    groups = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    index = groups.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
    start = values.new_full((len(lengths), *values.shape[1:]), empty)
    return start.scatter_reduce(0, index, values, "amax", include_self=False)


class LateInteractionSimulator:
    """A sentence encoder, and the vectors of the texts that it has seen."""

    def __init__(self, embedder: str, *, batch_size: int = 64, device: str | None = None) -> None:
        self._encoder = SentenceTransformer(embedder, device=device).eval()
        self._batch_size = batch_size
        self._cache: OrderedDict[str, EncodedText] = OrderedDict()
        self._num_cached_tokens = 0
        background = self._run_encoder(background_texts())
        self._background = np.concatenate([text.vectors for text in background]).astype(np.float32)
        self._words_of = lru_cache(MAX_CACHED_RULES)(self._read_rule)

    def simulate(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq"]]]:
        """Predictions in 0-5, as `Simulator` asks for; there is nothing to calibrate."""
        # In order of appearance: a set's order, and so what shares a padded batch, changes from process to process.
        texts = dict.fromkeys("".join(sequence.tokens) for request in requests for sequence in request.sequences)
        encoded = self._encode([*texts, *(request.rule for request in requests)])
        answers: list[list[Float32[np.ndarray, "seq"]]] = [[] for _ in requests]
        together: dict[tuple[TokenSequence, ...], list[int]] = {}
        for index, request in enumerate(requests):
            together.setdefault(request.sequences, []).append(index)
        for sequences, indices in together.items():
            if sequences:
                rules = [self._words_of(requests[index].rule) for index in indices]
                for index, answer in zip(indices, self._predict(rules, sequences, encoded), strict=True):
                    answers[index] = answer
        return answers

    @torch.inference_mode()
    def _predict(
        self,
        rules: list[RuleWords],
        sequences: tuple[TokenSequence, ...],
        encoded: dict[str, EncodedText],
    ) -> list[list[Float32[np.ndarray, "seq"]]]:
        """Every rule on every sequence: one product of all words and all tokens."""
        texts = [encoded["".join(sequence.tokens)] for sequence in sequences]
        overlaps = [places_of(text.spans, sequence.tokens) for text, sequence in zip(texts, sequences, strict=True)]
        starts = np.cumsum([0, *(len(text.vectors) for text in texts[:-1])])
        places = np.concatenate([own + start for (own, _), start in zip(overlaps, starts, strict=True)])
        lengths = np.concatenate([own for _, own in overlaps])
        vectors = self._on_device(np.concatenate([text.vectors for text in texts])).float()
        words = self._on_device(np.concatenate([rule.vectors for rule in rules]))
        thresholds = self._on_device(np.concatenate([rule.thresholds for rule in rules]))[:, None]
        # Divided by the room above the threshold, so that a cosine of 1 becomes a full activation.
        excess = (words @ vectors.T - thresholds) / (1 - thresholds).clamp(min=1e-3)
        num_words = self._on_device(np.array([len(rule.vectors) for rule in rules]))
        nearest = largest_of_each(excess, num_words, empty=0.0)
        predicted = largest_of_each(nearest.T[self._on_device(places)], self._on_device(lengths), empty=-1.0)
        values = (MAX_STRENGTH * predicted.clamp(0, 1)).T.cpu().numpy()
        cuts = np.cumsum([len(sequence.tokens) for sequence in sequences])[:-1]
        return [np.split(of_rule, cuts) for of_rule in values]

    def _read_rule(self, rule: str) -> RuleWords:
        """On the CPU and rule by rule, so that a threshold does not depend on what else is asked."""
        vectors = word_vectors(self._encode([rule])[rule], rule)
        thresholds = np.quantile(self._background @ vectors.T, BACKGROUND_QUANTILE, axis=0)
        return RuleWords(vectors, thresholds.astype(np.float32))

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._encoder.device)

    def _encode(self, texts: list[str]) -> dict[str, EncodedText]:
        """Vectors of each text, from the cache where they are."""
        unique = list(dict.fromkeys(texts))
        encoded = {text: self._cache[text] for text in unique if text in self._cache}
        for text in encoded:
            self._cache.move_to_end(text)
        new = [text for text in unique if text not in encoded]
        encoded.update(zip(new, self._run_encoder(new), strict=True))
        for text in new:
            self._cache[text] = encoded[text]
            self._num_cached_tokens += len(encoded[text].spans)
        while self._num_cached_tokens > MAX_CACHED_TOKENS:
            _, oldest = self._cache.popitem(last=False)
            self._num_cached_tokens -= len(oldest.spans)
        return encoded

    @torch.inference_mode()
    def _run_encoder(self, texts: list[str]) -> list[EncodedText]:
        """Token vectors; a text longer than the encoder reads is cut into windows."""
        parts: list[list[EncodedText]] = [[] for _ in texts]
        # Texts of like length share a batch, so that little is padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            tokens = self._encoder.tokenizer(
                [texts[index] for index in batch],
                padding=True,
                truncation=True,
                max_length=self._encoder.max_seq_length,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            spans, windows = tokens.pop("offset_mapping").numpy(), tokens.pop("overflow_to_sample_mapping")
            ordinary = tokens.pop("special_tokens_mask").numpy() == 0
            vectors = self._encoder[0](dict(tokens.to(self._encoder.device)))["token_embeddings"]
            vectors = torch.nn.functional.normalize(vectors.float(), dim=-1).half().cpu().numpy()
            for row, window in enumerate(windows.tolist()):
                kept = ordinary[row]
                parts[batch[window]].append(EncodedText(vectors[row, kept], spans[row, kept].astype(np.int64)))
        return [EncodedText(*map(np.concatenate, zip(*windows, strict=True))) for windows in parts]
