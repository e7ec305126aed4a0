import numpy as np
import pytest

from rayinterp.explain.lexical import lexical_explanation, word_spans
from rayinterp.explanation import Rule
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence


def record(*pairs):
    tokens, activations = zip(*pairs, strict=True)
    return ActivationRecord(TokenSequence(0, tokens), 0, "positive", tuple(range(len(tokens))), np.array(activations))


def test_words_are_put_together_from_their_tokens():
    spans = word_spans([" re", "bell", "ion", ",", " Don", "'t", "\n", " x", "_", "y"])
    assert spans == [
        ("rebellion", [0, 1, 2]), (",", [3]), ("don't", [4, 5]), ("x", [7]), ("_", [8]), ("y", [9])
    ]  # fmt: skip


def test_words_that_fire_become_rules_by_strength():
    records = [
        record((" three", 0.0), (" years", 0.0), (" ago", 5.0), (" the", 0.0)),
        record((" weeks", 2.0), (" Ago", 4.8), (" the", 0.0), (" end", 0.0)),
        record((" weeks", 2.2), (" the", 0.6), (" years", 0.0), (" end", 0.0)),
        record((" the", 0.0), (" the", 0.0), (" ago", 5.0), (" years", 0.0)),
    ]
    assert lexical_explanation(records, 5) == (Rule("the word 'ago'", 5), Rule("the word 'weeks'", 2))
    assert lexical_explanation(records, 1) == (Rule("the word 'ago'", 5),)


def test_where_no_word_is_reliable_the_heaviest_is_taken():
    records = [record((" a", 1.0), (" a", 0.0), (" a", 0.0), (" b", 0.0))]
    assert lexical_explanation(records, 5) == (Rule("the word 'a'", 1),)


def sentence(words, bank):
    return record(*((f" {word}", bank if word == "bank" else 0.0) for word in words.split()))


def test_a_word_that_fires_only_after_others_is_explained_by_them():
    fires = [sentence("the river has a bank", 5.0)] * 4 + [sentence("a stream and its bank", 5.0)] * 3
    silent = [sentence("the clerk has a bank near the river", 0.0), sentence("a house and its bank", 0.0)] * 5
    assert lexical_explanation([*fires, *silent], 5) == (Rule("the word 'bank' soon after 'river', 'stream'", 5),)


def test_a_context_that_is_seen_twice_is_luck():
    fires = [record((" my", 0.0), (" bank", 5.0)), record((" my", 0.0), (" bank", 5.0))]
    silent = [record((" a", 0.0), (" bank", 0.0)) for _ in range(9)]
    assert lexical_explanation([*fires, *silent], 5) == (Rule("the word 'bank'", 1),)


def test_silence_has_no_explanation():
    assert lexical_explanation([record((" a", 0.0))], 5) is None


@pytest.mark.parametrize("feature", [0, 2])
def test_planted_word_lists_are_found(planted_run, feature):
    from rayinterp.feature_id import FeatureId
    from rayinterp.planted import GROUPS
    from rayinterp.records import load_records

    records = load_records(planted_run.tables, FeatureId("planted", feature), ("train",))["train"]
    words = {0: GROUPS["sea"], 2: GROUPS["strings"] + GROUPS["citrus"]}[feature]
    said = " ".join(rule.activates_on for rule in lexical_explanation(records, 5))
    quoted = set(said.split("'")[1::2])
    assert quoted <= set(words)
    assert len(quoted) >= len(words) - 2


def test_a_planted_context_is_found(planted_run):
    from rayinterp.feature_id import FeatureId
    from rayinterp.planted import GROUPS
    from rayinterp.records import load_records

    records = load_records(planted_run.tables, FeatureId("planted", 1), ("train",))["train"]
    said = lexical_explanation(records, 5)[0].activates_on
    assert said.startswith("the word 'bank'")
    assert not said.count("after") or set(said.split("'")[3::2]) & set(GROUPS["river"])
