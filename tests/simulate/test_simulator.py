"""Calibration, combination and the memo, against numbers worked out by hand."""

import numpy as np
import pytest

from rayinterp.explanation import Rule
from rayinterp.simulate.simulator import (
    CONTROL_NULLS,
    NULL_EXPLANATIONS,
    Calibration,
    Memo,
    MemoKey,
    RuleRequest,
    TokenSequence,
    calibrate,
    calibrated,
    combine,
    expected_value,
    is_usable,
    rules_to_requests,
    with_nulls,
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


def simulate(memo: Memo, engine: CountingEngine, requests: list[RuleRequest], method: Calibration):
    """What a client does with a memo and an engine; returns predictions and what was new."""
    wanted = with_nulls(requests, method)
    missing = memo.missing(wanted)
    new = memo.add(missing, engine.log_probs(missing))
    return calibrated(requests, memo.log_probs(wanted), method), new


def test_no_pair_is_computed_twice():
    engine, memo = CountingEngine(), Memo()
    first, _ = simulate(memo, engine, [RuleRequest("r", (A, B)), RuleRequest("r", (A,))], "difference")
    assert len(engine.pairs) == len(set(engine.pairs)) == 2 * (1 + len(NULL_EXPLANATIONS))

    num_pairs = len(engine.pairs)
    second, _ = simulate(memo, engine, [RuleRequest("r", (A, B)), RuleRequest("r", (A,))], "difference")
    assert len(engine.pairs) == num_pairs
    assert [len(answer) for answer in second] == [2, 1]
    for one, two in zip(first, second, strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)

    simulate(memo, engine, [RuleRequest("other rule", (A,))], "difference")
    assert engine.pairs[num_pairs:] == [("other rule", A.sequence_id)]


def test_a_resumed_memo_gives_the_same_numbers():
    requests = [RuleRequest("r", (A, B))]
    memo = Memo()
    expected, rows = simulate(memo, CountingEngine(), requests, "ratio")
    assert len(rows) == 2 * (1 + len(NULL_EXPLANATIONS))
    assert not simulate(memo, CountingEngine(), requests, "ratio")[1], "remembered pairs are not new"

    engine, resumed = CountingEngine(), Memo()
    for key, values in rows.items():
        assert values.dtype == np.float16
        resumed.remember(key, values.ravel())  # as the table keeps them
    for x, y in zip(expected[0], simulate(resumed, engine, requests, "ratio")[0][0], strict=True):
        np.testing.assert_array_equal(x, y)
    assert not engine.pairs


def test_another_calibration_is_made_from_the_same_pairs():
    engine, memo = CountingEngine(), Memo()
    requests = [RuleRequest("r", (A, B))]
    plain, _ = simulate(memo, engine, requests, "none")
    num_pairs = len(engine.pairs)
    simulate(memo, engine, requests, "difference")
    assert len(engine.pairs) == num_pairs + 2 * len(NULL_EXPLANATIONS)  # nulls alone
    simulate(memo, engine, requests, "ratio")
    again, _ = simulate(memo, engine, requests, "none")
    assert len(engine.pairs) == num_pairs + 2 * len(NULL_EXPLANATIONS)
    np.testing.assert_array_equal(plain[0][0], again[0][0])


def test_a_digit_may_be_ruled_out_but_not_all_of_them():
    assert is_usable(log_probs([1, 0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0]))
    for bad in (np.nan, np.inf):
        assert not is_usable(np.array([[0.0] * 6, [bad, *[0.0] * 5]]))
    assert not is_usable(np.array([0.0] * 6 + [-np.inf] * 6, dtype=np.float16))


def test_the_first_write_wins():
    memo = Memo()
    key = MemoKey(Rule("r").hash, A.sequence_id)
    memo.remember(key, log_probs([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]))
    memo.remember(key, log_probs([0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]))
    predictions, _ = simulate(memo, CountingEngine(), [RuleRequest("r", (A,))], "none")
    assert predictions[0][0] == pytest.approx([0, 5])
