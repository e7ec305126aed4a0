import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import r2_score, roc_auc_score

from rayinterp.score import (
    SCORERS,
    correlation,
    evaluate,
    false_negatives_per_sequence,
    false_positives_per_sequence,
    leave_one_out,
    mean_interval,
    score_all,
)
from tests.sparse_scores import draw_records, measure_coverage


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


@pytest.mark.parametrize(("true", "predicted", "status"), [(0, 1, "constant_truth"), (1, 0, "constant_prediction")])
def test_undefined_is_none_with_a_reason(true, predicted, status, rng):
    varied, flat = [np.arange(8.0), np.arange(8.0)[::-1]], [np.full(8, 2.1), np.full(8, 2.1)]
    scores = scored((flat, varied)[true], (flat, varied)[predicted], rng)
    assert scores["correlation"] == (None, None, None, status)
    assert correlation(np.full(8, 2.1), np.arange(8.0)) is None


SEEDS = range(12)


def drawn(seed, num_each=8):
    """Records as scoring sees them, and their documents."""
    draw = draw_records(np.random.default_rng(seed), num_each)
    return list(draw.true), list(draw.predicted), draw.document_ids.tolist(), draw.kinds


def values(true, predicted, documents=None, kinds=None):
    scores = score_all(true, predicted, documents or list(range(len(true))), np.random.default_rng(0), 20, False, kinds)
    return {name: score.value for name, score in scores.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_those_of_other_libraries(seed):
    true, predicted, documents, kinds = drawn(seed)
    t, p = np.concatenate(true), np.concatenate(predicted)
    found = values(true, predicted, documents, kinds)
    assert found["correlation"] == pytest.approx(pearsonr(t, p).statistic)
    assert correlation(t, p) == pytest.approx(pearsonr(t, p).statistic)
    assert found["r2"] == pytest.approx(r2_score(t, p))
    assert found["r2_uncentered"] == pytest.approx(r2_score(np.append(t, -t), np.append(p, -p)))
    assert found["auroc"] == pytest.approx(roc_auc_score(t > 0, p))
    rounded = [np.round(x) for x in predicted]
    assert values(true, rounded)["auroc"] == pytest.approx(roc_auc_score(t > 0, np.concatenate(rounded)))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_changes_a_score_and_what_does_not(seed):
    true, predicted, documents, kinds = drawn(seed)
    rng = np.random.default_rng(seed)
    plain = values(true, predicted, documents, kinds)
    factor, shift = rng.uniform(0.2, 5), rng.uniform(-2, 2)

    def scaled(side, factor, shift=0.0):
        return [factor * x + shift for x in side]

    of_prediction = values(true, scaled(predicted, factor, shift))
    assert of_prediction["correlation"] == pytest.approx(plain["correlation"])
    assert of_prediction["auroc"] == pytest.approx(plain["auroc"])
    assert values(scaled(true, factor, shift), predicted)["correlation"] == pytest.approx(plain["correlation"])
    assert values(true, scaled(predicted, -1))["correlation"] == pytest.approx(-plain["correlation"])
    assert values(true, scaled(predicted, -1))["auroc"] == pytest.approx(1 - plain["auroc"])
    both = values(scaled(true, factor), scaled(predicted, factor))
    assert both == {name: pytest.approx(value) for name, value in plain.items()}
    moved = values(scaled(true, 1, shift), scaled(predicted, 1, shift))
    assert moved["r2"] == pytest.approx(plain["r2"])  # the others know where zero is
    assert moved["r2_uncentered"] != pytest.approx(plain["r2_uncentered"])

    records = rng.permutation(len(true)).tolist()
    mixed = [[side[i] for i in records] for side in (true, predicted, documents, kinds)]
    assert values(*mixed) == {name: pytest.approx(value) for name, value in plain.items()}
    tokens = [rng.permutation(len(t)) for t in true]
    mixed = [[x[order] for x, order in zip(side, tokens, strict=True)] for side in (true, predicted)]
    assert values(*mixed) == {name: pytest.approx(value) for name, value in plain.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds(seed):
    true, predicted, documents, kinds = drawn(seed)
    scores = score_all(true, predicted, documents, np.random.default_rng(0), 200, False, kinds)
    for name, lowest in {"correlation": -1, "auroc": 0}.items():
        assert lowest <= scores[name].low <= scores[name].value <= scores[name].high <= 1
    for name in SCORERS:
        assert scores[name].low <= scores[name].value <= scores[name].high <= 1
        assert scores[name].low < scores[name].high or scores[name].value == pytest.approx(1)
    perfect = score_all(true, true, documents, np.random.default_rng(0), 200, False, kinds)
    for score in perfect.values():
        assert score[:3] == (pytest.approx(1), pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("constant", [0.0, 2.1, 1e-6])
def test_constants_have_no_correlation(constant):
    true, predicted, documents, kinds = drawn(0)
    flat = [np.full_like(t, constant) for t in true]
    of_flat = score_all(true, flat, documents, np.random.default_rng(0), 20, False, kinds)
    assert of_flat["correlation"] == (None, None, None, "constant_prediction")
    assert of_flat["auroc"][:3] == (0.5, 0.5, 0.5)
    assert of_flat["r2"].value == pytest.approx(r2_score(np.concatenate(true), np.concatenate(flat)))
    from_flat = score_all(flat, predicted, documents, np.random.default_rng(0), 20, False, kinds)
    for name in ("correlation", "r2", "auroc"):
        assert from_flat[name] == (None, None, None, "constant_truth")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_number_gives_a_status_and_never_a_score(wrong, side):
    true, predicted, documents, kinds = drawn(0)
    (true, predicted)[side][3] = np.where(np.arange(32) == 5, wrong, (true, predicted)[side][3])
    scores = score_all(true, predicted, documents, np.random.default_rng(0), 20, False, kinds)
    assert set(scores.values()) == {(None, None, None, "not_finite")}
    assert correlation(np.concatenate(true), np.concatenate(predicted)) is None
    assert np.isnan(leave_one_out(true, predicted)).all()
    assert false_positives_per_sequence(true, predicted) is None
    assert false_negatives_per_sequence(true, predicted) is None


def test_one_document_of_a_kind_says_nothing_of_others(pair, rng):
    kinds = ["positive"] * 20 + ["silent"] * 20
    one = score_all(*pair, [7] * 20 + list(range(20)), rng, 50, True, kinds)["correlation"]
    assert one.value is not None and one.low is one.high is None
    two = score_all(*pair, [7] * 19 + [8] + list(range(20)), rng, 50, True, kinds)["correlation"]
    assert two.low < two.value < two.high


def test_how_many_there_are_of_a_kind_is_no_source_of_doubt():
    """Every positive and every silent record is like the next: only their mix could differ, and that was decided."""
    true = [np.array([0.0, 5.0])] * 10 + [np.zeros(2)] * 10
    predicted = [np.array([1.0, 3.0])] * 10 + [np.array([2.0, 0.0])] * 10
    kinds = ["positive"] * 10 + ["silent"] * 10
    for score in score_all(true, predicted, list(range(20)), np.random.default_rng(0), 50, True, kinds).values():
        assert score.low == score.value == score.high
    mixed = score_all(true, predicted, list(range(20)), np.random.default_rng(0), 50, True)["correlation"]
    assert mixed.low < mixed.value < mixed.high


def test_the_interval_of_every_scorer_covers_its_truth():
    """The full measurement is `make bench NAME=coverage`."""
    for name, (covered, width) in measure_coverage(100, 300).items():
        assert 0.86 <= covered <= 0.99, name
        assert 0 < width < 1.6, name


def test_few_records_are_marked_wide(pair, rng):
    assert {score.status for score in scored(*pair, rng, wide=True).values()} == {"wide"}
    assert set(scored(*pair, rng)) == set(SCORERS)


def test_false_positives_count_silent_tokens_predicted_above_one():
    true = [np.array([0.0, 0.0, 2.0]), np.array([0.0, 0.0, 0.0])]
    predicted = [np.array([1.5, 1.0, 5.0]), np.array([3.0, 2.0, 0.0])]
    assert false_positives_per_sequence(true, predicted) == 1.5
    assert false_positives_per_sequence([], []) is None


def test_false_negatives_count_firing_tokens_predicted_silent():
    true = [np.array([1.0, 1.1, 4.0]), np.array([5.0, 2.0, 0.0])]
    predicted = [np.array([0.0, 1.0, 1.1]), np.array([0.9, 0.0, 0.0])]
    assert false_negatives_per_sequence(true, predicted) == 1.5
    assert false_negatives_per_sequence([], []) is None


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


def test_the_mean_interval_does_not_depend_on_the_order_of_features(rng):
    values = rng.normal(size=30)
    assert len({mean_interval(rng.permutation(values), seed=0) for _ in range(5)}) == 1


def test_evaluate_takes_the_largest_rule(planted_run):
    from rayinterp.explanation import Rule
    from rayinterp.feature_id import FeatureId
    from rayinterp.records import load_records

    records = load_records(planted_run.tables, FeatureId("planted", 2), ("train",))["train"]
    truth = [record.activations for record in records]
    halves = {
        "strong": [np.where(t > 3, 5.0, 0) for t in truth],
        "weak": [np.where((t > 0) & (t < 3), 5.0, 0) for t in truth],
    }
    score, predicted = evaluate((Rule("strong", 5), Rule("weak", 2)), records, halves)
    assert score == pytest.approx(1)
    assert np.concatenate(predicted) == pytest.approx(np.concatenate(truth), abs=1e-5)
