"""Which search finds what is planted: all of them with one blind proposer, the same number of its calls, 20 seeds.

Prints tables: test correlation by kind of feature, what each search took, and what winners may be chosen on.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from rayinterp.config import FalsifierConfig, HalvingConfig, OneShotConfig, TreeConfig
from rayinterp.explain.explainer import Outcome
from rayinterp.explain.feature import Arm, Propose, Search, prepare_search, search_feature
from rayinterp.explain.planted_llm import Firing, Guesser
from rayinterp.explain.search import Node, TreeSearch
from rayinterp.explanation import Explanation
from rayinterp.feature_id import FeatureId
from rayinterp.planted_language import DISTANCE, KINDS, strength
from rayinterp.records import ActivationRecord
from rayinterp.score import correlation, evaluate, false_positives_per_sequence, mean_interval
from rayinterp.simulate.simulator import SimulateAsync, rules_to_requests
from tests.benchmarks import _planted_language as language
from tests.benchmarks.measure import Row

if TYPE_CHECKING:
    from jaxtyping import Float

NAME = "strategies"
SEEDS, PER_KIND = 20, 2
COUNTS = {"train": 10, "valid": 10, "test": 30}
"""Positives, and as many random negatives, by split."""
NUM_RULE_NEGATIVES = 4
"""Per explanation that is graded."""

BEAM = TreeConfig(
    llm="blind", simulator="oracle", lexical_root=False, num_llm_roots=6, branching_factor=2, width=3, depth=3,
    stop_score=1.0,
)  # fmt: skip
"""6 roots and 3 x 3 x 2 revisions: 24 calls."""
NUM_CALLS = 24
BEST_FIRST = BEAM.model_copy(update={"strategy": "best_first"})
HALVING = BEAM.model_copy(
    update={"strategy": "successive_halving", "halving": HalvingConfig(simulator="cheap", num_looks=1)}
)
WIDE_HALVING = HALVING.model_copy(update={"num_llm_roots": 12, "branching_factor": 4})
"""Twice the calls; after the looks as many candidates are scored as the beam scores."""
FALSIFIED = {"falsifier": FalsifierConfig(num_finalists=0)}
JUDGED = {"falsifier": FalsifierConfig()}
"""The finalists are attacked on valid too."""
ONLY_JUDGED = {"falsifier": FalsifierConfig(num_added=0)}
METHODS: dict[str, Arm] = {
    "one_shot": OneShotConfig(llm="blind", simulator="oracle"),
    "best of 24": BEAM.model_copy(update={"num_llm_roots": NUM_CALLS, "depth": 0}),
    "beam": BEAM,
    "beam, falsifier": BEAM.model_copy(update=FALSIFIED),
    "beam, finalists": BEAM.model_copy(update=ONLY_JUDGED),
    "beam, falsifier, finalists": BEAM.model_copy(update=JUDGED),
    "best_first": BEST_FIRST,
    "best_first, falsifier": BEST_FIRST.model_copy(update=FALSIFIED),
    "best_first, falsifier, finalists": BEST_FIRST.model_copy(update=JUDGED),
    "halving": HALVING,
    "halving, falsifier": HALVING.model_copy(update=FALSIFIED),
    "halving of 48": WIDE_HALVING,
    "halving of 48, falsifier": WIDE_HALVING.model_copy(update=FALSIFIED),
    "halving of 48, finalists": WIDE_HALVING.model_copy(update=ONLY_JUDGED),
    "halving of 48, falsifier, finalists": WIDE_HALVING.model_copy(update=JUDGED),
}
CHOICES = ("valid", "near ties by train", "valid + falsifiers", "valid + train")
"""On what the winner may be chosen; train as the falsifier left it."""
NEAR = 0.02
"""Valid scores that count as near ties."""


class Found(NamedTuple):
    """What a search ended with, and what it took."""

    explanation: Explanation
    by_choice: dict[str, Explanation]
    """The winner, had it been chosen otherwise."""
    candidates: list[Explanation]
    """All that were scored."""
    calls: int
    pairs: int
    cheap_pairs: int


class BlindProposer:
    """The planted language's LLM without its prompts: the same guesses, whichever search asks."""

    def __init__(self, train: Iterable[ActivationRecord], seed: int) -> None:
        self._seed, self.calls = seed, 0
        self._guesser = Guesser(
            [
                Firing(tokens[i], tokens[max(0, i - DISTANCE) : i], float(record.activations[i]))
                for record in train
                for tokens in (record.sequence.tokens,)
                for i in np.flatnonzero(record.activations)
            ]
        )

    async def __call__(self, search: TreeSearch, node: Node) -> Outcome:
        self.calls += 1
        rng = np.random.default_rng([self._seed, node.node])
        if node.parent is None:
            explanation = self._guesser.root(rng)
        else:
            parent = search.nodes[node.parent]
            assert parent.explanation is not None and parent.feedback is not None
            explanation = self._guesser.revision(parent.explanation, parent.feedback, rng)
        return Outcome(explanation, "ok", None, 0, 0, None)


