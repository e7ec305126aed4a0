"""What a simulator is: rules and tokens in, a predicted activation from 0 to 5 for every token out.

    rule, sequences -> six log-probabilities per token -> calibrated prediction per rule -> largest over the rules

Everything between an engine and a score is here, as functions of numpy arrays. This module knows nothing of prompts,
models or Ray: an engine is anything with `simulate`, and an LLM engine anything that also gives log-probabilities.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from rayinterp.explanation import MAX_STRENGTH, Explanation, Rule

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Float32

    Prediction = Float32[np.ndarray, "seq"]
    LogProbs = Float[np.ndarray, "seq 6"]

Calibration = Literal["none", "difference", "ratio"]
NUM_DIGITS = MAX_STRENGTH + 1
"""A prediction is read from the probabilities of the digits 0 to 5."""

NULL_EXPLANATIONS = (
    "any token of any text",
    "nothing that these words have in common",
    "pieces of text of no particular kind",
)
"""Explanations that explain nothing: what a simulator predicts from them, it believed before it read the rule."""

CONTROL_NULLS = (
    "something that appears in written language",
    "parts of a sentence chosen without a reason",
    "a pattern that is different every time",
)
"""Null explanations that are graded beside the real ones; never used to calibrate, or they would score 0 by design."""


class TokenSequence(NamedTuple):
    """A sequence as a simulator sees it."""

    sequence_id: int
    """Key of the sequence in the tables, and of its simulations in the memo."""
    tokens: tuple[str, ...]
    """Text of each token in the subject's tokenisation."""


class RuleRequest(NamedTuple):
    """One rule to be simulated on some sequences."""

    rule: str
    sequences: tuple[TokenSequence, ...]


SimulateAsync = Callable[[list[RuleRequest]], Awaitable["list[list[np.ndarray]]"]]
"""A simulator as searches and grading call it, wherever it runs: a prediction per request and sequence."""


class Simulator(Protocol):
    """Predicts activations from rules. Implementations hold a model; callers need not know which or where."""

    def simulate(self, requests: list[RuleRequest]) -> list[list[Prediction]]:
        """Calibrated predictions in 0-5: for each request, one float32 array per sequence."""
        ...


class LogProbEngine(Protocol):
    """A simulator whose predictions come from probabilities of the digits 0 to 5."""

    def log_probs(self, requests: list[RuleRequest]) -> list[list[LogProbs]]:
        """Log-probabilities that no calibration has touched: for each request, one [seq, 6] array per sequence."""
        ...


def rules_to_requests(explanation: Explanation, sequences: Sequence[TokenSequence]) -> list[RuleRequest]:
    """One request per rule; what they give is for `combine`."""
    return [RuleRequest(rule.activates_on, tuple(sequences)) for rule in explanation]


def combine(explanation: Explanation, per_rule_predictions: list[list[Prediction]]) -> list[Prediction]:
    """Prediction of a whole explanation for each sequence: the largest over its rules of strength / 5 * prediction."""
    assert len(explanation) == len(per_rule_predictions), (len(explanation), len(per_rule_predictions))
    weights = [np.float32(rule.strength / MAX_STRENGTH) for rule in explanation]
    return [
        reduce(np.maximum, [weight * prediction for weight, prediction in zip(weights, of_sequence, strict=True)])
        for of_sequence in zip(*per_rule_predictions, strict=True)
    ]


