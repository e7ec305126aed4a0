import asyncio

import pytest

from rayinterp.config import CascadeConfig, FalsifierConfig, HalvingConfig, LexicalConfig, OneShotConfig, TreeConfig
from rayinterp.explain.evaluator import Evaluation
from rayinterp.explain.explainer import Outcome
from rayinterp.explain.feature import Search, prepare_search, search_feature, settings_of
from rayinterp.explain.rows import explanation_row
from rayinterp.explanation import Rule
from rayinterp.feature_id import FeatureId
from tests.explain.records import few_records, record

FEATURE = FeatureId("a", 0)
TREE = TreeConfig(llm="l", simulator="s", num_llm_roots=2, lexical_root=True, width=2, branching_factor=1, depth=2)


class FakeEvaluator:
    """Scores by the first rule's words; what is falsified loses half."""

    def __init__(self, scores, looks=None):
        self._scores, self._looks = scores, looks or {}
        self.scored, self.looked, self.falsifiers = [], [], []
        self.train, self.valid = [], few_records()["valid"]

    async def scores(self, explanations):
        names = [explanation[0].activates_on for explanation in explanations]
        self.scored += names
        factor = 0.5 if self.falsifiers else 1
        return [Evaluation(*(factor * s for s in self._scores.get(name, (0.1, 0.1))), "feedback") for name in names]

    async def looks(self, explanations, look):
        names = [explanation[0].activates_on for explanation in explanations]
        self.looked += [(look, name) for name in names]
        return [self._looks.get(name, 0.5) for name in names]

    async def mistaken(self, explanations, silent):
        return [float(r.sequence.sequence_id % 10) for r in silent]

    def grow(self, silent):
        self.falsifiers += silent
        self.train += silent


def proposer(names):
    """Answers with the names in turn; None is an answer that does not parse."""
    left = iter(names)

    async def propose(search, node):
        name = next(left)
        explanation = None if name is None else (Rule(name, 5),)
        return Outcome(explanation, "ok" if name else "parse_error", "raw", 10, 2, 0.1)

    return propose


def one(arm, evaluator, propose, silent=None, audited=False):
    return Search(arm, settings_of(arm, audited), few_records(), evaluator, propose, silent)


async def test_a_search_runs_to_its_end_and_chooses_on_valid():
    evaluator = FakeEvaluator({"good": (0.5, 0.2), "better": (0.6, 0.9), "best": (0.7, 0.3), "late": (0.65, 0.4)})
    names = ["good", None, "better", "good", "best", "late"]
    search = await search_feature(one(TREE, evaluator, proposer(names)))
    assert [node.kind for node in search.nodes[:3]] == ["lexical", "llm", "llm"]
    assert [node.status for node in search.nodes] == ["ok", "ok", "parse_error", "ok", "duplicate", "ok", "ok"]
    assert search.winner().explanation == (Rule("better", 5),)
    assert search.nodes[3].cost_usd == 0.1 and search.nodes[2].thought == "raw"
    assert evaluator.scored.count("good") == 1


async def test_a_rounds_proposals_are_asked_for_at_once_and_told_in_their_order():
    arrived, go = [], asyncio.Event()

    async def propose(search, node):
        arrived.append(node.node)
        if len(arrived) == 2:
            go.set()
        await go.wait()
        await asyncio.sleep(0.02 * (2 - node.node))  # the first is answered last
        return Outcome((Rule("same", 5),), "ok", None, 1, 1, 0.0)

    search = await search_feature(one(TREE.model_copy(update={"depth": 0}), FakeEvaluator({}), propose))
    assert [node.status for node in search.nodes] == ["ok", "ok", "duplicate"]


async def test_a_cheap_first_look_prunes_each_round_and_the_rest_goes_to_the_simulator():
    scores = {"better": (0.5, 0.5), "best": (0.6, 0.5), "x": (0.7, 0.5)}
    looks = {"good": 0.1, "better": 0.8, "best": 0.9, "late": None}
    arm = TREE.model_copy(update={"cascade": CascadeConfig(simulator="cheap", keep=1)})
    evaluator = FakeEvaluator(scores, looks)
    search = await search_feature(one(arm, evaluator, proposer(["good", "better", "best", "late", "x"])))
    assert evaluator.scored == ["better", "best", "x"]  # of each round the best by the cheap look
    pruned = [node for node in search.nodes if node.status == "pruned"]
    assert pruned and all(node.train_score is None and node.valid_score is None and node.looks for node in pruned)
    names = ["good", "better", "best", "late", "x", "y", "z"]
    audited = await search_feature(one(arm, FakeEvaluator(scores, looks), proposer(names), audited=True))
    assert not [node for node in audited.nodes if node.status == "pruned"]
    assert audited.nodes[1].looks == [0.1]


