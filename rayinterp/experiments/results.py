"""Panels of an experiment: means over features with intervals, from tables alone, and the features behind each mean.

    scores, complexity, explanations, sequences -> Panel (series of Points) -> rows of the table `experiments`

A point averages the features that have a value and counts the others; a difference is paired: taken over the features
that both arms scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayinterp import planted_language
from rayinterp.config import LANGUAGE, RunConfig, TreeConfig, arm_id
from rayinterp.experiments.design import RULE_CAPS, capped_name, template_of
from rayinterp.explain.rows import arm_ids
from rayinterp.explanation import from_json
from rayinterp.feature_id import FeatureId
from rayinterp.grade_plan import count_rule_negatives, graded_sources, settings_of
from rayinterp.rating import rater_id
from rayinterp.report_data import CONTROLS, SCORER, ScoreBook, ScoreKey, score_book
from rayinterp.score import Interval, mean_interval, share_interval
from rayinterp.tables import Tables, sql_in

Values = Mapping[str, float | None]
"""By feature key; None where a feature has no value."""


class Point(NamedTuple):
    """A mean over features at one place of a panel."""

    x: str
    mean: Interval
    values: dict[str, float]
    """What is averaged, by feature key."""
    num_undefined: int
    """Features without a value."""


class Panel(NamedTuple):
    """One plot: several series over the same places."""

    title: str
    x_label: str
    y_label: str
    connected: bool
    """The places have an order: layers, rule caps."""
    series: dict[str, list[Point]]

    @property
    def places(self) -> list[str]:
        """All places, in order of appearance."""
        return list(dict.fromkeys(point.x for points in self.series.values() for point in points))


class Outcome(NamedTuple):
    """What an experiment's arms found, looked up by arm name."""

    config: RunConfig
    simulator: str
    """The one whose scores are read, name@hash."""
    book: ScoreBook
    explainers: dict[str, str]
    """Arm ids by name."""
    complexity: dict[tuple[str, str], dict[str, float | None]]
    """(explainer arm id, measure) to values."""
    features: list[str]
    """Keys of all live features."""

    @property
    def saes(self) -> list[str]:
        """In the order of the config's layers."""
        return sorted({FeatureId.parse(key).sae for key in self.features}, key=_natural)

    @property
    def sources(self) -> tuple[str, ...]:
        return graded_sources(self.config)

    def scores(self, arm: str, source: str) -> Values:
        """Test correlations of an arm."""
        return {key: score.value for key, score in self._graded(arm, source).items()}

    def beside(self, arm: str, source: str, control: str) -> Values:
        """Those of a control, on the features that the arm has a score on."""
        scored = {key for key, value in self.scores(arm, source).items() if value is not None}
        return {key: score.value for key, score in self._graded(arm, source, control).items() if key in scored}

    def false_positives(self, arm: str, source: str) -> Values:
        """Per silent sequence."""
        return {key: score.false_positives for key, score in self._graded(arm, source).items()}

    def measure(self, arm: str, measure: str) -> Values:
        """Of complexity, of the features that this simulator graded."""
        rows = [(key, score) for source in self.sources for key, score in self._graded(arm, source).items()]
        graded = {key for key, score in rows if score.num_records}
        values = self.complexity.get((self.explainers[arm], measure), {})
        return {key: value for key, value in values.items() if key in graded}

    def _graded(self, arm: str, source: str, control: str = "") -> Mapping[str, Any]:
        key = ScoreKey(self.simulator, source, self.explainers[arm], scorer=SCORER)
        return self.book.get(key.of(control) if control else key, {})


def _natural(name: str) -> list[Any]:
    """layer_9 before layer_10."""
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    return [[int(digit) for digit in digits], name]


def read_outcome(config: RunConfig, tables: Tables, simulator: str) -> Outcome:
    """What the tables hold of this config's explainers, graded by one simulator arm."""
    explainers = {name: arm_ids(config, name)[0] for name in config.explainers}
    graded_by = arm_id(simulator, config.simulators[simulator])
    called_for = count_rule_negatives(config, tables)
    scores = tables.read("scores", where=f"simulator = '{graded_by}' and scorer = '{SCORER}'")
    # Explainers that joined later brought records along: what was graded before is not compared with what was after.
    current = [row["settings"] == settings_of(config, called_for[row["feature_key"]]) for row in scores.to_pylist()]
    columns = ["feature_key", "explainer", "simulator", "measure", "value"]
    complexity: dict[tuple[str, str], dict[str, float | None]] = {}
    for row in tables.read("complexity", columns, sql_in("explainer", explainers.values())).to_pylist():
        if row["simulator"] in ("", graded_by, rater_id(config)):
            complexity.setdefault((row["explainer"], row["measure"]), {})[row["feature_key"]] = row["value"]
    return Outcome(
        config,
        graded_by,
        score_book(scores.filter(pa.array(current, pa.bool_()))),
        explainers,
        complexity,
        tables.read("features", ["feature_key"], "status = 'live'")["feature_key"].to_pylist(),
    )


