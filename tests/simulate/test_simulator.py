"""Calibration, combination and the memo, against numbers worked out by hand."""

import numpy as np
import pytest

from rayinterp.explanation import Rule
from rayinterp.simulate.simulator import (
    CONTROL_NULLS,
    NULL_EXPLANATIONS,
    MemoKey,
    MemoSimulator,
    RuleRequest,
    TokenSequence,
    calibrate,
    combine,
    expected_value,
    rules_to_requests,
)

A, B = TokenSequence(1, (" a", " b")), TokenSequence(2, (" c", " d", " e"))


def log_probs(*rows: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float32))


def test_expected_value_by_hand():
    values = log_probs([0.5, 0, 0, 0, 0, 0.5], [0, 0, 0, 1, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1])
    assert expected_value(values) == pytest.approx([2.5, 3.0, 2.1], abs=1e-6)
    assert expected_value(values - 7) == pytest.approx([2.5, 3.0, 2.1], abs=1e-6)  # log-probs of a larger vocabulary


def test_calibrations_by_hand():
    rule = log_probs([0.5, 0, 0, 0, 0, 0.5], [0.9, 0, 0, 0, 0, 0.1])
    nulls = np.stack(
        [
            log_probs([0.9, 0, 0, 0, 0, 0.1], [0.5, 0, 0, 0, 0, 0.5]),
            log_probs([0.7, 0, 0, 0, 0, 0.3], [0.5, 0, 0, 0, 0, 0.5]),
        ]
    )
    assert calibrate(rule, nulls, "none") == pytest.approx([2.5, 0.5], abs=1e-5)
    # E_null = (0.5 + 1.5) / 2 and 2.5: the second difference is negative and clipped.
    assert calibrate(rule, nulls, "difference") == pytest.approx([1.5, 0.0], abs=1e-5)


def test_ratio_by_hand():
    rule = log_probs([0.6, 0.1, 0.1, 0.1, 0.05, 0.05])
    null = log_probs([0.8, 0.1, 0.025, 0.025, 0.025, 0.025])[None]
    odds = np.array([0.75, 1, 4, 4, 2, 2])
    expected = odds @ np.arange(6) / odds.sum()
    assert calibrate(rule, null, "ratio") == pytest.approx([expected], abs=1e-3)


def test_combine_takes_the_largest_weighted_rule():
    explanation = (Rule("one", 5), Rule("two", 2))
    requests = rules_to_requests(explanation, [A])
    assert requests == [RuleRequest("one", (A,)), RuleRequest("two", (A,))]
    (combined,) = combine(explanation, [[np.array([1.0, 0.5], np.float32)], [np.array([2.0, 5.0], np.float32)]])
    assert combined == pytest.approx([1.0, 2.0])
    assert combined.dtype == np.float32


def test_control_nulls_are_not_used_for_calibration():
    assert not set(CONTROL_NULLS) & set(NULL_EXPLANATIONS)


class CountingEngine:
    """Log-probabilities that are a function of rule and tokens, and a list of the pairs that were asked for."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, int]] = []

    def log_probs(self, requests: list[RuleRequest]) -> list[list[np.ndarray]]:
        self.pairs += [(request.rule, s.sequence_id) for request in requests for s in request.sequences]
        return [[self._of(request.rule, s) for s in request.sequences] for request in requests]

    def _of(self, rule: str, sequence: TokenSequence) -> np.ndarray:
        logits = np.random.default_rng([len(rule), sequence.sequence_id]).normal(size=(len(sequence.tokens), 6))
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def test_no_pair_is_computed_twice():
    engine = CountingEngine()
    memo = MemoSimulator(engine, "difference")
    first = memo.simulate([RuleRequest("r", (A, B)), RuleRequest("r", (A,))])
    assert len(engine.pairs) == len(set(engine.pairs)) == 2 * (1 + len(NULL_EXPLANATIONS))
    assert memo.num_simulated == len(engine.pairs)

    second = memo.simulate([RuleRequest("r", (A, B)), RuleRequest("r", (A,))])
    assert len(engine.pairs) == memo.num_simulated
    assert [len(answer) for answer in second] == [2, 1]
    for one, two in zip(first, second, strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)

    memo.simulate([RuleRequest("other rule", (A,))])
    assert engine.pairs[memo.num_simulated - 1 :] == [("other rule", A.sequence_id)]


def test_a_resumed_memo_gives_the_same_numbers():
    requests = [RuleRequest("r", (A, B))]
    whole = MemoSimulator(CountingEngine(), "ratio")
    expected = whole.simulate(requests)
    rows = dict(whole.new)
    whole.new.clear()
    whole.simulate(requests)
    assert not whole.new, "remembered pairs are not new"

    engine = CountingEngine()
    resumed = MemoSimulator(engine, "ratio")
    for key, values in rows.items():
        assert values.dtype == np.float16
        resumed.remember(key, values.ravel())  # as the table keeps them
    for x, y in zip(expected[0], resumed.simulate(requests)[0], strict=True):
        np.testing.assert_array_equal(x, y)
    assert not engine.pairs


def test_the_first_write_wins():
    memo = MemoSimulator(CountingEngine(), "none")
    key = MemoKey(Rule("r").hash, A.sequence_id)
    memo.remember(key, log_probs([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]))
    memo.remember(key, log_probs([0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]))
    assert memo.simulate([RuleRequest("r", (A,))])[0][0] == pytest.approx([0, 5])
