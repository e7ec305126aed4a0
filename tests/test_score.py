import numpy as np
import pytest

from rayinterp.score import (
    SCORERS,
    correlation,
    evaluate,
    false_positives_per_sequence,
    leave_one_out,
    mean_interval,
    score_all,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    true = [np.maximum(0, rng.normal(size=16)) for _ in range(40)]
    return true, [t + 0.5 * rng.normal(size=16) for t in true]


def scored(true, predicted, rng, documents=None, wide=False):
    return score_all(true, predicted, documents or list(range(len(true))), rng, 400, wide)


def test_values_are_those_of_the_definitions(pair, rng):
    t, p = np.concatenate(pair[0]), np.concatenate(pair[1])
    scores = scored(*pair, rng)
    assert scores["correlation"].value == pytest.approx(np.corrcoef(t, p)[0, 1])
    assert scores["r2"].value == pytest.approx(1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum())
    assert scores["r2_uncentered"].value == pytest.approx(1 - ((t - p) ** 2).mean() / (t**2).mean())
    assert scores["abs_dev_explained"].value == pytest.approx(1 - np.abs(t - p).mean() / np.abs(t).mean())
    rounded = [np.round(x) for x in pair[1]]
    r = np.concatenate(rounded)
    fired, silent = r[t > 0][:, None], r[t == 0]
    assert scored(pair[0], rounded, rng)["auroc"].value == pytest.approx(
        (fired > silent).mean() + (fired == silent).mean() / 2
    )


def test_intervals_resample_documents(pair, rng):
    """Ten copies of each record say no more than one: the interval must not shrink if they are one document."""
    one = scored(*pair, rng)["correlation"]
    copies = [pair[0] * 10, pair[1] * 10]
    same = scored(*copies, rng, documents=list(range(40)) * 10)["correlation"]
    apart = scored(*copies, rng, documents=list(range(400)))["correlation"]
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.2)
    assert apart.high - apart.low < 0.5 * (one.high - one.low)
    assert one.low < one.value < one.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        x = rng.normal(size=(60, 8))
        y = 0.6 * x + 0.8 * rng.normal(size=(60, 8))
        score = score_all(list(x), list(y), list(range(60)), rng, 300, False)["correlation"]
        covered += score.low <= 0.6 <= score.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("true", "predicted", "status"), [(0, 1, "constant_truth"), (1, 0, "constant_prediction")])
def test_undefined_is_none_with_a_reason(true, predicted, status, rng):
    varied, flat = [np.arange(8.0), np.arange(8.0)[::-1]], [np.full(8, 2.1), np.full(8, 2.1)]
    scores = scored((flat, varied)[true], (flat, varied)[predicted], rng)
    assert scores["correlation"] == (None, None, None, status)
    assert correlation(np.full(8, 2.1), np.arange(8.0)) is None


def test_few_records_are_marked_wide(pair, rng):
    assert {score.status for score in scored(*pair, rng, wide=True).values()} == {"wide"}
    assert set(scored(*pair, rng)) == set(SCORERS)


def test_false_positives_count_silent_tokens_predicted_above_one():
    true = [np.array([0.0, 0.0, 2.0]), np.array([0.0, 0.0, 0.0])]
    predicted = [np.array([1.5, 1.0, 5.0]), np.array([3.0, 2.0, 0.0])]
    assert false_positives_per_sequence(true, predicted) == 1.5
    assert false_positives_per_sequence([], []) is None


def test_leave_one_out_equals_the_slow_way(pair):
    fast = leave_one_out(*pair)
    for i in range(len(pair[0])):
        true, predicted = (np.concatenate(side[:i] + side[i + 1 :]) for side in pair)
        assert fast[i] == pytest.approx(np.corrcoef(true, predicted)[0, 1], abs=1e-9)


def test_the_mean_interval_of_features():
    interval = mean_interval(np.array([0.1, 0.5, 0.9, 0.3]), seed=0)
    assert interval.value == pytest.approx(0.45)
    assert 0.1 <= interval.low < 0.45 < interval.high <= 0.9
    assert interval.n == 4
    assert mean_interval(np.array([]), seed=0) == (None, None, None, 0)


def test_evaluate_takes_the_largest_rule(planted_run):
    from rayinterp.explanation import Rule
    from rayinterp.records import load_records
    from rayinterp.subject import FeatureId

    records = load_records(planted_run.tables, FeatureId("planted", 2), ("train",))["train"]
    truth = [record.activations for record in records]
    halves = {
        "strong": [np.where(t > 3, 5.0, 0) for t in truth],
        "weak": [np.where((t > 0) & (t < 3), 5.0, 0) for t in truth],
    }
    score, predicted = evaluate((Rule("strong", 5), Rule("weak", 2)), records, halves)
    assert score == pytest.approx(1)
    assert np.concatenate(predicted) == pytest.approx(np.concatenate(truth), abs=1e-5)