def point(x: str, values: Values, config: RunConfig, is_share: bool = False) -> Point:
    """The mean of the defined values.

    Args:
        is_share: They are 0 or 1.
    """
    defined = {key: value for key, value in sorted(values.items()) if value is not None}
    array = np.array(list(defined.values()), dtype=float)
    mean = share_interval(array) if is_share else mean_interval(array, config.seed, config.score.num_bootstrap)
    return Point(x, mean, defined, len(values) - len(defined))


def difference(first: Values, second: Values) -> Values:
    """First less second; None for features that either has no value of."""
    pairs = {key: (first.get(key), second.get(key)) for key in first.keys() | second.keys()}
    return {key: None if a is None or b is None else a - b for key, (a, b) in pairs.items()}


def of_sae(values: Values, sae: str) -> Values:
    return {key: value for key, value in values.items() if FeatureId.parse(key).sae == sae}


def by_layer(
    outcome: Outcome, title: str, y_label: str, of_series: Mapping[str, Values], without: Iterable[str] = ()
) -> Panel:
    """Means per SAE; one series for each given set of values."""
    series = {
        name: [point(sae, of_sae(values, sae), outcome.config) for sae in outcome.saes]
        for name, values in of_series.items()
        if name not in set(without)
    }
    return Panel(title, "SAE", y_label, True, series)


def by_arm(
    outcome: Outcome,
    title: str,
    y_label: str,
    arms: Sequence[str],
    of: Callable[[str], Mapping[str, Values]],
    is_share: bool = False,
) -> Panel:
    """Means per explainer arm; `of` gives an arm's series."""
    series: dict[str, list[Point]] = {}
    for arm in arms:
        for name, values in of(arm).items():
            series.setdefault(name, []).append(point(arm, values, outcome.config, is_share))
    return Panel(title, "explainer", y_label, False, series)


CORRELATION, FALSE_POSITIVES = "test correlation", "false positives per silent sequence"
DIFFERENCE = "paired difference of test correlations"


def complementary_sources(outcome: Outcome, tables: Tables) -> list[Panel]:
    panels = []
    for arm in outcome.explainers:
        scores = {source: outcome.scores(arm, source) for source in outcome.sources}
        panels.append(by_layer(outcome, f"{arm}: score by source", CORRELATION, scores))
    for arm in outcome.explainers:
        wrong = {source: outcome.false_positives(arm, source) for source in outcome.sources}
        panels.append(by_layer(outcome, f"{arm}: false positives by source", FALSE_POSITIVES, wrong))
    return panels


def explainer_comparison(outcome: Outcome, tables: Tables) -> list[Panel]:
    arms, sources = list(outcome.explainers), _hardest(outcome)
    scores = by_arm(outcome, "Score", CORRELATION, arms, lambda arm: {s: outcome.scores(arm, s) for s in sources})
    for source, points in scores.series.items():
        beside = {control: outcome.beside("one_shot", source, control) for control in CONTROLS}
        points += [point(f"{control} (control)", values, outcome.config) for control, values in beside.items()]

    def less(base: str, arm: str) -> dict[str, Values]:
        return {source: difference(outcome.scores(arm, source), outcome.scores(base, source)) for source in sources}

    def is_tree(arm: str) -> bool:
        return isinstance(outcome.config.explainers[arm], TreeConfig)

    others = [arm for arm in arms if arm != "one_shot" and not is_tree(arm)]
    pairs = {arm: arm.replace("tree", "one_shot", 1) for arm in arms if is_tree(arm)}
    searched = [arm for arm, single in pairs.items() if single in outcome.explainers]
    trees = [arm for arm in arms if is_tree(arm) and arm != "tree"]
    return [
        scores,
        by_arm(outcome, "Less one_shot (structured)", DIFFERENCE, others, lambda arm: less("one_shot", arm)),
        by_arm(outcome, "Tree less one_shot of the same form", DIFFERENCE, searched, lambda arm: less(pairs[arm], arm)),
        by_arm(outcome, "Less tree (structured)", DIFFERENCE, trees, lambda arm: less("tree", arm)),
    ]


def polysemanticity(outcome: Outcome, tables: Tables) -> list[Panel]:
    template = template_of(outcome.config)
    caps = sorted({*RULE_CAPS, template.rule_cap})
    source = _hardest(outcome)[0]
    panels = []
    for method in ("one_shot", "tree"):
        arms = {cap: capped_name(method, cap, template) for cap in caps}
        for title, y_label, of in (
            (f"{method}: score by rule cap", CORRELATION, lambda arm: outcome.scores(arm, source)),
            (f"{method}: rules used", "rules of the winner", lambda arm: outcome.measure(arm, "num_rules")),
        ):
            panels.append(_by_cap(outcome, title, y_label, {cap: of(arm) for cap, arm in arms.items()}))
        scores = {cap: outcome.scores(arm, source) for cap, arm in arms.items()}
        less_one = {cap: difference(values, scores[1]) for cap, values in scores.items() if cap > 1}
        panels.append(_by_cap(outcome, f"{method}: less a cap of 1", DIFFERENCE, less_one))
    return [*panels, *_complexities(outcome, ["one_shot", "tree"])]


