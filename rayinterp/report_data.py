"""What a run found, as numbers over its features: arrow tables in, means with their doubt out.

    scores, explanations -> ArmSummary (beside its controls), Comparison (paired), Agreement (of two simulators)

A null score is a feature *without* a score: it is counted with its reason and enters no mean, and a paired difference
is taken over the features that both sides scored. Nothing here knows HTML or where the tables lie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr

from rayinterp.complexity import MEASURES
from rayinterp.config import RunConfig
from rayinterp.score import Interval, mean_interval
from rayinterp.scorers.values import METHODS, chance_level
from rayinterp.usage import Spent

SCORER = "correlation"
"""The scorer of every table that does not name another."""
OTHER_SCORERS = ("r2", "r2_uncentered", "abs_dev_explained", "auroc")
CONTROLS = ("token_lookup", "shuffled", "null")
EXPLANATION = ""
"""What the column `control` holds for the explanation itself."""
WIDE = 0.3
"""A 95 % interval of a mean correlation that spans more is marked."""
FEW_FEATURES = 10
"""A mean over fewer features is marked however narrow: the bootstrap cannot see what it has not sampled."""

SCORE_COLUMNS = (
    *("feature_key", "explainer", "control", "simulator", "scorer", "source", "split"),
    *("value", "ci_low", "ci_high", "num_records", "false_positives_per_sequence"),
    *("false_negatives_per_sequence", "status", "settings", "num_unparsed"),
)

REASONS = {
    "dead": "never active in the corpus",
    "too_few": "active in too few train sequences",
    "dense": "active at too large a share of all tokens",
    "short": "fewer records than asked for",
    "no_records": "no records to explain it from",
    "no_explanation": "no answer of the explainer could be used",
    "parse_error": "the answer could not be parsed",
    "cut_off": "the answer was cut off",
    "llm_error": "the LLM failed on it; the next run tries again",
    "nothing_fires": "nothing fires in the train records",
    "no_budget": "beyond the budget",
    "budget": "cut short by the budget",
    "time_limit": "cut short by its time limit",
    "stopped": "the search was stopped first",
    "undefined": "a correlation that is not defined",
    "duplicate": "same explanation as another node",
    "pruned": "left out after a cheaper simulator's look",
    "not_explained": "no explainer has run on it",
    "not_graded": "not graded with this simulator",
    "one_rule": "one rule has no other beside it",
    "not_positive": "a correlation that is not above zero",
    "silent": "no two rules predict anything",
    "not_finite": "a prediction that is no number",
    "wide": "few records, so a wide interval",
}
"""Statuses in words; one that is missing here is shown as it stands in the table."""
NODE_REASONS = {"llm_error": "the LLM gave no answer"}
"""Those that mean something else for a node of a search: what is tried again is the search."""


def reason(status: str | None, of_node: bool = False) -> str:
    in_words = REASONS | NODE_REASONS if of_node else REASONS
    return in_words.get(status or "", (status or "no reason recorded").replace("_", " "))


class Score(NamedTuple):
    """One row of `scores`."""

    value: float | None
    low: float | None
    high: float | None
    false_positives: float | None
    false_negatives: float | None
    num_records: int | None
    status: str
    settings: str | None = None
    """What else it depends on: scores under others were taken on other records."""
    num_unparsed: int | None = None
    """Records that no answer of an LLM could be read on; None where none is read."""


class ScoreKey(NamedTuple):
    """What is graded, by whom, on which records."""

    simulator: str
    source: str
    explainer: str
    control: str = EXPLANATION
    scorer: str = SCORER

    def of(self, control: str) -> ScoreKey:
        """The same grading of a control; only the shuffled one depends on the explainer."""
        return self._replace(control=control, explainer=self.explainer if control == "shuffled" else "")


ScoreBook = dict[ScoreKey, dict[str, Score]]
"""Test scores by feature key, for everything that was graded."""


class Order(NamedTuple):
    """The arms and sources of a run in the order of its config; those that it no longer names come last."""

    explainers: tuple[str, ...]
    simulators: tuple[str, ...]
    sources: tuple[str, ...]
    scorers: tuple[str, ...] = ()
    """Further scorers, which stand in the column of the simulators and are none."""


class ControlSummary(NamedTuple):
    """A control on the features of the arm it stands beside."""

    control: str
    mean: Interval
    false_positives: Interval


class ArmSummary(NamedTuple):
    """One explainer, graded by one simulator on positives and one complementary source."""

    key: ScoreKey
    mean: Interval
    is_wide: bool
    num_wide_features: int
    unscored: tuple[tuple[str, int], ...]
    """Statuses of the features without a score, most frequent first."""
    false_positives: Interval
    """Over the features with a score, as those of the controls: a constant prediction, which has none, makes none."""
    false_negatives: Interval
    """Likewise."""
    controls: tuple[ControlSummary, ...]
    other_scorers: tuple[tuple[str, Interval], ...]


class ScorerSummary(NamedTuple):
    """One further scorer of one explainer on positives and one complementary source."""

    key: ScoreKey
    """Its `simulator` is the scorer's arm; without an explainer, no explanation is graded."""
    chance: float | None
    """None where the config no longer names the scorer."""
    mean: Interval
    is_wide: bool
    unscored: tuple[tuple[str, int], ...]
    unparsed: float | None
    """Share of the records on which no answer could be read; None where none is."""
    shuffled: Interval
    null: Interval