async def find(
    planted: language.Planted, records: dict[str, list[ActivationRecord]], arm: Arm, propose: Propose | None = None
) -> tuple[Found, Search, TreeSearch]:
    """Searches for one planted feature, by default with the blind proposer."""
    oracle, cheap = language.Oracle(language.NOISE), language.Oracle(language.CHEAP_NOISE)
    proposer = BlindProposer(records["train"], zlib.crc32(f"{planted.seed} {planted.number}".encode()))

    async def silent(explanations: list[Explanation], split: str, count: int) -> list[ActivationRecord]:
        drawn = [r for e in explanations for r in planted.pools[split].rule_negatives(e, count)]
        return list({record.sequence.sequence_id: record for record in drawn}.values())

    feature = FeatureId("planted", planted.number)
    simulators: dict[str, SimulateAsync] = {"oracle": oracle, "cheap": cheap}
    one = prepare_search(arm, feature, records, simulators, propose or proposer, silent, planted.seed)
    search = await search_feature(one)
    pairs, winner = oracle.pairs, search.winner()
    assert winner and winner.explanation
    candidates = [node.explanation for node in search.nodes if node.valid_score is not None and node.explanation]
    found = Found(winner.explanation, await choose(one, search), candidates, proposer.calls, pairs, cheap.pairs)
    return found, one, search


async def choose(one: Search, search: TreeSearch) -> dict[str, Explanation]:
    """Winners by what they are chosen on, in the order of CHOICES; the earlier of equals."""
    nodes = [node for node in search.nodes if node.valid_score is not None and node.explanation]
    valid, falsifiers, train = one.records["valid"], one.evaluator.falsifiers, one.evaluator.train
    oracle = language.Oracle(language.NOISE)
    keys = {choice: [] for choice in CHOICES}
    top = max(node.valid_score or 0.0 for node in nodes)
    for node in nodes:
        assert node.explanation and node.valid_score is not None
        grown = await score(node.explanation, train, oracle)
        keys["valid"].append((node.valid_score,))
        keys["near ties by train"].append((node.valid_score >= top - NEAR, grown))
        keys["valid + falsifiers"].append((await score(node.explanation, [*valid, *falsifiers], oracle),))
        keys["valid + train"].append((await score(node.explanation, [*valid, *train], oracle),))
    best = {choice: max(range(len(nodes)), key=lambda i: (*of[i], -i)) for choice, of in keys.items()}
    return {choice: nodes[i].explanation or () for choice, i in best.items()}


async def predict(explanation: Explanation, records: list[ActivationRecord], oracle: language.Oracle) -> dict:
    requests = rules_to_requests(explanation, [record.sequence for record in records])
    return dict(zip([request.rule for request in requests], await oracle(requests), strict=True))


async def score(explanation: Explanation, records: list[ActivationRecord], oracle: language.Oracle) -> float:
    return evaluate(explanation, records, await predict(explanation, records, oracle))[0] or 0.0


class Grade(NamedTuple):
    """An explanation on test."""

    correlation: float
    """On all sources."""
    by_source: dict[str, float]
    """On the positives and one source."""
    recovered: float
    false_positives: float
    """Per rule negative."""


async def grade(
    planted: language.Planted, test: list[ActivationRecord], explanations: Iterable[Explanation]
) -> dict[Explanation, Grade]:
    """All explanations of a feature on the same records, the rule negatives that any of them calls for among them."""
    pool, wanted = planted.pools["test"], list(dict.fromkeys(explanations))
    rule = {r.sequence.sequence_id: r for e in wanted for r in pool.rule_negatives(e, NUM_RULE_NEGATIVES)}
    records = [*test, *planted.similar("test", COUNTS["test"]), *rule.values()]
    true = [record.activations for record in records]
    grades = {}
    for explanation in wanted:
        simulated = await predict(explanation, records, language.Oracle(language.NOISE))
        value, predicted = evaluate(explanation, records, simulated)
        by_source = {}
        for source in ("random_negative", "similar_negative", "rule_negative"):
            part = [i for i, record in enumerate(records) if record.source in ("positive", source)]
            both = (np.concatenate([values[i] for i in part]) for values in (true, predicted))
            by_source[source] = correlation(*both) or 0.0
        wrong = false_positives_per_sequence(true[-len(rule) :], predicted[-len(rule) :])
        grades[explanation] = Grade(value or 0.0, by_source, recovers(explanation, planted), wrong or 0.0)
    return grades