def _by_cap(outcome: Outcome, title: str, y_label: str, values: Mapping[int, Values]) -> Panel:
    series = {
        sae: [point(str(cap), of_sae(of_cap, sae), outcome.config) for cap, of_cap in values.items()]
        for sae in outcome.saes
    }
    return Panel(title, "rule cap", y_label, True, series)


def layer_sweep(outcome: Outcome, tables: Tables) -> list[Panel]:
    arms = ["one_shot", "tree"]
    scores = [
        by_layer(
            outcome, f"Score under {source}", CORRELATION, {arm: outcome.scores(arm, source) for arm in arms} | controls
        )
        for source in _hardest(outcome)
        for controls in ({c: outcome.beside("one_shot", source, c) for c in CONTROLS},)
    ]
    rules = {arm: outcome.measure(arm, "num_rules") for arm in arms}
    return [*scores, by_layer(outcome, "Rules", "rules of the winner", rules), *_complexities(outcome, arms)]


MEASURES = {
    "num_rules_95": "rules that carry 95 % of the valid score",
    "rule_overlap": "overlap of the rules' activations",
    "num_words": "words",
    "rating": "complexity as an LLM rates it (0-5)",
}
"""Of complexity, as figures name them; those that no feature has are left out."""


def _complexities(outcome: Outcome, arms: Sequence[str]) -> list[Panel]:
    panels = []
    for measure, label in MEASURES.items():
        values = {arm: outcome.measure(arm, measure) for arm in arms}
        if any(value is not None for of_arm in values.values() for value in of_arm.values()):
            panels.append(by_layer(outcome, label[0].upper() + label[1:], label, values))
    return panels


def planted(outcome: Outcome, tables: Tables) -> list[Panel]:
    arms, found = list(outcome.explainers), recovered(outcome, tables)
    return [
        by_arm(
            outcome,
            "Truth recovered",
            "share of features",
            arms,
            lambda a: {s: of_sae(found[a], s) for s in outcome.saes},
            is_share=True,
        ),
        by_arm(
            outcome,
            "Score by source",
            CORRELATION,
            arms,
            lambda a: {s: outcome.scores(a, s) for s in _by_resistance(outcome)},
        ),
        by_arm(
            outcome,
            "False positives by source",
            FALSE_POSITIVES,
            arms,
            lambda a: {s: outcome.false_positives(a, s) for s in _by_resistance(outcome)},
        ),
    ]


def recovered(outcome: Outcome, tables: Tables) -> dict[str, dict[str, float | None]]:
    """For each arm: 1 for a feature whose explanation fires on exactly its test tokens, 0 for any other or none usable.

    None where the explainer was not asked, or did not answer.
    """
    assert outcome.config.subject.model == LANGUAGE, outcome.config.subject.model
    ids = tables.read("sequences", ["token_ids"], "split = 'test'")["token_ids"].combine_chunks()
    words = ids.flatten().to_numpy().reshape(len(ids), -1)
    names = {arm: name for name, arm in outcome.explainers.items()}
    found: dict[str, dict[str, float | None]] = {name: {} for name in outcome.explainers}
    where = sql_in("explainer", outcome.explainers.values())
    columns = ["feature_key", "explainer", "explanation", "status"]
    for row in tables.read("explanations", columns, where).to_pylist():
        feature = FeatureId.parse(row["feature_key"])
        truth = planted_language.FEATURES[feature.sae][feature.index]
        explanation = from_json(row["explanation"]) if row["explanation"] else None
        hit = explanation is not None and planted_language.recovers(explanation, truth, words)
        asked = explanation is not None or row["status"] == "no_explanation"
        found[names[row["explainer"]]][row["feature_key"]] = float(hit) if asked else None
    return found


def _hardest(outcome: Outcome) -> list[str]:
    """The paper's own source where it is graded, and the explanation's own words."""
    hard = [source for source in ("similar_negative", "rule_negative") if source in outcome.sources]
    return hard or list(outcome.sources[:1])


def _by_resistance(outcome: Outcome) -> list[str]:
    """The sources by which a claim that is too broad is told, the one that resists least before them."""
    easy = [source for source in ("random_negative",) if source in outcome.sources]
    return list(dict.fromkeys([*easy, *_hardest(outcome)]))


PANELS: dict[str, Callable[[Outcome, Tables], list[Panel]]] = {
    "complementary_sources": complementary_sources,
    "explainer_comparison": explainer_comparison,
    "polysemanticity": polysemanticity,
    "layer_sweep": layer_sweep,
    "planted": planted,
}


def result_rows(experiment: str, outcome: Outcome, panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Rows of `experiments`: one for each point."""
    repeated = [title for title, count in Counter(panel.title for panel in panels).items() if count > 1]
    assert not repeated, repeated
    return [
        {
            "experiment": experiment,
            "simulator": outcome.simulator,
            "panel": panel.title,
            "quantity": panel.y_label,
            "series": name,
            "x": one.x,
            "value": one.mean.value,
            "ci_low": one.mean.low,
            "ci_high": one.mean.high,
            "num_features": one.mean.n,
            "num_undefined": one.num_undefined,
        }
        for panel in panels
        for name, points in panel.series.items()
        for one in points
    ]