class Comparison(NamedTuple):
    """Mean of first - second over the features that both scored."""

    simulator: str
    source: str
    first: str
    second: str
    """Another explainer, or the name of a control."""
    difference: Interval
    is_wide: bool
    num_first_better: int


class Agreement(NamedTuple):
    """Correlation over features of the scores that two simulators gave to the same explanations."""

    first: str
    second: str
    explainer: str
    source: str
    correlation: Interval
    reason: str
    """Why there is no correlation; empty where there is one."""


class ComplexityTable(NamedTuple):
    """Means of every measure of complexity, by SAE and explainer."""

    columns: list[tuple[str, str]]
    """Measure, and the simulator that it depends on; empty where on none."""
    rows: list[tuple[str, str, tuple[Interval, ...]]]
    """SAE, explainer, and a mean for each column over the explanations for which it is defined."""


class CascadeSummary(NamedTuple):
    """What a cheap simulator's first look spared an arm, and how far it orders candidates as the arm's own does."""

    explainer: str
    num_pruned: int
    num_simulated: int
    """Candidates that the arm's own simulator was given."""
    rank_correlation: Interval
    """Spearman's, over a feature's candidates that both scored, of features where none was pruned; their mean."""


class Cost(NamedTuple):
    """What a stage takes; None is not known, or not recorded."""

    seconds: float | None = None
    gpu_hours: float | None = None
    usd: float | None = None
    llm_calls: float | None = None


class CostRow(NamedTuple):
    """A stage, or the total of those that have both."""

    stage: str
    estimate: Cost
    actual: Cost


COST_STAGES = ("corpus", "harvest", "index", "records", "explain", "score")


def cost_rows(
    estimate: Mapping[str, Mapping[str, float | None]],
    usage: Mapping[str, Spent],
    calls: pa.Table,
    config: RunConfig,
) -> list[CostRow]:
    """Estimate beside what was spent, by stage, and their sums over the stages that were run.

    Args:
        estimate: By stage, as the manifest keeps it.
        usage: Over all resumptions.
        calls: `llm_calls`.
    """
    rows = []
    for stage in COST_STAGES:
        spent, actual = usage.get(stage), Cost()
        if spent is not None:
            in_score = pc.equal(pc.fill_null(calls["stage"], "explain"), "score")  # pyright: ignore[reportAttributeAccessIssue]
            asked = {"explain": pc.invert(in_score), "score": in_score}.get(stage)  # pyright: ignore[reportAttributeAccessIssue]
            made = calls.slice(0, 0) if asked is None else calls.filter(asked)
            priced = config.budget.usd_per_gpu_hour
            usd = spent.gpu_hours * priced if priced else 0.0
            usd += pc.sum(made["cost_usd"]).as_py() or 0.0  # pyright: ignore[reportAttributeAccessIssue]
            unpriced = made.num_rows > 0 and made["cost_usd"].null_count == made.num_rows
            unpriced = unpriced and any(llm.provider == "openai" for llm in config.llms.values())
            actual = Cost(spent.seconds, spent.gpu_hours, None if unpriced else usd, made.num_rows)
        rows.append(CostRow(stage, Cost(**estimate.get(stage, {})), actual))
    run = [row for row in rows if row.stage in usage]
    return [*rows, CostRow("total", *(_sum([row[side] for row in run]) for side in (1, 2)))] if run else rows


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(*(None if None in column else sum(column) for column in zip(*costs, strict=True)))


