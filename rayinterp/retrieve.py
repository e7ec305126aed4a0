"""Silent sequences that sound like a text: what an explanation's own words would claim wrongly (`rule_negative`).

    explanation's texts -> sentence encoder -> nearest sequences of a split on which the feature is silent

A search asks each round, for many features at once; one pass over the vectors answers all of them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from rayinterp.config import RunConfig
from rayinterp.corpus import load_tokenizer
from rayinterp.feature_id import FeatureId
from rayinterp.index import TableVectors, check_dimension, embedder_path
from rayinterp.records import ActivationRecord, load_corpus, read_places, read_sequences, shard_order
from rayinterp.simulate.simulator import TokenSequence
from rayinterp.sources import SPLITS
from rayinterp.tables import Tables

RULE_NEGATIVE = "rule_negative"
NUM_FEATURES = 512
"""Features whose places of activity are kept at hand: a search asks again each round."""


class SilentRequest(NamedTuple):
    """What a search asks for."""

    feature: FeatureId
    texts: tuple[str, ...]
    """The explanation's rules, or whatever else is suspected."""
    split: str
    count: int


class Found(NamedTuple):
    """A silent sequence."""

    sequence_id: int
    similarity: float
    """Cosine to the text that it is closest to."""
    text: int
    """Which of the request's texts that is."""


class Retriever:
    """Answers requests from the vectors and posting lists of one run."""

    def __init__(self, config: RunConfig, tables: Tables) -> None:
        from sentence_transformers import SentenceTransformer

        self._tables = tables
        self._corpus = load_corpus(tables)
        self._order, self._starts = shard_order(self._corpus)
        self._vectors = TableVectors(tables, self._corpus, config.index)
        self._encoder = SentenceTransformer(embedder_path(config.index.embedder))
        check_dimension(config.index.embedder, self._encoder.get_embedding_dimension(), tables)
        self._places: OrderedDict[FeatureId, np.ndarray] = OrderedDict()
        """Where each feature is active."""

    def silent(self, requests: Sequence[SilentRequest]) -> list[list[Found]]:
        """For each request its nearest silent sequences, best first, each once; fewer where the split has no more."""
        texts = [text for request in requests for text in request.texts]
        if not texts:
            return [[] for _ in requests]
        owners = [number for number, request in enumerate(requests) for _ in request.texts]
        self._read([request.feature for request in requests])
        excluded = [self._places[requests[owner].feature] for owner in owners]
        queries = self._encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        most = max(request.count for request in requests)
        hits = self._vectors.search(np.asarray(queries), excluded, most)
        answers: list[dict[int, Found]] = [{} for _ in requests]
        numbers = [number for request in requests for number in range(len(request.texts))]
        for owner, number, of_text in zip(owners, numbers, hits, strict=True):
            places, similarity = of_text[SPLITS.index(requests[owner].split)]
            for place, value in zip(places.tolist(), similarity.tolist(), strict=True):
                found = Found(int(self._corpus.sequence_ids[place]), value, number)
                before = answers[owner].get(place)
                if before is None or value > before.similarity:
                    answers[owner][place] = found
        return [
            sorted(answer.values(), key=lambda found: (-found.similarity, found.sequence_id))[: request.count]
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _read(self, features: Sequence[FeatureId]) -> None:
        missing = [feature for feature in dict.fromkeys(features) if feature not in self._places]
        self._places.update(read_places(self._tables, missing, self._order, self._starts) if missing else {})
        for feature in features:
            self._places.move_to_end(feature)
        while len(self._places) > max(NUM_FEATURES, len(set(features))):
            self._places.popitem(last=False)


class SharedRetriever:
    """Answers many searches: what is asked while one pass runs is answered by the next. Run as a Ray actor."""

    def __init__(self, config: RunConfig, tables: Tables) -> None:
        self._config, self._tables = config, tables
        self._retriever: Retriever | None = None
        self._tokenizer = load_tokenizer(config)
        self._thread = ThreadPoolExecutor(1, "retriever")
        self._waiting: list[tuple[list[SilentRequest], asyncio.Future[list[list[ActivationRecord]]]]] = []
        self._passes: asyncio.Task[None] | None = None

    async def silent(self, requests: list[SilentRequest]) -> list[list[ActivationRecord]]:
        """For each request its nearest silent sequences, as records of its feature."""
        answer: asyncio.Future[list[list[ActivationRecord]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((requests, answer))
        if self._passes is None or self._passes.done():
            self._passes = asyncio.create_task(self._answer_all())
        return await answer

    async def _answer_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            together = [request for requests, _ in batch for request in requests]
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._thread, self._find, together)
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)
                continue
            for requests, answer in batch:
                answer.set_result(found[: len(requests)])
                found = found[len(requests) :]

    def _find(self, requests: list[SilentRequest]) -> list[list[ActivationRecord]]:
        # Made here, for a refusal to reach the user as what it is: one from the constructor is a dead actor.
        self._retriever = self._retriever or Retriever(self._config, self._tables)
        found = self._retriever.silent(requests)
        ids = {hit.sequence_id for hits in found for hit in hits}
        rows = read_sequences(self._tables, ids, self._tokenizer)
        return [[silent_record(rows[hit.sequence_id]) for hit in hits] for hits in found]


def silent_record(row: dict[str, Any]) -> ActivationRecord:
    """A record from a row of `sequences` or `test_records` on which the feature is silent."""
    tokens = TokenSequence(row["sequence_id"], tuple(row["tokens"]))
    silence = np.zeros(len(row["token_ids"]), dtype=np.float32)
    return ActivationRecord(tokens, row["document_id"], RULE_NEGATIVE, tuple(row["token_ids"]), silence)
