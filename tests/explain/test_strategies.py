"""Strategies and the falsifier on planted features, in the language of `make bench NAME=strategies`."""

import numpy as np
import pytest

from rayinterp.explain.explainer import Outcome
from rayinterp.explain.planted_llm import covers, wrong_words
from rayinterp.explanation import Rule
from rayinterp.planted_language import COVERS, VOCABULARY, fires, terms_of
from tests.benchmarks import _planted_language as language
from tests.benchmarks.strategies import BEAM, COUNTS, FALSIFIED, METHODS, find, grade


@pytest.mark.parametrize("method", METHODS)
async def test_no_strategy_does_worse_on_valid_than_its_roots(method):
    for seed in range(2):
        planted = language.plant("context", seed, 0)
        found, one, search = await find(planted, planted.records(COUNTS), METHODS[method])
        winner = search.winner()
        roots = [node.valid_score for node in search.nodes if node.depth == 0 and node.valid_score is not None]
        finals = {node.node: node.final_score for node in search.nodes if node.final_score is not None}
        if "finalists" in method:
            assert winner.final_score == max(finals.values()) and len(finals) > 1
            assert max(search.nodes, key=lambda node: node.valid_score or -1).node in finals
        else:
            assert not finals and winner.valid_score >= max(roots)
        assert winner.explanation == found.explanation
        assert found.calls == sum(node.kind != "lexical" for node in search.nodes)
        assert bool(one.evaluator.falsifiers) == ("falsifier" in method)
        train = planted.pools["train"]
        places = [record.sequence.sequence_id - train.first_id for record in one.evaluator.falsifiers]
        assert len(set(places)) == len(places) and set(places) <= set(train.silent().tolist())


def unopposed(planted, broad):
    """Records of train that hold words of the broad rule only where the feature fires; valid has a few others."""
    pool = planted.pools["train"]
    claimed = fires(broad, pool.words)
    clean = np.flatnonzero((claimed <= (pool.activations > 0)).all(1))
    positives = [pool.record(i, "positive") for i in clean if pool.activations[i].any()]
    negatives = [pool.record(i, "random_negative") for i in clean if not pool.activations[i].any()]
    valid = [*planted.records(COUNTS)["valid"], *planted.pools["valid"].rule_negatives((Rule(broad),), 5)]
    return {"train": [*positives[:10], *negatives[:10]], "valid": valid}


async def test_a_rule_that_is_too_broad_wins_unless_it_is_falsified():
    planted = language.plant("word", 0, 0)
    (truth,) = planted.truth
    word = VOCABULARY[int(np.argmax(COVERS[truth.activates_on]))]
    broad = terms_of(word)[2]

    async def propose(search, node):
        """The whole class, until the feedback names a word of it that is wrong."""
        rules = (Rule(broad, 1 + node.node % 5),)
        if node.parent is not None:
            rules = search.nodes[node.parent].explanation
            over, _ = wrong_words(search.nodes[node.parent].feedback)
            if any(covers(rules[0], wrong) for wrong in over if wrong != word):
                rules = (Rule(truth.activates_on, rules[0].strength),)
        return Outcome(rules, "ok", None, 0, 0, None)

    records = unopposed(planted, broad)
    alone, _, _ = await find(planted, records, BEAM, propose)
    attacked, _, _ = await find(planted, records, BEAM.model_copy(update=FALSIFIED), propose)
    assert {rule.activates_on for rule in alone.explanation} == {broad}
    assert {rule.activates_on for rule in attacked.explanation} == {truth.activates_on}
    grades = await grade(planted, planted.records(COUNTS)["test"], [alone.explanation, attacked.explanation])
    before, after = grades[alone.explanation], grades[attacked.explanation]
    assert after.by_source["rule_negative"] > before.by_source["rule_negative"] + 0.1
    assert after.false_positives < before.false_positives / 2
    assert after.recovered and not before.recovered