def probabilities(log_probs: Float[np.ndarray, "*batch 6"]) -> Float32[np.ndarray, "*batch 6"]:
    """Probabilities of the digits that add up to 1, whatever the log-probabilities were rounded to."""
    log_probs = log_probs.astype(np.float32)
    odds = np.exp(log_probs - log_probs.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def expected_value(log_probs: Float[np.ndarray, "*batch 6"]) -> Float32[np.ndarray, "*batch"]:
    """Mean of the digit under its probabilities."""
    return probabilities(log_probs) @ np.arange(NUM_DIGITS, dtype=np.float32)


def calibrate(
    rule_log_probs: LogProbs, null_log_probs: Float[np.ndarray, "null seq 6"], method: Calibration
) -> Prediction:
    """Prediction for one rule, less what the simulator believes about the sequence without it.

    Args:
        rule_log_probs: Of the digits at each token, given the rule.
        null_log_probs: The same given each null explanation; not looked at when `method` is none.
        method: `difference` is `clip(E_rule - E_null, 0, 5)`; `ratio` divides the probabilities of the digits and
            takes the expected value of what that gives.
    """
    if method == "none":
        return expected_value(rule_log_probs)
    null = probabilities(null_log_probs).mean(axis=0)
    if method == "difference":
        difference = expected_value(rule_log_probs) - null @ np.arange(NUM_DIGITS, dtype=np.float32)
        return np.clip(difference, 0, MAX_STRENGTH)
    # A digit that underflowed to 0 under the nulls must not become infinitely likely.
    return expected_value(np.log(probabilities(rule_log_probs) + 1e-6) - np.log(null + 1e-6))


def with_nulls(requests: list[RuleRequest], method: Calibration) -> list[RuleRequest]:
    """The requests, and behind them every null explanation on their sequences where the calibration needs it."""
    return requests if method == "none" else [*requests, *null_requests(s for r in requests for s in r.sequences)]


def calibrated(
    requests: list[RuleRequest], answers: list[list[LogProbs]], method: Calibration
) -> list[list[Prediction]]:
    """Predictions for `requests` from the log-probabilities of `with_nulls(requests, method)`."""
    of_sequence: dict[TokenSequence, list[LogProbs]] = {}
    for null, answer in zip(with_nulls(requests, method)[len(requests) :], answers[len(requests) :], strict=True):
        for sequence, values in zip(null.sequences, answer, strict=True):
            of_sequence.setdefault(sequence, []).append(values)
    return [
        [
            calibrate(values, np.asarray(of_sequence.get(sequence, [])), method)
            for sequence, values in zip(request.sequences, answer, strict=True)
        ]
        for request, answer in zip(requests, answers, strict=False)
    ]


def simulate_with(
    log_probs: Callable[[list[RuleRequest]], list[list[LogProbs]]], requests: list[RuleRequest], method: Calibration
) -> list[list[Prediction]]:
    """Calibrated predictions from any source of log-probabilities, which is asked for the nulls in the same call."""
    return calibrated(requests, log_probs(with_nulls(requests, method)), method)


def null_requests(sequences: Iterable[TokenSequence]) -> list[RuleRequest]:
    """Every null explanation on every sequence, each sequence once."""
    unique = tuple(dict.fromkeys(sequences))
    return [RuleRequest(null, unique) for null in NULL_EXPLANATIONS]


def is_usable(log_probs: Float[np.ndarray, "..."]) -> bool:
    """Whether probabilities follow from it at every token, though some digits may be ruled out (-inf)."""
    return bool(np.isfinite(log_probs.reshape(-1, NUM_DIGITS).max(axis=-1)).all())


class MemoKey(NamedTuple):
    """What a simulation is remembered by, within one simulator."""

    rule_hash: str
    sequence_id: int


class Memo:
    """Pairs of one LLM simulator that need not be simulated again, null explanations included.

    Log-probabilities are kept as float16, as the table `simulations` keeps them, and every prediction is made from
    what is kept, so that a resumed run goes on with the numbers of the run that computed them.
    """

    def __init__(self) -> None:
        self._known: dict[MemoKey, Float16[np.ndarray, "seq 6"]] = {}

    def remember(self, key: MemoKey, log_probs: Float[np.ndarray, "..."]) -> None:
        """Takes a simulation; the first one of a pair wins."""
        self._known.setdefault(key, np.asarray(log_probs, dtype=np.float16).reshape(-1, NUM_DIGITS))

    def missing(self, requests: list[RuleRequest]) -> list[RuleRequest]:
        """The part of the requests that is not known, each pair once."""
        wanted: dict[str, dict[MemoKey, TokenSequence]] = {}
        for request in requests:
            for key, sequence in zip(memo_keys(request), request.sequences, strict=True):
                if key not in self._known:
                    wanted.setdefault(request.rule, {})[key] = sequence
        return [RuleRequest(rule, tuple(sequences.values())) for rule, sequences in wanted.items()]

    def add(
        self, requests: list[RuleRequest], answers: list[list[LogProbs]]
    ) -> dict[MemoKey, Float16[np.ndarray, "seq 6"]]:
        """Takes what an engine answered; returns it as it is kept."""
        keys = [key for request in requests for key in memo_keys(request)]
        for key, log_probs in zip(keys, (values for answer in answers for values in answer), strict=True):
            self.remember(key, log_probs)
        return {key: self._known[key] for key in keys}

    def log_probs(self, requests: list[RuleRequest]) -> list[list[LogProbs]]:
        """What is known of requests of which nothing is missing."""
        return [[self._known[key].astype(np.float32) for key in memo_keys(request)] for request in requests]


def memo_keys(request: RuleRequest) -> list[MemoKey]:
    """Of a rule and each of its sequences."""
    rule_hash = Rule(request.rule).hash
    return [MemoKey(rule_hash, sequence.sequence_id) for sequence in request.sequences]