def score_book(scores: pa.Table) -> ScoreBook:
    """The test scores of a `scores` table, looked up by what was graded."""
    book: ScoreBook = {}
    for batch in scores.select(list(SCORE_COLUMNS)).to_batches(max_chunksize=50_000):
        for row in batch.to_pylist():
            if row["split"] != "test":
                continue
            key = ScoreKey(row["simulator"], row["source"], row["explainer"], row["control"], row["scorer"])
            book.setdefault(key, {})[row["feature_key"]] = Score(
                number(row["value"]),
                number(row["ci_low"]),
                number(row["ci_high"]),
                number(row["false_positives_per_sequence"]),
                number(row["false_negatives_per_sequence"]),
                row["num_records"],
                row["status"],
                row["settings"],
                row["num_unparsed"],
            )
    return book


def number(value: float | None) -> float | None:
    """None for null and for NaN: both mean undefined."""
    return None if value is None or math.isnan(value) else value


def order_of(config: RunConfig, book: Iterable[ScoreKey], explainers: Iterable[str]) -> Order:
    """Arms and sources that have rows, in the config's order."""
    keys = list(book)
    graders = dict.fromkeys([*config.score.simulators, *config.simulators])
    return Order(
        _by_config({key.explainer for key in keys if key.explainer} | set(explainers), config.explainers),
        _by_config({key.simulator for key in keys if key.scorer not in METHODS}, graders),
        _by_config({key.source for key in keys}, [*config.records.complementary, "rule_negative"]),
        _by_config({key.simulator for key in keys if key.scorer in METHODS}, config.score.scorers),
    )


def arm_labels(arms: Iterable[str]) -> dict[str, str]:
    """Arms without their hash, where their name alone tells them apart."""
    arms = list(arms)
    names = Counter(arm.partition("@")[0] for arm in arms)
    return {arm: name if names[name := arm.partition("@")[0]] == 1 else arm for arm in arms}


def arm_summaries(
    book: ScoreBook, explanations: Mapping[str, Mapping[str, str]], order: Order, config: RunConfig
) -> list[ArmSummary]:
    """One row per simulator, source and explainer; `explanations` maps explainer and feature to a status."""
    keys = [ScoreKey(sim, src, exp) for sim in order.simulators for src in order.sources for exp in order.explainers]
    return [
        _summarise_arm(book, key, explanations.get(key.explainer, {}), config)
        for key in keys
        if key in book or key.explainer in explanations
    ]


def scorer_summaries(book: ScoreBook, order: Order, config: RunConfig) -> list[ScorerSummary]:
    """One row per further scorer, source and explainer."""
    keys = {key for key in book if key.scorer in METHODS and not key.control}
    rows = []
    for arm in order.scorers:
        scorer = config.score.scorers.get(arm.partition("@")[0])
        for source in order.sources:
            of_arm = {key.explainer: key for key in keys if (key.simulator, key.source) == (arm, source)}
            for key in (of_arm[explainer] for explainer in ("", *order.explainers) if explainer in of_arm):
                graded = book[key]
                mean = _mean([score.value for score in graded.values()], config)
                unscored = Counter(score.status for score in graded.values() if score.value is None)
                asked = [(s.num_unparsed, s.num_records or 0) for s in graded.values() if s.num_unparsed is not None]
                total = sum(unparsed + num_records for unparsed, num_records in asked)
                rows.append(
                    ScorerSummary(
                        key,
                        chance_level(scorer) if scorer and scorer.method == key.scorer else None,
                        mean,
                        is_wide(mean),
                        tuple(unscored.most_common()),
                        sum(unparsed for unparsed, _ in asked) / total if total else None,
                        _control(book, key, "shuffled", config).mean,
                        _control(book, key, "null", config).mean,
                    )
                )
    return rows


