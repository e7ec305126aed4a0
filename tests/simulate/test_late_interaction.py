"""Late interaction on hand-made sequences: words, offsets, and rules of other features."""

import numpy as np
import pytest
import torch

from rayinterp import embedded
from rayinterp.simulate import late_interaction
from rayinterp.simulate.late_interaction import (
    LateInteractionSimulator,
    background_texts,
    largest_of_each,
    overlapping,
    places_of,
    quoted_spans,
    word_vectors,
)
from rayinterp.simulate.simulator import RuleRequest, TokenSequence

CONCEPTS = {
    "the word 'ago', 'since'": (" It", " was", " four", " years", " ag", "o", ",", " in", " the", " spring", "\n\n"),
    "the words 'navy' or 'fleet'": (" Our", " navy", " has", " grown", " with", " each", " year", " of", " peace", "."),
    "words such as 'tax' or 'revenue'": (" The", " public", " debt", " and", " our", " reven", "ue", " rose", "."),
    "the word 'river'": (" They", " crossed", " a", " wide", " river", " before", " night", " came", "."),
}
ACTIVE = {"ag", "o", "navy", "reven", "ue", "river"}


@pytest.fixture(scope="module")
def simulator() -> LateInteractionSimulator:
    return LateInteractionSimulator(str(embedded.embedder_path()), device="cpu")


def truth(tokens: tuple[str, ...]) -> np.ndarray:
    return np.array([token.strip() in ACTIVE for token in tokens], dtype=float)


def test_quoted_words_beat_shuffled_rules(simulator):
    sequences = [TokenSequence(index, tokens) for index, tokens in enumerate(CONCEPTS.values())]
    rules = list(CONCEPTS)

    def mean_correlation(shift: int) -> float:
        requests = [RuleRequest(rules[(i + shift) % len(rules)], (s,)) for i, s in enumerate(sequences)]
        predictions = [answer[0] for answer in simulator.simulate(requests)]
        predicted = np.concatenate(predictions)
        # Rules of other sequences may be silent throughout.
        return float(np.corrcoef(predicted, active)[0, 1]) if predicted.any() else 0.0

    active = np.concatenate([truth(sequence.tokens) for sequence in sequences])
    assert mean_correlation(0) > 0.8
    assert max(mean_correlation(shift) for shift in (1, 2, 3)) < 0.3


def test_predictions_are_float32_in_range_and_zero_on_whitespace(simulator):
    tokens = (" \n", "", " ago", "\t", " ", "�", ".")
    ((prediction,),) = simulator.simulate([RuleRequest("the word 'ago'", (TokenSequence(0, tokens),))])
    assert prediction.dtype == np.float32
    assert prediction.shape == (len(tokens),)
    assert prediction.min() >= 0
    assert 2 < prediction[2] <= 5
    assert not prediction[[0, 1, 3, 4]].any()


def test_a_text_longer_than_the_encoder_reads(simulator):
    tokens = (" peace",) * 700 + (" navy",)
    ((prediction,),) = simulator.simulate([RuleRequest("the word 'navy'", (TokenSequence(0, tokens),))])
    assert prediction.shape == (701,)
    assert int(prediction.argmax()) == 700


def test_answers_follow_the_order_of_the_requests(simulator):
    first, second = (TokenSequence(index, tokens) for index, tokens in enumerate(list(CONCEPTS.values())[:2]))
    rules = list(CONCEPTS)[:2]
    together = simulator.simulate([RuleRequest(rules[0], (second, first)), RuleRequest(rules[1], (first,))])
    alone = simulator.simulate([RuleRequest(rules[0], (first,))])
    np.testing.assert_allclose(together[0][1], alone[0][0], atol=1e-3)
    assert [len(answer) for answer in together] == [2, 1]


def test_a_prediction_does_not_depend_on_what_else_is_asked(simulator):
    sequences = tuple(TokenSequence(index, tokens) for index, tokens in enumerate(CONCEPTS.values()))
    others = [RuleRequest(rule, sequences) for rule in [*CONCEPTS, "the", "many long sentences about nothing at all"]]
    wanted = RuleRequest("words for money that a state collects", sequences[:1])
    among = simulator.simulate([*others, RuleRequest(wanted.rule, sequences), *others])[len(others)]
    alone = LateInteractionSimulator(str(embedded.embedder_path()), device="cpu").simulate([wanted])[0]
    # Half-precision vectors, and padding that differs with the batch.
    np.testing.assert_allclose(among[0], alone[0], atol=1e-2)


