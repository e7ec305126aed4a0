import json
import random

import pytest

from rayinterp.explain.search import SearchSettings, TreeSearch
from rayinterp.explanation import Rule

SETTINGS = SearchSettings(num_llm_roots=2, lexical_root=True, branching_factor=2, width=2, depth=3, stop_score=0.9)


def explanation(name):
    return (Rule(str(name), 5),)


def tell(search, node, train, valid=None, name=None):
    valid = train if valid is None else valid
    search.tell(
        node, explanation=explanation(name or node), status="ok", train_score=train, valid_score=valid, feedback="worse"
    )


def test_roots_first_then_revisions_of_the_best():
    search = TreeSearch(SETTINGS)
    assert [(p.node, p.kind, p.parent) for p in search.ask()] == [
        (0, "lexical", None),
        (1, "llm", None),
        (2, "llm", None),
    ]
    for node, score in enumerate((0.1, 0.3, 0.2)):
        tell(search, node, score)
    proposals = search.ask()
    assert [(p.kind, p.parent) for p in proposals] == [
        ("revision", 1),
        ("revision", 1),
        ("revision", 2),
        ("revision", 2),
    ]
    assert search.nodes[proposals[0].node].depth == 1


def test_parents_stay_in_the_beam():
    search = TreeSearch(SETTINGS)
    search.ask()
    for node, score in enumerate((0.1, 0.5, 0.4)):
        tell(search, node, score)
    for proposal, score in zip(search.ask(), (0.2, 0.45, 0.3, 0.1), strict=True):
        tell(search, proposal.node, score)
    search.ask()
    assert search.beam == [1, 4]


def test_a_round_that_brings_nothing_ends_the_search():
    search = TreeSearch(SETTINGS)
    search.ask()
    for node, score in enumerate((0.1, 0.5, 0.4)):
        tell(search, node, score)
    for proposal in search.ask():
        tell(search, proposal.node, 0.2)
    assert search.ask() == []
    assert search.finished


def test_a_good_train_score_ends_the_search():
    search = TreeSearch(SETTINGS)
    search.ask()
    for node, score in enumerate((0.1, 0.95, 0.4)):
        tell(search, node, score)
    assert search.ask() == []


def test_depth_ends_the_search():
    search = TreeSearch(SETTINGS._replace(depth=1))
    search.ask()
    for node in range(3):
        tell(search, node, 0.1 * node)
    for proposal in search.ask():
        tell(search, proposal.node, 0.5 + 0.01 * proposal.node)
    assert search.ask() == []
    assert len(search.nodes) == 7


def test_the_winner_is_chosen_on_valid_among_all_nodes():
    search = TreeSearch(SETTINGS)
    search.ask()
    tell(search, 0, train=0.2, valid=0.6)
    tell(search, 1, train=0.8, valid=0.5)
    tell(search, 2, train=0.7, valid=0.6)
    assert search.winner().node == 0


def test_failed_and_undefined_nodes_take_no_part():
    search = TreeSearch(SETTINGS)
    search.ask()
    search.tell(0, explanation=None, status="parse_error", thought="I think that")
    search.tell(1, explanation=explanation("x"), status="undefined")
    tell(search, 2, 0.1)
    proposals = search.ask()
    assert {p.parent for p in proposals} == {2}
    assert search.winner().node == 2
    assert search.nodes[0].thought == "I think that"


def test_a_level_of_failures_keeps_what_was_scored():
    search = TreeSearch(SETTINGS)
    search.ask()
    for node in range(3):
        tell(search, node, 0.1 * node)
    for proposal in search.ask():
        search.tell(proposal.node, explanation=None, status="parse_error")
    assert search.ask() == []
    assert search.winner().node == 2


def test_only_failures_is_no_winner():
    search = TreeSearch(SETTINGS)
    for proposal in search.ask():
        search.tell(proposal.node, explanation=None, status="llm_error")
    assert search.ask() == []
    assert search.winner() is None


def test_equal_candidates_are_recognised():
    search = TreeSearch(SETTINGS)
    search.ask()
    tell(search, 0, 0.1, name="trees")
    assert search.seen(explanation("trees"))
    assert not search.seen(explanation("leaves"))


def test_telling_twice_is_a_bug():
    search = TreeSearch(SETTINGS)
    search.ask()
    tell(search, 0, 0.1)
    with pytest.raises(AssertionError, match="told already"):
        tell(search, 0, 0.1)


def test_stopping_keeps_the_best_so_far():
    search = TreeSearch(SETTINGS)
    search.ask()
    tell(search, 1, 0.3)
    search.stop()
    assert search.ask() == []
    assert search.winner().node == 1
    assert [node.status for node in search.nodes] == ["stopped", "ok", "stopped"]


def drive(seed, save_between):
    """A whole search against random scores, saved and restored between any two calls if asked for."""
    rng = random.Random(seed)
    search = TreeSearch(SETTINGS)

    def reload(search):
        return TreeSearch.restore(json.loads(json.dumps(search.state()))) if save_between else search

    while proposals := search.ask():
        for proposal in proposals:
            search = reload(search)
            tell(search, proposal.node, rng.random() * 0.8, rng.random())
        search = reload(search)
    return search


@pytest.mark.parametrize("seed", range(5))
def test_a_search_can_be_saved_between_any_two_calls(seed):
    assert drive(seed, save_between=True) == drive(seed, save_between=False)


def test_path_leads_from_the_root():
    search = drive(0, False)
    deepest = max(search.nodes, key=lambda node: node.depth)
    path = search.path(deepest.node)
    assert path[0].parent is None and path[-1] is deepest
    assert [node.depth for node in path] == list(range(len(path)))
