"""A simulator without an LLM: a token is as active as its vector is close to a word of the rule.

    sequence -> token vectors of a sentence encoder (once) \
                                                             largest cosine, less that of null texts -> 0 to 5
    rule     -> vectors of its content words (once)        /

All rules of a candidate on all its sequences are one matrix product. The encoder has its own tokens; its similarities
are carried to the subject's tokens by character offsets. Blind to what a list of words cannot say: syntax, negation,
position.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from rayinterp.explanation import MAX_STRENGTH
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, RuleRequest, TokenSequence

if TYPE_CHECKING:
    from jaxtyping import Float16, Float32, Int64

MAX_CACHED_TOKENS = 200_000
"""Encoder tokens kept: 150 MB with 384 dimensions."""

QUOTED = re.compile(r"""(?<!\w)(?:'(.+?)'|"(.+?)"|‘(.+?)’|“(.+?)”|`(.+?)`)(?!\w)""")
WORD = re.compile(r"[\w'’-]*\w")

_FUNCTION_WORDS = """
    a about after all an and any are as at be been before being both but by can do does each either for from had has
    have how if in into is it its like may more most neither nor of on onto or other over so some such than that the
    their them then there these they this those through to under up upon was were what when where which while who whose
    will with within without would
"""
_SCAFFOLD_WORDS = """
    activates active appear appearing appears beginning character characters concept concepts containing contains
    context contexts describe describing ending especially example examples expression expressions feature features
    fires followed following form forms general generally include includes including indicate indicating instance
    instances kind kinds letter letters mention mentioned mentioning mentions name names often part particular
    particularly parts phrase phrases piece pieces preceded preceding prefix refer reference references referring refers
    relate related relating sentence sentences sequence sequences specifically starting subword suffix symbol symbols
    term terms text texts token tokens type types typically used usually variant variants various word words
"""
STOP_WORDS = frozenset(f"{_FUNCTION_WORDS} {_SCAFFOLD_WORDS}".split())
"""Words of a rule that say nothing about what it fires on."""


class EncodedText(NamedTuple):
    """A text as the encoder sees it, special tokens left out."""

    vectors: Float16[np.ndarray, "enc dim"]
    """Unit vectors."""
    spans: Int64[np.ndarray, "enc 2"]
    """First character and one past the last character of each token."""


def content_spans(rule: str) -> list[tuple[int, int]]:
    """Where a rule's content is: what it quotes; else its words less stop words; else all of it."""
    quoted = [match.span(match.lastindex or 0) for match in QUOTED.finditer(rule)]
    if quoted:
        return quoted
    words = [match.span() for match in WORD.finditer(rule) if match.group().lower() not in STOP_WORDS]
    return words or [(0, len(rule))]


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


def content_vectors(rule: EncodedText, text: str) -> Float32[np.ndarray, "word dim"]:
    """Vectors of the rule's content, each in the context of the whole rule."""
    ranges = overlapping(rule.spans, content_spans(text))
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
        self._nulls = [content_vectors(self._encode([null])[null], null) for null in NULL_EXPLANATIONS]

    def simulate(self, requests: list[RuleRequest]) -> list[list[Float32[np.ndarray, "seq"]]]:
        """Predictions in 0-5, as `Simulator` asks for; there is nothing to calibrate."""
        # In order of appearance: a set's order, and so what shares a padded batch, changes from process to process.
        texts = dict.fromkeys("".join(sequence.tokens) for request in requests for sequence in request.sequences)
        encoded = self._encode([*texts, *(request.rule for request in requests)])
        rules = {r.rule: content_vectors(encoded[r.rule], r.rule) for r in requests}
        answers: list[list[Float32[np.ndarray, "seq"]]] = [[] for _ in requests]
        together: dict[tuple[TokenSequence, ...], list[int]] = {}
        for index, request in enumerate(requests):
            together.setdefault(request.sequences, []).append(index)
        for sequences, indices in together.items():
            if sequences:
                words = [rules[requests[index].rule] for index in indices]
                for index, answer in zip(indices, self._predict(words, sequences, encoded), strict=True):
                    answers[index] = answer
        return answers

    @torch.inference_mode()
    def _predict(
        self,
        rules: list[Float32[np.ndarray, "word dim"]],
        sequences: tuple[TokenSequence, ...],
        encoded: dict[str, EncodedText],
    ) -> list[list[Float32[np.ndarray, "seq"]]]:
        """Every rule on every sequence: one product of all words, those of the null texts too, and all tokens."""
        texts = [encoded["".join(sequence.tokens)] for sequence in sequences]
        overlaps = [places_of(text.spans, sequence.tokens) for text, sequence in zip(texts, sequences, strict=True)]
        starts = np.cumsum([0, *(len(text.vectors) for text in texts[:-1])])
        places = np.concatenate([own + start for (own, _), start in zip(overlaps, starts, strict=True)])
        lengths = np.concatenate([own for _, own in overlaps])
        vectors = self._on_device(np.concatenate([text.vectors for text in texts])).float()
        words = [*rules, *self._nulls]
        cosines = self._on_device(np.concatenate(words)) @ vectors.T
        nearest = largest_of_each(cosines, self._on_device(np.array([len(own) for own in words])), empty=0.0)
        null = nearest[len(rules) :].mean(0)
        # Divided by the room above the null, so that a cosine of 1 becomes a full activation.
        excess = (nearest[: len(rules)] - null) / (1 - null).clamp(min=1e-3)
        predicted = largest_of_each(excess.T[self._on_device(places)], self._on_device(lengths), empty=-1.0)
        values = (MAX_STRENGTH * predicted.clamp(0, 1)).T.cpu().numpy()
        cuts = np.cumsum([len(sequence.tokens) for sequence in sequences])[:-1]
        return [np.split(of_rule, cuts) for of_rule in values]

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
