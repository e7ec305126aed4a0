"""The planted language: what its rules mean, and that its features are found in its texts."""

import numpy as np
import pytest

from rayinterp.explanation import Rule
from rayinterp.planted import WORLDS, OracleSimulator, PlantedTokenizer
from rayinterp.planted_language import (
    COVERS,
    FEATURES,
    KINDS,
    LENGTH,
    PER_DOCUMENT,
    VOCABULARY,
    broadened,
    documents,
    encode,
    fires,
    recovers,
    strength,
    wider,
)
from rayinterp.planted_subject import PlantedSubject
from rayinterp.simulate.simulator import RuleRequest, TokenSequence


def on(rule, text):
    return fires(rule, encode([tuple(text.split())]))[0].astype(int).tolist()


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("the word 'toolora'", "the toolora toololin a", [0, 1, 0, 0]),
        ("words for old tools", "toolora toolnra lampora", [1, 0, 0]),
        ("words for tools", "toolora toolnra lampora", [1, 1, 0]),
        ("words for tools soon after words for lamps", "toolora lampora the a of toolora", [0, 0, 0, 0, 0, 1]),
        ("words for tools soon after words for lamps", "lampora the a of in toolora", [0, 0, 0, 0, 0, 0]),
        ("words for tools, or the word 'lampora'", "toolora lampora lampolin", [1, 1, 0]),
        ("the words 'toolora', 'lampora'", "toolora lampora toololin", [1, 1, 0]),
        ("the word 'toolora' soon after 'lampora', 'lampolin'", "toolora lampolin a toolora", [0, 0, 0, 1]),
        ("words for anything else", "toolora the", [0, 0]),
        ("words for tools soon after nonsense", "toolora the", [0, 0]),
    ],
)
def test_what_rules_mean(rule, text, expected):
    assert on(rule, text) == expected


def test_wider_terms_cover_what_they_widen():
    for term, covered in COVERS.items():
        assert (covered <= COVERS[wider(term)]).all()
        assert wider(wider(wider(term))) == wider(wider(term))


def test_features_are_planted_where_their_layer_says():
    assert list(FEATURES) == [f"layer_{i}" for i in range(len(KINDS))]
    truths = [truth for of_layer in FEATURES.values() for truth in of_layer]
    assert len(set(truths)) == len(truths)
    assert all(rule.activates_on.startswith("the word") for (rule,) in FEATURES["layer_0"])
    assert all("soon after" in rule.activates_on for (rule,) in FEATURES["layer_2"])
    assert all(len(truth) == 2 for truth in FEATURES["layer_3"])


def test_every_feature_fires_in_the_texts_and_a_broad_claim_is_wrong_there():
    tokenizer = PlantedTokenizer(VOCABULARY)
    texts = [document["text"] for document in documents(0, 1500)]
    assert texts == [document["text"] for document in documents(0, 1500)] and texts[0] != next(documents(1))["text"]
    words = np.array([tokenizer.encode(text) for text in texts]).reshape(-1, LENGTH)
    assert len(words) == 1500 * PER_DOCUMENT
    for of_layer in FEATURES.values():
        for truth in of_layer:
            active = (strength(truth, words) > 0).any(1)
            assert 40 < active.sum() < 0.4 * len(words)
            assert recovers(truth, truth, words)
            wide = broadened(truth)
            if wide != truth:
                assert not recovers(wide, truth, words)
                assert ((strength(wide, words) > 0) >= (strength(truth, words) > 0)).all()


def test_the_subject_fires_where_the_oracle_predicts():
    world = WORLDS["planted/language"]
    subject = PlantedSubject(world, {"layer_2": [0], "layer_3": [1]})
    words = np.array([PlantedTokenizer(VOCABULARY).encode(d["text"]) for d in documents(0, 300)]).reshape(-1, LENGTH)
    import torch

    activations = subject.activations(torch.from_numpy(words))
    for sae, index in (("layer_2", 0), ("layer_3", 1)):
        truth = FEATURES[sae][index]
        sequences = tuple(TokenSequence(i, tuple(f" {VOCABULARY[w]}" for w in row)) for i, row in enumerate(words))
        requests = [RuleRequest(rule.activates_on, sequences) for rule in truth]
        predicted = np.max(
            [
                rule.strength / 5 * np.array(of)
                for rule, of in zip(truth, OracleSimulator().simulate(requests), strict=True)
            ],
            axis=0,
        )
        true = activations[sae][..., 0].numpy()
        assert ((predicted > 0) == (true > 0)).all() and true.any()
        assert np.corrcoef(predicted.ravel(), true.ravel())[0, 1] > 0.95
    assert OracleSimulator().simulate([RuleRequest("unheard of", sequences[:1])])[0][0].sum() == 0


def test_holistic_activations_name_the_context():
    import torch

    subject = PlantedSubject(WORLDS["planted/language"], {"layer_2": [0]})
    (rule,) = FEATURES["layer_2"][0]
    target, context = rule.activates_on.split(" soon after ")
    row = [0] * LENGTH
    row[3], row[5] = int(np.argmax(COVERS[context])), int(np.argmax(COVERS[target]))
    fall = subject.holistic(torch.tensor([row]))["layer_2"][0, :, 0].numpy()
    assert fall[3] > 0 and fall[5] > 0 and set(np.argsort(-fall)[:2]) == {3, 5}
    assert Rule(rule.activates_on) == rule
