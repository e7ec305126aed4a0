"""The packed layout itself: positions, ancestry, mask, and how rules are cut into passes."""

import pytest
import torch

from rayinterp.simulate.prompt_tree import HEADER, Branch, Segment, block_mask, flex_mask, pack, plan_passes, visible


def test_positions_continue_along_the_path_and_siblings_do_not_meet():
    tree = pack([Segment([1, 2]), Segment([3], 0), Segment([4, 5], 0), Segment([6]), Segment([7], 3)], 10)
    assert tree.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert tree.position_ids.tolist() == [10, 11, 12, 12, 13, 10, 11]
    assert tree.starts == (0, 2, 3, 5, 6)
    mask = block_mask(tree, 10, torch.float32)
    assert mask.shape == (1, 1, 7, 17)
    seen = (mask[0, 0, :, 10:] == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert (mask[0, 0, :, :10] == 0).all()
    assert mask.min() == torch.finfo(torch.float32).min


def test_a_window_is_counted_along_the_path():
    """To the second child its parent is as near as to the first, whatever lies between them in the row."""
    tree = pack([Segment([1, 2]), Segment([3, 4], 0), Segment([5, 6], 0)], 3)
    allowed = visible(tree, 3, window=3).int().tolist()
    assert allowed == [
        [0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_is_shown_the_same(window):
    tree = pack([Segment([1, 2]), Segment([3, 4], 0), Segment([5, 6], 0), Segment([7]), Segment([8, 9], 3)], 6)
    allowed = visible(tree, 6, window)
    seen = flex_mask(tree, 6, "cpu", window).mask_mod
    for query in range(allowed.shape[0]):
        for key in range(allowed.shape[1]):
            assert bool(seen(0, 0, torch.tensor(query), torch.tensor(key))) == bool(allowed[query, key])


def test_parents_come_first():
    with pytest.raises(AssertionError, match="segment 0 has parent 1"):
        pack([Segment([1], 1), Segment([2])], 0)


@pytest.mark.parametrize("budget", [1, 7, 12, 10_000])
def test_passes_hold_every_record_once_below_its_rule(budget):
    branches = [Branch([90, 91], [[i, i, i][: 1 + i % 3] for i in range(7)]), Branch([80], []), Branch([70], [[5] * 9])]
    seen = []
    for plan in plan_passes(branches, budget):
        size = sum(len(segment.ids) for segment in plan.segments)
        assert size <= budget or len(plan.leaves) == 1
        for leaf in plan.leaves:
            segment = plan.segments[leaf.segment]
            assert segment.ids == branches[leaf.branch].records[leaf.record]
            assert plan.segments[segment.parent].ids == branches[leaf.branch].rule
            assert plan.segments[segment.parent].parent == HEADER
            seen.append((leaf.branch, leaf.record))
    assert seen == [(b, r) for b, branch in enumerate(branches) for r in range(len(branch.records))]
