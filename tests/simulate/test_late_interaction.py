"""Late interaction on hand-made sequences: words, offsets, and rules of other features."""

import numpy as np
import pytest
import torch

from rayinterp import embedded
from rayinterp.simulate.late_interaction import (
    LateInteractionSimulator,
    content_spans,
    content_vectors,
    largest_of_each,
    overlapping,
    places_of,
)
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, RuleRequest, TokenSequence

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
        pooled = np.concatenate(predictions), np.concatenate([truth(s.tokens) for s in sequences])
        return float(np.corrcoef(*pooled)[0, 1])

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


def test_content_of_a_rule():
    def words(rule: str) -> list[str]:
        return [rule[slice(*span)] for span in content_spans(rule)]

    assert words("the word 'ago', or \"since\" in dates") == ["ago", "since"]
    assert words("the words for rebellion or uprising") == ["rebellion", "uprising"]
    assert words("a token that ends in 'n't'") == ["n't"]
    assert words("the dog's bark isn't loud") == ["dog's", "bark", "isn't", "loud"]
    assert words("the word") == ["the word"]


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
    """Against the definition: the largest cosine with a word of the rule, less the mean over the null texts."""
    sequences = tuple(TokenSequence(index, tokens) for index, tokens in enumerate(CONCEPTS.values()))
    requests = [RuleRequest(rule, sequences[: 2 + i]) for i, rule in enumerate(CONCEPTS)]
    encoded = simulator._encode(
        [*(r.rule for r in requests), *NULL_EXPLANATIONS, *("".join(s.tokens) for s in sequences)]
    )
    for request, answer in zip(requests, simulator.simulate(requests), strict=True):
        words = content_vectors(encoded[request.rule], request.rule)
        for sequence, predicted in zip(request.sequences, answer, strict=True):
            text = encoded["".join(sequence.tokens)]
            vectors = text.vectors.astype(np.float32)
            nulls = [(vectors @ content_vectors(encoded[n], n).T).max(1) for n in NULL_EXPLANATIONS]
            null = np.mean(nulls, axis=0)
            excess = ((vectors @ words.T).max(1) - null) / (1 - null)
            start = 0
            for place, token in enumerate(sequence.tokens):
                stop = start + len(token)
                touching = [
                    e for e, (first, last) in zip(excess, text.spans, strict=True) if first < stop and last > start
                ]
                expected = 5 * np.clip(max(touching, default=0), 0, 1) if token.strip() else 0
                assert predicted[place] == pytest.approx(expected, abs=1e-4), (request.rule, token)
                start = stop
