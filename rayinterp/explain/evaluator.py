"""What a search is told of its candidates: scores on train and valid of one feature, cheap looks, falsifiers.

Knows simulators as functions, not Ray; a (rule, sequence) pair is predicted once per search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp.explain import explainer
from rayinterp.explanation import Explanation
from rayinterp.prompts import falsifier_text
from rayinterp.records import ActivationRecord
from rayinterp.score import FALSE_POSITIVE_ABOVE, evaluate
from rayinterp.simulate.simulator import RuleRequest, SimulateAsync, TokenSequence, combine

if TYPE_CHECKING:
    from jaxtyping import Float32


class Evaluation(NamedTuple):
    """How an explanation did on the records of the search."""

    train_score: float | None
    valid_score: float | None
    feedback: str


class Predictions:
    """A simulator that asks for no (rule, sequence) pair twice."""

    def __init__(self, simulate: SimulateAsync) -> None:
        self._simulate = simulate
        self._known: dict[tuple[str, int], Float32[np.ndarray, "seq"]] = {}

    async def of(
        self, explanations: Sequence[Explanation], records: Sequence[ActivationRecord]
    ) -> dict[str, list[Float32[np.ndarray, "seq"]]]:
        """Of every rule of the explanations on every record, all in one request."""
        rules = dict.fromkeys(rule.activates_on for explanation in explanations for rule in explanation)
        missing = {rule: self._missing(rule, records) for rule in rules}
        requests = [RuleRequest(rule, sequences) for rule, sequences in missing.items() if sequences]
        if requests:
            answers = await self._simulate(requests)
            for request, predicted in zip(requests, answers, strict=True):
                for sequence, values in zip(request.sequences, predicted, strict=True):
                    self._known[request.rule, sequence.sequence_id] = values
        return {rule: [self._known[rule, record.sequence.sequence_id] for record in records] for rule in rules}

    def _missing(self, rule: str, records: Sequence[ActivationRecord]) -> tuple[TokenSequence, ...]:
        sequences = {record.sequence.sequence_id: record.sequence for record in records}
        return tuple(sequence for key, sequence in sequences.items() if (rule, key) not in self._known)


class Evaluator:
    """Scores explanations of one feature.

    Args:
        records: By split; `train` grows as the falsifier finds more.
        simulate: The arm's own simulator.
        look: A cheaper one, for looks; None where there are none.
        look_records: Train records of each look.
    """

    def __init__(
        self,
        records: dict[str, list[ActivationRecord]],
        simulate: SimulateAsync,
        num_worst: int,
        look: SimulateAsync | None = None,
        look_records: Sequence[Sequence[ActivationRecord]] = (),
    ) -> None:
        self.train = list(records["train"])
        """As it is now."""
        self.valid, self._num_worst = records["valid"], num_worst
        self._predictions = Predictions(simulate)
        self._looks = Predictions(look) if look else self._predictions
        self._look_records = look_records
        self.falsifiers: list[ActivationRecord] = []
        """What has joined the train set."""

    async def scores(self, explanations: Sequence[Explanation]) -> list[Evaluation]:
        """On train, as it is now, and valid."""
        simulated = await self._predictions.of(explanations, [*self.train, *self.valid])
        return [self._evaluation(explanation, simulated) for explanation in explanations]

    async def looks(self, explanations: Sequence[Explanation], look: int) -> list[float | None]:
        """Train scores by the cheaper simulator, on the records of one look."""
        records = self._look_records[look]
        simulated = await self._looks.of(explanations, records)
        return [evaluate(explanation, records, simulated)[0] for explanation in explanations]

    async def mistaken(self, explanations: Sequence[Explanation], silent: Sequence[ActivationRecord]) -> list[float]:
        """For each silent record the most that any of the explanations wrongly predicts there.

        Returns:
            Sums of what is predicted above a false positive, on the scale of activations; 0 where all are right.
        """
        simulated = await self._predictions.of(explanations, silent)
        worst = [0.0] * len(silent)
        for explanation in explanations:
            for i, values in enumerate(combine(explanation, [simulated[rule.activates_on] for rule in explanation])):
                worst[i] = max(worst[i], float(values[values > FALSE_POSITIVE_ABOVE].sum()))
        return worst

    async def final_scores(
        self, explanations: Sequence[Explanation], silent: Sequence[ActivationRecord]
    ) -> list[float | None]:
        """On valid with silent records of valid documents added to it."""
        records = [*self.valid, *silent]
        simulated = await self._predictions.of(explanations, records)
        return [evaluate(explanation, records, simulated)[0] for explanation in explanations]

    def grow(self, silent: Sequence[ActivationRecord]) -> None:
        """Adds silent records to the train set."""
        self.train += silent
        self.falsifiers += silent

    def _evaluation(self, explanation: Explanation, simulated: dict[str, list[np.ndarray]]) -> Evaluation:
        by_rule = {rule.activates_on: simulated[rule.activates_on] for rule in explanation}
        cut = len(self.train)
        train_score, predicted = evaluate(explanation, self.train, {r: p[:cut] for r, p in by_rule.items()})
        valid_score, _ = evaluate(explanation, self.valid, {r: p[cut:] for r, p in by_rule.items()})
        said = explainer.feedback(train_score, self.train, predicted, self._num_worst)
        return Evaluation(train_score, valid_score, said + self._falsified(predicted))

    def _falsified(self, predicted: Sequence[Float32[np.ndarray, "seq"]]) -> str:
        """The falsifier that this explanation gets most wrong, in words; empty where it gets them right."""
        if not self.falsifiers:
            return ""
        excess = [float(p[p > FALSE_POSITIVE_ABOVE].sum()) for p in predicted[-len(self.falsifiers) :]]
        worst = int(np.argmax(excess))
        if excess[worst] == 0:
            return ""
        record = self.falsifiers[worst]
        return "\n" + falsifier_text(record.sequence.tokens, predicted[len(predicted) - len(excess) + worst].tolist())


def look_records(
    records: Sequence[ActivationRecord], counts: Sequence[int], order: Sequence[int]
) -> list[list[ActivationRecord]]:
    """Train records of each look, half of them positives, each look's among the next one's.

    Args:
        counts: Records of each look; a look may have fewer where there are no more.
        order: A permutation of the records: a look should not see the strongest alone.
    """
    shuffled = [records[i] for i in order]
    positives = [record for record in shuffled if record.source == "positive"]
    others = [record for record in shuffled if record.source != "positive"]
    return [[*positives[: -(-count // 2)], *others[: count // 2]] for count in counts]
