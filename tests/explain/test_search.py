import json
import random

import pytest

from rayinterp.explain.search import SearchSettings, Step, TreeSearch
from rayinterp.explanation import Rule

SETTINGS = SearchSettings(num_llm_roots=2, lexical_root=True, branching_factor=2, width=2, depth=3, stop_score=0.9)


def explanation(name):
    return (Rule(str(name), 5),)


def propose_all(search, names=None):
    """Answers the proposals that wait; returns their nodes."""
    nodes = [step.node for step in search.ask()]
    assert {step.action for step in search.ask()} == {"propose"}
    for place, node in enumerate(nodes):
        search.explained(node, explanation(names[place] if names else node))
    return nodes


def score_all(search, *scores, valid=None):
    """Scores a round of new candidates."""
    propose_all(search)
    steps = search.ask()
    assert [step.action for step in steps] == ["score"] * len(scores)
    for place, (step, train) in enumerate(zip(steps, scores, strict=True)):
        search.scored(step.node, train, valid[place] if valid else train, "worse")
    return [step.node for step in steps]


def actions(search):
    return [(step.action, step.node) for step in search.ask()]


def parents(search):
    return [search.nodes[step.node].parent for step in search.ask()]


def test_roots_first_then_revisions_of_the_best():
    search = TreeSearch(SETTINGS)
    assert search.ask() == search.ask() == [Step("propose", 0), Step("propose", 1), Step("propose", 2)]
    assert [node.kind for node in search.nodes] == ["lexical", "llm", "llm"]
    score_all(search, 0.1, 0.3, 0.2)
    assert {step.action for step in search.ask()} == {"propose"}
    assert parents(search) == [1, 1, 2, 2]
    assert {search.nodes[step.node].depth for step in search.ask()} == {1}


def test_parents_stay_in_the_beam():
    search = TreeSearch(SETTINGS)
    score_all(search, 0.1, 0.5, 0.4)
    score_all(search, 0.2, 0.45, 0.3, 0.1)
    assert parents(search) == [1, 1, 4, 4]


def test_a_round_that_brings_nothing_ends_the_search():
    search = TreeSearch(SETTINGS)
    score_all(search, 0.1, 0.5, 0.4)
    score_all(search, 0.2, 0.2, 0.2, 0.2)
    assert search.ask() == []
    assert search.finished


def test_a_good_train_score_ends_the_search():
    search = TreeSearch(SETTINGS)
    score_all(search, 0.1, 0.95, 0.4)
    assert search.ask() == []


def test_depth_ends_the_search():
    search = TreeSearch(SETTINGS._replace(depth=1))
    score_all(search, 0.0, 0.1, 0.2)
    score_all(search, 0.5, 0.51, 0.52, 0.53)
    assert search.ask() == []
    assert len(search.nodes) == 7


def test_best_first_revises_the_best_node_that_has_no_revisions_however_old():
    search = TreeSearch(SETTINGS._replace(strategy="best_first", depth=2, width=2))
    score_all(search, 0.1, 0.5, 0.4)
    assert parents(search) == [1, 1]
    score_all(search, 0.2, 0.3)
    assert parents(search) == [2, 2]  # a root again: what came of the best was worse
    score_all(search, 0.6, 0.1)
    assert parents(search) == [5, 5]
    score_all(search, 0.7, 0.8)
    assert parents(search) == [8, 8]
    score_all(search, 0.7, 0.7)
    assert search.ask() == []  # depth x width revised nodes, as many as the beam's


def test_both_strategies_may_ask_for_as_many_revisions():
    rising = iter(range(1, 1000))
    counts = []
    for strategy in ("beam", "best_first"):
        search = TreeSearch(SETTINGS._replace(strategy=strategy, stop_score=1.0))
        while search.ask():
            propose_all(search, [next(rising) for _ in search.ask()])
            for step in search.ask():
                search.scored(step.node, next(rising) / 1000, 0.1, "worse")
        counts.append(sum(node.kind == "revision" for node in search.nodes))
    assert counts == [12, 12]


def test_looks_thin_a_round_out_before_it_is_scored():
    search = TreeSearch(SETTINGS._replace(num_llm_roots=7, num_looks=2, eta=2))
    propose_all(search)
    assert search.ask() == [Step("look", node, 0) for node in range(8)]
    for node in range(8):
        search.looked(node, None if node == 7 else node / 10)
    assert search.ask() == [Step("look", node, 1) for node in (3, 4, 5, 6)]
    for node, score in ((3, 0.9), (4, 0.1), (5, 0.2), (6, 0.3)):
        search.looked(node, score)
    assert actions(search) == [("score", 3), ("score", 6)]
    assert [node.status for node in search.nodes].count("pruned") == 6
    assert search.nodes[3].looks == [0.3, 0.9]
    for node in (3, 6):
        search.scored(node, 0.5, 0.5, "worse")
    assert parents(search) == [3, 3, 6, 6]


def test_a_fixed_number_goes_on_from_a_look():
    search = TreeSearch(SETTINGS._replace(num_looks=1, keep=1))
    propose_all(search)
    for node, score in enumerate((0.3, 0.2, 0.3)):
        search.looked(node, score)
    assert actions(search) == [("score", 0)]  # the earlier one of equals


