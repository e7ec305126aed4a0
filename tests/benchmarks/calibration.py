"""What calibration is worth, and how late interaction compares with the LLM: 50 features of the embedded SAEs.

One run from corpus to lexical explanations, as the demo makes it; then, on valid records, each feature's first rule,
that of another feature and the null texts, by the embedded LLM and by late interaction. The same six log-probabilities
give all three calibrations. A few planted concepts with prose rules come first.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict

import numpy as np
import ray

from rayinterp import embedded, planted
from rayinterp.config import load_config
from rayinterp.controls import by_sae, shuffled_features
from rayinterp.explanation import from_json
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord, load_records
from rayinterp.run import open_run, run_stage
from rayinterp.score import Interval, correlation, mean_interval
from rayinterp.simulate.late_interaction import LateInteractionSimulator
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, RuleRequest, TokenSequence, calibrated, with_nulls
from rayinterp.simulate.transformers import TransformersSimulator
from tests.benchmarks.measure import Row

NAME = "calibration"
FEATURES_PER_SAE, RECORDS_PER_SOURCE, NUM_PLANTED = 30, 4, 8
METHODS = ("none", "difference", "ratio")
Case = tuple[FeatureId, str, str, list[ActivationRecord]]
"""Feature, its rule, a rule of another feature, and valid records."""


def planted_cases() -> list[Case]:
    """The planted features with one rule, on sequences half of which they are active in."""
    rules = ["words about ships and the sea", "bowed string instruments", "citrus fruits"]
    by_rule: dict[str, list[ActivationRecord]] = defaultdict(list)
    for number, document in enumerate(planted.documents(0, num_documents=400)):
        words = document["text"].split()[:16]
        for rule in rules:
            true = 5 * np.array(planted.RULES[rule](words), dtype=np.float32)
            source = "positive" if true.any() else "silent"
            if sum(record.source == source for record in by_rule[rule]) < NUM_PLANTED:
                sequence = TokenSequence(number, tuple(f" {word}" for word in words))
                by_rule[rule].append(ActivationRecord(sequence, number, source, (), true))
    return [(FeatureId("planted", i), rule, rules[(i + 1) % len(rules)], by_rule[rule]) for i, rule in enumerate(rules)]


def real_cases() -> list[Case]:
    """Live features with a lexical explanation."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run_dir={folder}/run", f"subject.features={FEATURES_PER_SAE}"]
        config = load_config("configs/demo.yaml", overrides)
        config = config.model_copy(update={"explainers": {"lexical": config.explainers["lexical"]}})
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        run = open_run(config)
        for stage in ("corpus", "harvest", "index", "records", "explain"):
            run_stage(run, stage)
        rows = run.tables.read("explanations", where="explanation is not null").sort_by("feature_key").to_pylist()
        rules = {FeatureId.parse(row["feature_key"]): from_json(row["explanation"])[0].activates_on for row in rows}
        cases = []
        for feature in sorted(rules):
            (other,) = shuffled_features(feature, by_sae(rules), 1, seed=0)
            valid = load_records(run.tables, feature, ("valid",))["valid"]
            records = [
                record
                for source in ("positive", "random_negative")
                for record in [r for r in valid if r.source == source][:RECORDS_PER_SOURCE]
            ]
            cases.append((feature, rules[feature], rules[other], records))
        ray.shutdown()
        return cases


def score(case: Case, predicted: list[np.ndarray]) -> float | None:
    return correlation(np.concatenate([record.activations for record in case[3]]), np.concatenate(predicted))


def mean(values: list[float | None]) -> Interval:
    """Undefined is left out, as everywhere."""
    return mean_interval(np.array([value for value in values if value is not None]), seed=0)


def agreement(first: list[float | None], second: list[float | None]) -> Interval:
    """Correlation over features of what two simulators gave, features resampled."""
    pairs = np.array([pair for pair in zip(first, second, strict=True) if None not in pair], dtype=float)
    if len(pairs) < 4:
        return Interval(None, None, None, len(pairs))
    picks = np.random.default_rng(0).integers(0, len(pairs), (1000, len(pairs)))
    low, high = np.nanquantile([np.corrcoef(pairs[pick].T)[0, 1] for pick in picks], (0.025, 0.975))
    return Interval(float(np.corrcoef(pairs.T)[0, 1]), float(low), float(high), len(pairs))


def shown(name: str, interval: Interval) -> Row:
    low, high = (f"{end:.2f}" if end is not None else "-" for end in (interval.low, interval.high))
    return Row(f"{name} [{low}, {high}], n = {interval.n}", interval.value, None, None, "correlation", None, None)


def run() -> list[Row]:
    llm = TransformersSimulator(str(embedded.model_path()), dtype="float32", device="cpu", token_budget=512)
    late = LateInteractionSimulator(str(embedded.embedder_path()), device="cpu")
    rows, rates = [], []
    for name, cases in (("planted, prose", planted_cases()), ("real, lexical", real_cases())):
        by_late: list[float | None] = []
        scores: dict[tuple[str, str], list[float | None]] = defaultdict(list)
        for case in cases:
            sequences = tuple(record.sequence for record in case[3])
            requests = [RuleRequest(rule, sequences) for rule in case[1:3]]
            start = time.perf_counter()
            log_probs = llm.log_probs(with_nulls(requests, "difference"))
            middle = time.perf_counter()
            words = late.simulate(requests)
            rates.append((middle - start, time.perf_counter() - middle, len(sequences)))
            for method in METHODS:
                predictions = calibrated(requests, log_probs if method != "none" else log_probs[:2], method)
                for kind, predicted in zip(("true", "shuffled"), predictions, strict=True):
                    scores[method, kind].append(score(case, predicted))
            by_late.append(score(case, words[0]))
            scores["late interaction", "shuffled"].append(score(case, words[1]))
        scores["late interaction", "true"] = by_late
        rows += [shown(f"{name}: {how}, {kind} rule", mean(values)) for (how, kind), values in sorted(scores.items())]
        rows.append(
            shown(f"{name}: the two simulators over features", agreement(scores["difference", "true"], by_late))
        )
    llm_seconds, late_seconds, _ = np.sum(rates, axis=0)
    num_llm, num_late = (sum(pairs * n for *_, n in rates) for pairs in (2 + len(NULL_EXPLANATIONS), 2))
    ours, theirs = num_late / late_seconds, num_llm / llm_seconds
    return [*rows, Row("late interaction against the LLM", ours, theirs, ours / theirs, "pairs/s", None, None)]