def recovers(explanation: Explanation, planted: language.Planted) -> float:
    """1 where it fires on exactly the test tokens on which the feature does."""
    pool = planted.pools["test"]
    return float(np.array_equal(strength(explanation, pool.words) > 0, pool.activations > 0))


class Result(NamedTuple):
    """One method on one feature."""

    kind: str
    found: Found
    grade: Grade
    by_choice: dict[str, Grade]
    reached: float
    """1 where any candidate recovers the feature."""


async def compare(planted: language.Planted, similar: bool = False) -> dict[str, Result]:
    """All methods on one feature."""
    records = planted.records(COUNTS, similar)
    found = {name: (await find(planted, records, arm))[0] for name, arm in METHODS.items()}
    test = planted.records(COUNTS)["test"]
    wanted = [e for one in found.values() for e in (one.explanation, *one.by_choice.values())]
    grades = await grade(planted, test, wanted)
    exact = {e: recovers(e, planted) for e in {e for one in found.values() for e in one.candidates}}
    return {
        name: Result(
            planted.kind,
            one,
            grades[one.explanation],
            {choice: grades[e] for choice, e in one.by_choice.items()},
            max(exact[e] for e in one.candidates),
        )
        for name, one in found.items()
    }


def collect(num_seeds: int = SEEDS, similar: bool = False) -> dict[str, list[Result]]:
    """Results by method, features in the same order."""
    results: dict[str, list[Result]] = {name: [] for name in METHODS}
    for seed in range(num_seeds):
        for number in range(PER_KIND * len(KINDS)):
            planted = language.plant(KINDS[number % len(KINDS)], seed, number)
            for name, result in asyncio.run(compare(planted, similar)).items():
                results[name].append(result)
    return results


def said(values: Iterable[float], digits: int = 3) -> str:
    interval = mean_interval(np.array(list(values)), seed=0)
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def tables(results: dict[str, list[Result]]) -> list[Table]:
    """Test correlations by kind; what else there is to say of each method; what winners may be chosen on."""
    by_kind = Table("method", *KINDS, "all", "less beam", title="correlation on all sources of test")
    rest = Table("method", "calls", "pairs", "cheap pairs", "reached", "recovered", *KINDS, "false positives",
                 "random", "similar", "rule negative", title="means; the last three are correlations")  # fmt: skip
    chosen = Table("method", *CHOICES, "that less beam", title="correlation by what the winner is chosen on")
    recovered = Table("method", *CHOICES, title="recovered by what the winner is chosen on")
    beam = scores(results["beam"])
    for name, of in results.items():
        kinds = [np.array([result.kind == kind for result in of]) for kind in KINDS]
        values = scores(of)
        by_kind.add_row(name, *(said(values[kind]) for kind in kinds), said(values), said(values - beam))
        exact = np.array([result.grade.recovered for result in of])
        takes = np.mean([(r.found.calls, r.found.pairs, r.found.cheap_pairs) for r in of], axis=0)
        sources = np.mean([[*result.grade.by_source.values()] for result in of], axis=0)
        wrong = said((result.grade.false_positives for result in of), 2)
        of_kind = [f"{exact[kind].mean():.2f}" for kind in kinds]
        rest.add_row(
            name,
            *(f"{n:.0f}" for n in takes),
            f"{np.mean([result.reached for result in of]):.2f}",
            said(exact, 2),
            *of_kind,
            wrong,
            *(f"{value:.3f}" for value in sources),
        )
        first = np.array([result.by_choice[CHOICES[0]].correlation for result in of])
        others = [np.array([r.by_choice[c].correlation for r in of]) - first for c in CHOICES[1:]]
        chosen.add_row(name, f"{first.mean():.3f}", *(said(other) for other in others), said(first + others[-1] - beam))
        recovered.add_row(name, *(f"{np.mean([r.by_choice[c].recovered for r in of]):.2f}" for c in CHOICES))
    return [by_kind, rest, chosen, recovered]


def scores(results: list[Result]) -> Float[np.ndarray, "features"]:
    return np.array([result.grade.correlation for result in results])


def run() -> list[Row]:
    results = collect()
    for table in tables(results):
        Console(width=max(Console().width, 180)).print(table)
    baseline = float(scores(results["best of 24"]).mean())
    rows = []
    for name, of in results.items():
        ours = float(scores(of).mean())
        rows.append(Row(f"test score: {name}", ours, baseline, ours / baseline, "correlation", None, None))
    return rows