def test_another_process_would_predict_the_same(simulator):
    again = LateInteractionSimulator(str(embedded.embedder_path()), device="cpu")
    request = RuleRequest("a word for water", tuple(TokenSequence(i, t) for i, t in enumerate(CONCEPTS.values())))
    for one, other in zip(*(s.simulate([request])[0] for s in (simulator, again)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2)


def test_what_a_rule_quotes():
    def quoted(rule: str) -> list[str]:
        return [rule[slice(*span)] for span in quoted_spans(rule)]

    assert quoted("the word 'ago', or \"since\" in dates") == ["ago", "since"]
    assert quoted("a token that ends in 'n't'") == ["n't"]
    assert quoted("the dog's bark isn't loud") == []


def test_a_word_that_the_background_is_full_of_needs_a_larger_cosine(simulator, monkeypatch):
    texts = [*background_texts(), *(f"Visitor {i} had seen no volcano before." for i in range(20))]
    monkeypatch.setattr(late_interaction, "background_texts", lambda: texts)
    there = LateInteractionSimulator(str(embedded.embedder_path()), device="cpu")

    def threshold(of: LateInteractionSimulator, word: str) -> float:
        return float(of._words_of(f"the word '{word}'").thresholds.max())

    assert threshold(there, "volcano") > threshold(simulator, "volcano") + 0.1
    assert threshold(there, "invoice") == pytest.approx(threshold(simulator, "invoice"), abs=0.05)


def test_a_cosine_below_the_threshold_is_silence(simulator):
    """Words of another subject are a little like any word, which must not add up over a corpus."""
    sequences = tuple(TokenSequence(index, tokens) for index, tokens in enumerate(CONCEPTS.values()))
    predictions = simulator.simulate([RuleRequest("the word 'harpsichord'", sequences)])[0]
    assert np.concatenate(predictions).max() < 0.5


def test_the_background_ships_with_the_package(simulator):
    texts = background_texts()
    assert len(set(texts)) == len(texts) > 80
    # Below 2,000 tokens the 99th percentile would hang on a score of them.
    assert 2000 < len(simulator._background) < 4000
    assert max(len(text.split()) for text in texts) < 0.02 * sum(len(text.split()) for text in texts)


def test_alignment_by_offsets():
    spans = np.array([[0, 2], [2, 5], [6, 9]])
    assert overlapping(spans, [(0, 5), (5, 6), (4, 7)]).tolist() == [[0, 2], [2, 2], [1, 3]]
    # "abcde fgh" as the subject's tokens "abc", "de", " ", "fgh"; the second and third share no encoder token.
    places, lengths = places_of(spans, ("abc", "de", " ", "fgh"))
    assert lengths.tolist() == [2, 1, 0, 1]
    assert places.tolist() == [0, 1, 1, 2]


def test_the_largest_of_each_stretch():
    values = torch.tensor([[1.0, -5.0], [3.0, -6.0], [2.0, -7.0]])
    found = largest_of_each(values, torch.tensor([2, 0, 1]), empty=-1.0)
    assert found.tolist() == [[3.0, -5.0], [-1.0, -1.0], [2.0, -7.0]]


def test_a_batch_predicts_what_one_pair_after_another_does(simulator):
    """Against the definition: the largest excess of a cosine over the word's 99th percentile on the background."""
    sequences = tuple(TokenSequence(index, tokens) for index, tokens in enumerate(CONCEPTS.values()))
    rules = [*list(CONCEPTS)[:2], "bodies of water", "taxes and the public purse"]
    requests = [RuleRequest(rule, sequences[: 2 + i // 2]) for i, rule in enumerate(rules)]
    encoded = simulator._encode([*rules, *("".join(s.tokens) for s in sequences)])
    for request, answer in zip(requests, simulator.simulate(requests), strict=True):
        words = word_vectors(encoded[request.rule], request.rule)
        thresholds = np.quantile(simulator._background @ words.T, 0.99, axis=0)
        for sequence, predicted in zip(request.sequences, answer, strict=True):
            text = encoded["".join(sequence.tokens)]
            cosines = text.vectors.astype(np.float32) @ words.T
            excess = ((cosines - thresholds) / (1 - thresholds)).max(1)
            start = 0
            for place, token in enumerate(sequence.tokens):
                stop = start + len(token)
                touching = [
                    e for e, (first, last) in zip(excess, text.spans, strict=True) if first < stop and last > start
                ]
                expected = 5 * np.clip(max(touching, default=0), 0, 1) if token.strip() else 0
                assert predicted[place] == pytest.approx(expected, abs=1e-4), (request.rule, token)
                start = stop