async def test_successive_halving_looks_at_few_records_first():
    halving = HalvingConfig(num_looks=2, eta=2, num_records=2)
    arm = TREE.model_copy(update={"strategy": "successive_halving", "halving": halving, "num_llm_roots": 3, "depth": 0})
    evaluator = FakeEvaluator({}, {"a": 0.9, "b": 0.8, "c": 0.1})
    await search_feature(one(arm, evaluator, proposer("abc")))
    lexical = evaluator.looked[0][1]
    assert evaluator.looked == [(0, lexical), (0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b")]
    assert evaluator.scored == ["a"]


def test_the_audited_features_and_the_looks_records_are_chance_of_seed_and_feature():
    config = CascadeConfig(simulator="s", keep=2, audit=0.3)
    features = [FeatureId("a", index) for index in range(400)]

    def keeps(audit):
        arm = TREE.model_copy(update={"cascade": config.model_copy(update={"audit": audit})})
        prepared = [prepare_search(arm, f, few_records(), {"s": None}, proposer([]), None, 0) for f in features]
        return [one.settings.keep for one in prepared]

    kept = keeps(0.3)
    assert 80 < sum(keep > 2 for keep in kept) < 160
    assert kept == keeps(0.3)
    assert set(keeps(0.0)) == {2}


async def test_the_falsifier_adds_what_is_most_wrong_and_all_that_is_kept_is_scored_again():
    asked = []

    async def silent(explanations, split, count):
        asked.append(([e[0].activates_on for e in explanations], split, count))
        return [record(number, [0, 0, 0.0], "rule_negative") for number in (20, 13, 17, 15)]

    arm = TREE.model_copy(update={"falsifier": FalsifierConfig(num_drawn=4, num_added=2, num_finalists=0), "depth": 1})
    evaluator = FakeEvaluator({"broad": (0.9, 0.9), "narrow": (0.5, 0.5), "new": (0.3, 0.3), "newer": (0.2, 0.2)})
    search = await search_feature(one(arm, evaluator, proposer(["broad", "narrow", "new", "newer"]), silent))
    assert asked == [(["broad", "narrow"], "train", 4)]
    assert [r.sequence.sequence_id for r in evaluator.falsifiers] == [17, 15]  # 20 is predicted rightly
    assert search.nodes[1].train_score == 0.45 and search.nodes[1].valid_score == 0.9
    assert [node.parent for node in search.nodes[3:]] == [1, 2]


async def test_the_finalists_are_judged_on_valid_records_that_sound_like_any_of_them():
    class Judge(FakeEvaluator):
        async def final_scores(self, explanations, silent):
            assert [r.sequence.sequence_id for r in silent] == [30, 31]  # 3 is in valid already
            return [{"broad": 0.3, "narrow": 0.6}[explanation[0].activates_on] for explanation in explanations]

    asked = []

    async def silent(explanations, split, count):
        asked.append(([e[0].activates_on for e in explanations], split, count))
        return [record(number, [0, 0, 0.0], "rule_negative") for number in (30, 3, 31)]

    falsifier = FalsifierConfig(num_finalists=2, num_valid=7)
    arm = TREE.model_copy(update={"falsifier": falsifier, "depth": 0})
    scores = {"broad": (0.7, 0.9), "narrow": (0.6, 0.8)}
    search = await search_feature(one(arm, Judge(scores), proposer(["broad", "narrow"]), silent))
    assert asked == [(["broad", "narrow"], "valid", 7)]
    assert search.winner().explanation == (Rule("narrow", 5),) and search.winner().final_score == 0.6
    assert search.nodes[1].valid_score == 0.9


async def test_one_shot_and_lexical_are_searches_of_one_root():
    one_shot = await search_feature(one(OneShotConfig(llm="l", simulator="s"), FakeEvaluator({}), proposer(["a"])))
    assert [node.kind for node in one_shot.nodes] == ["llm"]
    lexical = await search_feature(one(LexicalConfig(simulator="s"), FakeEvaluator({}), None))
    assert lexical.winner().kind == "lexical"


async def test_a_time_limit_or_a_stop_keeps_what_there_is():
    hasty = TREE.model_copy(update={"time_limit_seconds": 1e-9})
    search = await search_feature(one(hasty, FakeEvaluator({}), proposer([])))
    assert {node.status for node in search.nodes} == {"stopped"} and search.cut_by == "time_limit"
    assert explanation_row(FEATURE, ("e", "s"), search)["status"] == "time_limit"
    scored = []

    async def on_scored(search):
        scored.extend(node.node for node in search.nodes if node.train_score is not None)

    evaluator = FakeEvaluator({"good": (0.5, 0.2)})
    search = await search_feature(one(TREE, evaluator, proposer(["good", "x"])), lambda: bool(scored), on_scored)
    assert scored == [0, 1, 2] and search.winner().explanation == (Rule("good", 5),)
    assert {node.status for node in search.nodes[3:]} == {"stopped"}
    assert explanation_row(FEATURE, ("e", "s"), search)["status"] == "budget"
    search.cut_by = None
    assert explanation_row(FEATURE, ("e", "s"), search)["status"] == "ok"


async def test_what_others_of_a_round_are_told_is_waited_for_when_one_fails():
    answered = []

    async def propose(search, node):
        if node.node == 1:
            raise RuntimeError("down")
        await asyncio.sleep(0.05)
        answered.append(node.node)
        return Outcome((Rule("late", 5),), "ok", None, 1, 1, 0.0)

    with pytest.raises(RuntimeError, match="down"):
        await search_feature(one(TREE, FakeEvaluator({}), propose))
    assert answered == [2]


@pytest.mark.parametrize("error", [RuntimeError("no replica"), KeyError("bug")])
async def test_an_error_of_a_proposal_ends_the_search(error):
    async def propose(search, node):
        raise error

    with pytest.raises(type(error)):
        await search_feature(one(TREE, FakeEvaluator({}), propose))