def comparisons(book: ScoreBook, order: Order, config: RunConfig) -> list[Comparison]:
    """Explainers against one another and against their controls, paired by feature."""
    rows = []
    for simulator in order.simulators:
        for source in order.sources:
            keys = [key for arm in order.explainers if (key := ScoreKey(simulator, source, arm)) in book]
            pairs = list(combinations(keys, 2)) + [(k, k.of(c)) for k in keys for c in CONTROLS if k.of(c) in book]
            rows += [_compare(book, first, second, config) for first, second in pairs]
    return rows


def agreements(book: ScoreBook, order: Order) -> list[Agreement]:
    """How far two simulators that graded the same features order them alike."""
    rows = []
    for first, second in combinations(order.simulators, 2):
        for explainer in order.explainers:
            for source in order.sources:
                a, b = (book.get(ScoreKey(sim, source, explainer), {}) for sim in (first, second))
                if a.keys() & b.keys():
                    rows.append(Agreement(first, second, explainer, source, *_agree(*_paired(a, b))))
    return rows


def complexity_table(complexity: pa.Table, order: Order, config: RunConfig) -> ComplexityTable:
    """The table `complexity`, averaged; undefined measures enter no mean."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for row in complexity.select(["sae", "explainer", "measure", "simulator", "value"]).to_pylist():
        values = found.setdefault((row["sae"], row["explainer"]), {})
        values.setdefault((row["measure"], row["simulator"]), []).extend(
            [] if number(row["value"]) is None else [row["value"]]
        )
    arms = _by_config({simulator for values in found.values() for _, simulator in values}, config.simulators)
    there = {column for values in found.values() for column in values}
    columns = [(measure, arm) for arm in arms for measure in MEASURES if (measure, arm) in there]
    columns.sort(key=lambda column: column[1] != "")
    return ComplexityTable(
        columns,
        [
            (sae, arm, tuple(_mean(found[sae, arm].get(column, []), config) for column in columns))
            for arm in order.explainers
            for sae in sorted({sae for sae, _ in found})
            if (sae, arm) in found
        ],
    )


MIN_RANKED = 3
"""Candidates that a rank correlation takes."""


def cascade_summaries(candidates: pa.Table, order: Order, config: RunConfig) -> list[CascadeSummary]:
    """One row per explainer arm that has candidates pruned, or could have had."""
    columns = ["explainer", "feature_key", "status", "cascade_score", "train_score"]
    in_cascade = pc.field("cascade_score").is_valid() | (pc.field("status") == "pruned")
    arms = pc.unique(candidates.filter(in_cascade)["explainer"])  # pyright: ignore[reportAttributeAccessIssue]
    by_arm: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for node in candidates.select(columns).filter(pc.field("explainer").isin(arms)).to_pylist():
        if node["status"] in ("ok", "undefined", "pruned"):
            by_arm.setdefault(node["explainer"], {}).setdefault(node["feature_key"], []).append(node)
    summaries = []
    for arm in order.explainers:
        if arm not in by_arm:
            continue
        whole = [nodes for nodes in by_arm[arm].values() if all(node["status"] != "pruned" for node in nodes)]
        nodes = [node for of_feature in by_arm[arm].values() for node in of_feature]
        num_pruned = sum(node["status"] == "pruned" for node in nodes)
        correlations = _mean([_rank_correlation(nodes) for nodes in whole], config)
        summaries.append(CascadeSummary(arm, num_pruned, len(nodes) - num_pruned, correlations))
    return summaries


def _rank_correlation(nodes: list[dict[str, Any]]) -> float | None:
    pairs = [(node["cascade_score"], number(node["train_score"])) for node in nodes]
    scored = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)
    if len(scored) < MIN_RANKED or not np.ptp(scored, axis=0).all():
        return None
    return float(spearmanr(scored[:, 0], scored[:, 1]).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def winning_node(nodes: Iterable[Mapping[str, Any]], explanation: str | None) -> int | None:
    """The node of one search that holds the winning explanation; of several the best on valid, then the first."""
    same = [node for node in nodes if explanation is not None and node["explanation"] == explanation]
    same.sort(
        key=lambda node: (node["status"] == "duplicate", -(number(node["valid_score"]) or -math.inf), node["node"])
    )
    return same[0]["node"] if same else None


def is_wide(interval: Interval) -> bool:
    """Too little to go by: few features, or an interval that spans much of the scale."""
    if interval.value is None:
        return False
    spans = interval.high - interval.low if interval.low is not None and interval.high is not None else math.inf
    return interval.n < FEW_FEATURES or spans > WIDE


def _by_config(found: set[str], names: Iterable[str]) -> tuple[str, ...]:
    place = {name: index for index, name in enumerate(names)}
    return tuple(sorted(found, key=lambda arm: (place.get(arm.partition("@")[0], len(place)), arm)))


def _summarise_arm(book: ScoreBook, key: ScoreKey, statuses: Mapping[str, str], config: RunConfig) -> ArmSummary:
    graded = book.get(key, {})
    scored = [score for score in graded.values() if score.value is not None]
    unscored = Counter(score.status for score in graded.values() if score.value is None)
    missing = (status for feature, status in statuses.items() if feature not in graded)
    unscored.update("not_graded" if status == "ok" else status for status in missing)
    mean = _mean([score.value for score in scored], config)
    others = [(scorer, book.get(key._replace(scorer=scorer))) for scorer in OTHER_SCORERS]
    return ArmSummary(
        key,
        mean,
        is_wide(mean),
        sum(score.status == "wide" for score in graded.values()),
        tuple(unscored.most_common()),
        _mean([score.false_positives for score in scored], config),
        _mean([score.false_negatives for score in scored], config),
        tuple(_control(book, key, control, config) for control in CONTROLS),
        tuple((scorer, _mean([score.value for score in rows.values()], config)) for scorer, rows in others if rows),
    )


def _control(book: ScoreBook, key: ScoreKey, control: str, config: RunConfig) -> ControlSummary:
    """The control's mean over the features that the arm has a score on, so that the two stand side by side."""
    rows, arm = book.get(key.of(control), {}), book.get(key, {})
    beside = [rows[feature] for feature, score in arm.items() if score.value is not None and feature in rows]
    return ControlSummary(
        control,
        _mean([score.value for score in beside], config),
        _mean([score.false_positives for score in beside], config),
    )


