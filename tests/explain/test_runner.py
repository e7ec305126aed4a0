import numpy as np
import pytest

from rayinterp.config import CascadeConfig, LexicalConfig, OneShotConfig, TreeConfig
from rayinterp.explain.explainer import Outcome
from rayinterp.explain.runner import (
    Cascade,
    Evaluation,
    Evaluator,
    arm_ids,
    calls_per_feature,
    cascade_of,
    features_with_llm,
    search_feature,
    why_not,
)
from rayinterp.explanation import Rule
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence
from rayinterp.subject import FeatureId
from tests.conftest import planted_config

TREE = TreeConfig(llm="l", simulator="s", num_llm_roots=2, lexical_root=True, width=2, branching_factor=1, depth=2)


def record(number, activations, source="positive"):
    tokens = tuple(f" w{i}" for i in range(len(activations)))
    return ActivationRecord(TokenSequence(number, tokens), number, source, (0,) * len(tokens), np.array(activations))


@pytest.fixture
def records():
    return {
        "train": [record(0, [5.0, 0, 0]), record(1, [0, 0, 0.0])],
        "valid": [record(2, [0, 5.0, 0]), record(3, [0, 0, 0.0])],
    }


async def test_a_rule_is_simulated_once_per_feature(records):
    asked = []

    async def simulate(requests):
        asked.extend((request.rule, len(request.sequences)) for request in requests)
        return [[r.activations.astype(np.float32) for r in records["train"] + records["valid"]] for _ in requests]

    evaluate = Evaluator(records, simulate, num_worst=1)
    first = await evaluate((Rule("a", 5), Rule("b", 2)))
    await evaluate((Rule("b", 5), Rule("c", 1), Rule("c", 2)))
    assert asked == [("a", 4), ("b", 4), ("c", 4)]
    assert first.train_score == pytest.approx(1) and first.valid_score == pytest.approx(1)


async def test_train_and_valid_are_scored_apart(records):
    async def simulate(requests):
        return [[np.array([5.0, 0, 0], np.float32), np.zeros(3, np.float32)] * 2 for _ in requests]

    evaluation = await Evaluator(records, simulate, 1)((Rule("first word", 5),))
    assert evaluation.train_score == pytest.approx(1)
    assert evaluation.valid_score < 0
    assert "w1" not in evaluation.feedback.split("Text:")[0]


def proposer(names):
    """Answers with the names in turn; None is an answer that does not parse."""
    left = iter(names)

    async def propose(search, node):
        name = next(left)
        explanation = None if name is None else (Rule(name, 5),)
        return Outcome(explanation, "ok" if name else "parse_error", "raw", 10, 2, 0.1)

    return propose


async def test_a_search_runs_to_its_end_and_chooses_on_valid(records):
    quality = {"good": (0.5, 0.2), "better": (0.6, 0.9), "best": (0.7, 0.3), "late": (0.65, 0.4)}

    async def evaluate(explanation):
        return Evaluation(*quality.get(explanation[0].activates_on, (0.1, 0.1)), "feedback")

    search = await search_feature(TREE, records, evaluate, proposer(["good", None, "better", "good", "best", "late"]))
    assert [node.kind for node in search.nodes[:3]] == ["lexical", "llm", "llm"]
    assert [node.status for node in search.nodes] == ["ok", "ok", "parse_error", "ok", "duplicate", "ok", "ok"]
    assert search.winner().explanation == (Rule("better", 5),)
    assert search.nodes[3].cost_usd == 0.1


async def test_a_cheap_first_look_prunes_each_round_and_the_rest_goes_to_the_simulator(records):
    cheap = {"good": 0.1, "better": 0.8, "best": 0.9, "late": None}
    evaluated = []

    async def evaluate(explanation):
        evaluated.append(explanation[0].activates_on)
        return Evaluation(0.5 + 0.01 * len(evaluated), 0.5, "feedback")

    async def look(explanation):
        return cheap.get(explanation[0].activates_on, 0.5)

    names = ["good", "better", "best", "late", "x"]
    search = await search_feature(TREE, records, evaluate, proposer(names), Cascade(look, keep=1))
    assert evaluated == ["better", "best", "x"]  # of each round the best by the cheap look
    assert all(
        node.train_score is None and node.valid_score is None for node in search.nodes if node.status == "pruned"
    )
    assert all(
        node.cascade_score is not None for node in search.nodes if node.status == "pruned" and node.kind == "llm"
    )
    audited = await search_feature(TREE, records, evaluate, proposer([*names, "y", "z"]), Cascade(look, keep=99))
    assert not [node for node in audited.nodes if node.status == "pruned"]


def test_the_audited_features_are_a_seeded_share(records):
    config = CascadeConfig(simulator="s", keep=2, audit=0.3)
    features = [FeatureId("a", index) for index in range(400)]
    kept = [cascade_of(config, feature, records, None, seed=0).keep for feature in features]
    assert 80 < sum(keep > 2 for keep in kept) < 160
    assert kept == [cascade_of(config, feature, records, None, seed=0).keep for feature in features]
    nobody = config.model_copy(update={"audit": 0.0})
    assert {cascade_of(nobody, feature, records, None, seed=0).keep for feature in features} == {2}


async def test_without_an_llm_the_tree_keeps_its_lexical_root(records):
    async def evaluate(explanation):
        return Evaluation(0.1, 0.1, "feedback")

    search = await search_feature(TREE, records, evaluate, None)
    assert [node.kind for node in search.nodes] == ["lexical"]
    one_shot = await search_feature(OneShotConfig(llm="l", simulator="s"), records, evaluate, None)
    assert one_shot.nodes == [] and one_shot.winner() is None
    lexical = await search_feature(LexicalConfig(simulator="s"), records, evaluate, None)
    assert lexical.winner().kind == "lexical"


async def test_a_time_limit_keeps_what_there_is(records):
    async def evaluate(explanation):
        return Evaluation(0.1 * len(explanation[0].activates_on), 0.1, "feedback")

    hasty = TREE.model_copy(update={"time_limit_seconds": 1e-9})
    search = await search_feature(hasty, records, evaluate, proposer([]))
    assert {node.status for node in search.nodes} == {"stopped"}


def test_an_arm_is_not_run_where_it_cannot_succeed(records):
    assert why_not(records, over_budget=False) is None
    assert why_not(records, over_budget=True) == "no_budget"
    assert why_not({**records, "valid": []}, over_budget=False) == "no_records"
    assert why_not({**records, "valid": records["valid"][1:]}, over_budget=False) == "no_positives"


def test_an_explainer_is_named_by_its_simulator_and_llm_too(tmp_path):
    def name(*overrides):
        return arm_ids(planted_config(tmp_path, *overrides), "right")[0]

    late = "simulators.oracle={engine: late_interaction, embedder: embedded/minilm-l6}"
    assert name() != name(late)
    assert name() != name("llms.knows.model=other")
    assert name() == name("simulators.oracle.num_features=3", "llms.knows.max_calls=7")


def test_a_call_budget_reaches_the_first_features_only(tmp_path):
    features = [FeatureId("a", i) for i in range(10)]
    config = planted_config(tmp_path)
    assert features_with_llm(config, features) == set(features)
    # right and wrong: one call and a retry each; tree: two roots and 2 rounds of 3 kept nodes by 2.
    assert calls_per_feature(config) == (1 + 1 + 2 + 2 * 3 * 2) * 2
    limited = planted_config(tmp_path, "llms.knows.max_calls=100")
    assert features_with_llm(limited, features) == set(features[:3])