def test_what_is_kept_is_rescored_before_it_is_revised():
    search = TreeSearch(SETTINGS._replace(falsify=True))
    score_all(search, 0.1, 0.5, 0.4)
    assert actions(search) == [("rescore", 1), ("rescore", 2)]
    assert [node.node for node in search.kept()] == [1, 2]
    search.rescored(1, 0.2, "falsified")
    assert actions(search) == [("rescore", 2)]
    search.rescored(2, 0.35, "well")
    assert parents(search) == [2, 2, 1, 1]
    assert search.nodes[1].feedback == "falsified"
    score_all(search, 0.3, 0.1, 0.1, 0.1)
    assert [step.node for step in search.ask()] == [2, 3]  # 0.35 and 0.3: compared on the same set
    for node, score in ((2, 0.3), (3, None)):
        search.rescored(node, score, "worse")
    assert parents(search) == [2, 2]  # a score that became undefined takes no further part


def test_nothing_is_falsified_after_the_last_round():
    search = TreeSearch(SETTINGS._replace(falsify=True, depth=0))
    score_all(search, 0.1, 0.5, 0.4)
    assert search.ask() == []


def test_a_falsified_score_does_not_end_the_search():
    search = TreeSearch(SETTINGS._replace(falsify=True))
    score_all(search, 0.1, 0.95, 0.4)
    for step, score in zip(search.ask(), (0.5, 0.4), strict=True):
        search.rescored(step.node, score, "worse")
    assert parents(search) == [1, 1, 2, 2]


def test_the_winner_is_chosen_on_valid_among_all_nodes():
    search = TreeSearch(SETTINGS)
    score_all(search, 0.2, 0.8, 0.7, valid=(0.6, 0.5, 0.6))
    assert search.winner().node == 0


def test_failed_and_undefined_nodes_take_no_part():
    search = TreeSearch(SETTINGS)
    search.ask()
    search.explained(0, None, "parse_error", thought="I think that")
    search.explained(1, explanation("x"))
    search.explained(2, explanation("y"))
    search.scored(1, None, None, None)
    search.scored(2, 0.1, 0.1, "worse")
    assert set(parents(search)) == {2}
    assert search.winner().node == 2
    assert [node.status for node in search.nodes[:3]] == ["parse_error", "undefined", "ok"]
    assert search.nodes[0].thought == "I think that"


def test_a_level_of_failures_keeps_what_was_scored():
    search = TreeSearch(SETTINGS)
    score_all(search, 0.0, 0.1, 0.2)
    for step in search.ask():
        search.explained(step.node, None, "parse_error")
    assert search.ask() == []
    assert search.winner().node == 2


def test_only_failures_is_no_winner():
    search = TreeSearch(SETTINGS)
    for step in search.ask():
        search.explained(step.node, None, "llm_error")
    assert search.ask() == []
    assert search.winner() is None


def test_equal_candidates_are_scored_once():
    search = TreeSearch(SETTINGS)
    propose_all(search, ["trees", "leaves", "trees"])
    assert [node.status for node in search.nodes] == ["scoring", "scoring", "duplicate"]
    assert actions(search) == [("score", 0), ("score", 1)]


def test_telling_twice_is_a_bug():
    search = TreeSearch(SETTINGS)
    score_all(search, 0.1, 0.2, 0.3)
    with pytest.raises(AssertionError, match="told already"):
        search.scored(0, 0.1, 0.1, "worse")
    with pytest.raises(AssertionError, match="not to be rescored"):
        search.rescored(0, 0.1, "worse")


def test_stopping_keeps_the_best_so_far():
    search = TreeSearch(SETTINGS)
    propose_all(search)
    search.scored(1, 0.3, 0.3, "worse")
    search.stop("budget")
    assert search.ask() == [] and search.cut_by == "budget"
    assert search.winner().node == 1
    assert [node.status for node in search.nodes] == ["stopped", "ok", "stopped"]


def drive(settings, seed, save_between):
    """A whole search against random scores, saved and restored between any two calls if asked for."""
    rng = random.Random(seed)
    search = TreeSearch(settings)

    def reload(search):
        return TreeSearch.restore(json.loads(json.dumps(search.state()))) if save_between else search

    while steps := search.ask():
        for step in steps:
            search = reload(search)
            if step.action == "propose":
                search.explained(step.node, explanation(rng.randrange(40)))
            elif step.action == "look":
                search.looked(step.node, rng.random())
            elif step.action == "score":
                search.scored(step.node, rng.random() * 0.8, rng.random(), "worse")
            else:
                search.rescored(step.node, rng.random() * 0.8, "worse")
        search = reload(search)
    return search


ALL_AT_ONCE = SETTINGS._replace(num_llm_roots=6, num_looks=2, falsify=True)


@pytest.mark.parametrize("settings", [SETTINGS, ALL_AT_ONCE, ALL_AT_ONCE._replace(strategy="best_first")])
@pytest.mark.parametrize("seed", range(5))
def test_a_search_can_be_saved_between_any_two_calls(settings, seed):
    search = drive(settings, seed, save_between=True)
    assert search == drive(settings, seed, save_between=False)
    assert search.finished and search.winner()
    assert not {node.status for node in search.nodes} & {"proposed", "looking", "looked", "scoring"}


def test_path_leads_from_the_root():
    search = drive(SETTINGS, 0, False)
    deepest = max(search.nodes, key=lambda node: node.depth)
    path = search.path(deepest.node)
    assert path[0].parent is None and path[-1] is deepest
    assert [node.depth for node in path] == list(range(len(path)))