def _compare(book: ScoreBook, first: ScoreKey, second: ScoreKey, config: RunConfig) -> Comparison:
    a, b = _paired(book[first], book[second])
    difference = _mean(list(a - b), config)
    name = second.control or second.explainer
    better = int((a > b).sum())
    return Comparison(first.simulator, first.source, first.explainer, name, difference, is_wide(difference), better)


def _paired(first: Mapping[str, Score], second: Mapping[str, Score]) -> tuple[np.ndarray, np.ndarray]:
    """Values of the features that both sides scored on the same records."""
    shared = sorted(key for key in first.keys() & second.keys() if first[key].settings == second[key].settings)
    pairs = [(first[key].value, second[key].value) for key in shared]
    defined = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)
    return defined[:, 0], defined[:, 1]


def _agree(first: np.ndarray, second: np.ndarray) -> tuple[Interval, str]:
    """Pearson's correlation with the interval of Fisher's z, which needs four points."""
    n = len(first)
    if n < 3:
        return Interval(None, None, None, n), f"{n} feature{'' if n == 1 else 's'} scored by both: three are needed"
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(None, None, None, n), "one simulator gave every feature the same score"
    r = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    if n < 4 or abs(r) == 1:
        return Interval(r, None, None, n), ""
    centre, half = math.atanh(r), 1.96 / math.sqrt(n - 3)
    return Interval(r, math.tanh(centre - half), math.tanh(centre + half), n), ""


def _mean(values: Sequence[float | None], config: RunConfig) -> Interval:
    defined = np.array([value for value in values if value is not None], dtype=float)
    return mean_interval(defined, config.seed, config.score.num_bootstrap)
