"""Texts in, silent sequences out: on the planted run, against a scan written plainly."""

import asyncio

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from rayinterp import embedded
from rayinterp.errors import UserError
from rayinterp.feature_id import FeatureId
from rayinterp.index import check_dimension, to_matrix
from rayinterp.planted import FEATURES, VOCABULARY, fires
from rayinterp.retrieve import RULE_NEGATIVE, Retriever, SharedRetriever, SilentRequest


@pytest.fixture(scope="module")
def retriever(planted_run):
    return Retriever(planted_run.config, planted_run.tables)


@pytest.fixture(scope="module")
def scan(planted_run):
    """By sequence: split, vector, and where each feature is active; and the encoder."""
    tables = planted_run.tables
    sequences = tables.read("sequences").sort_by("sequence_id").to_pylist()
    vectors = to_matrix(tables.read("embeddings").sort_by("sequence_id")).astype(np.float64)
    return sequences, vectors, SentenceTransformer(str(embedded.embedder_path(embedded.EMBEDDER)))


def is_silent(feature, sequence):
    return not any(fires(FEATURES[feature].truth, [VOCABULARY[i] for i in sequence["token_ids"]]))


def slowly(scan, feature, texts, split, count):
    sequences, vectors, encoder = scan
    queries = encoder.encode(list(texts), normalize_embeddings=True).astype(np.float64)
    best = []
    for sequence, vector in zip(sequences, vectors, strict=True):
        if sequence["split"] == split and is_silent(feature, sequence):
            best.append((-max(float(vector @ query) for query in queries), sequence["sequence_id"]))
    return [(sequence_id, -value) for value, sequence_id in sorted(best)[:count]]


def test_the_nearest_silent_sequences_of_the_split_are_found_for_several_features_at_once(retriever, scan):
    requests = [
        SilentRequest(FeatureId("planted", 0), ("rivers and streams", "bad weather"), "train", 7),
        SilentRequest(FeatureId("planted", 2), ("citrus fruits",), "valid", 12),
        SilentRequest(FeatureId("planted", 3), ("a harbor",), "train", 3),
    ]
    for request, found in zip(requests, retriever.silent(requests), strict=True):
        expected = slowly(scan, request.feature.index, request.texts, request.split, request.count)
        assert [f.sequence_id for f in found] == [sequence_id for sequence_id, _ in expected]
        assert [f.similarity for f in found] == pytest.approx([value for _, value in expected], abs=1e-5)
        assert all(0 <= f.text < len(request.texts) for f in found)


def test_a_word_of_the_rule_itself_is_never_answered_with_an_active_sequence(retriever, scan):
    """Sequences about citrus are the nearest to the words, and the feature is active on them."""
    by_id = {sequence["sequence_id"]: sequence for sequence in scan[0]}
    (found,) = retriever.silent([SilentRequest(FeatureId("planted", 2), ("lemon lime orange",), "train", 30)])
    assert len(found) == 30
    assert all(is_silent(2, by_id[f.sequence_id]) for f in found)


def test_a_request_without_texts_finds_nothing(retriever):
    assert retriever.silent([]) == []
    assert retriever.silent([SilentRequest(FeatureId("planted", 0), (), "train", 5)]) == [[]]


async def test_searches_that_ask_while_a_pass_runs_share_the_next_one(planted_run, retriever, monkeypatch):
    shared, passes = SharedRetriever(planted_run.config, planted_run.tables), []
    real = Retriever.silent
    monkeypatch.setattr(
        Retriever, "silent", lambda self, requests: passes.append(len(requests)) or real(self, requests)
    )
    requests = [SilentRequest(FeatureId("planted", 0), (text,), "train", 4) for text in VOCABULARY[:6]]
    answers = await asyncio.gather(*(shared.silent([request]) for request in requests), shared.silent([]))
    assert passes[0] + sum(passes[1:]) == 6 and len(passes) <= 2
    for request, (records,), found in zip(requests, answers[:-1], real(retriever, requests), strict=True):
        assert [record.sequence.sequence_id for record in records] == [hit.sequence_id for hit in found]
        assert all(record.source == RULE_NEGATIVE and not record.activations.any() for record in records), request
        assert all(len(record.sequence.tokens) == len(record.activations) for record in records)
    assert answers[-1] == []


async def test_a_failed_pass_fails_those_who_waited_for_it_and_not_the_next(planted_run, monkeypatch):
    shared = SharedRetriever(planted_run.config, planted_run.tables)
    monkeypatch.setattr(shared, "_find", lambda requests: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await shared.silent([])
    monkeypatch.setattr(shared, "_find", lambda requests: [[] for _ in requests])
    assert await shared.silent([SilentRequest(FeatureId("planted", 0), (), "train", 5)]) == [[]]


def test_an_encoder_of_another_length_is_refused(planted_run):
    check_dimension("a", 384, planted_run.tables)
    with pytest.raises(UserError, match=r"index\.embedder 'a'.* 768 .* 384"):
        check_dimension("a", 768, planted_run.tables)
