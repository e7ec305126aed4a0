"""One feature's search from its first question to its end: explainer, evaluator and falsifier around `TreeSearch`.

    TreeSearch --propose--> explainer (an LLM, or the lexical one)     --explained--> TreeSearch
               --look, score--> evaluator (simulators)                 --looked, scored-->
               --rescore--> falsifier grows the train set, evaluator   --rescored-->

All that waits is an awaitable, so that one process runs many searches; nothing here knows Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayinterp.config import (
    FalsifierConfig,
    LexicalConfig,
    LLMConfig,
    OneShotConfig,
    TreeConfig,
    looks_of,
)
from rayinterp.explain import explainer
from rayinterp.explain.evaluator import Evaluator, look_records
from rayinterp.explain.explainer import Call, Outcome
from rayinterp.explain.lexical import lexical_explanation
from rayinterp.explain.search import Node, SearchSettings, Step, TreeSearch
from rayinterp.explanation import Explanation, to_json
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import SimulateAsync
from rayinterp.sources import generator_for

if TYPE_CHECKING:
    from jaxtyping import Float

Arm = LexicalConfig | OneShotConfig | TreeConfig
Propose = Callable[[TreeSearch, Node], Awaitable[Outcome]]
"""Asks an LLM for a root or a revision."""
Silent = Callable[[list[Explanation], str, int], Awaitable[list[ActivationRecord]]]
"""Silent records of a split, nearest to each explanation's own words, so many of each, every sequence once."""


class Search(NamedTuple):
    """What the search of one feature by one arm needs."""

    arm: Arm
    settings: SearchSettings
    records: dict[str, list[ActivationRecord]]
    evaluator: Evaluator
    propose: Propose | None
    """None where the arm has no LLM."""
    silent: Silent | None = None
    """None where nothing falsifies."""


def settings_of(arm: Arm, audited: bool = False) -> SearchSettings:
    """Every explainer is a search: one-shot and lexical are searches of a single root.

    Args:
        audited: Look at all candidates, and let all go on.
    """
    if not isinstance(arm, TreeConfig):
        lexical = isinstance(arm, LexicalConfig)
        return SearchSettings(0 if lexical else 1, lexical, 1, 1, 0, 1.0)
    settings = SearchSettings(
        arm.num_llm_roots,
        arm.lexical_root,
        arm.branching_factor,
        arm.width,
        arm.depth,
        arm.stop_score,
        "best_first" if arm.strategy == "best_first" else "beam",
        falsify=arm.falsifier is not None and arm.falsifier.num_added > 0,
    )
    if arm.cascade:
        return settings._replace(num_looks=1, keep=_EVERYTHING if audited else arm.cascade.keep)
    if arm.strategy == "successive_halving":
        return settings._replace(num_looks=arm.halving.num_looks, eta=arm.halving.eta)
    return settings


_EVERYTHING = 2**31


def prepare_search(
    arm: Arm,
    feature: FeatureId,
    records: dict[str, list[ActivationRecord]],
    simulators: dict[str, SimulateAsync],
    propose: Propose | None,
    silent: Silent | None,
    seed: int,
) -> Search:
    """Puts together what a search needs; all chance comes from (seed, feature).

    Args:
        simulators: By arm name.
    """
    audited = False
    looked: list[list[ActivationRecord]] = []
    looks = looks_of(arm)
    if isinstance(arm, TreeConfig) and arm.cascade:
        audited = generator_for(seed, feature, "cascade").random() < arm.cascade.audit
        looked = [records["train"]]
    elif isinstance(arm, TreeConfig) and looks:
        counts = [arm.halving.num_records * arm.halving.eta**look for look in range(arm.halving.num_looks)]
        order = generator_for(seed, feature, "looks").permutation(len(records["train"]))
        looked = look_records(records["train"], counts, order.tolist())
    num_worst = arm.num_worst_records if isinstance(arm, TreeConfig) else 1
    evaluator = Evaluator(
        records, simulators[arm.simulator], num_worst, simulators[looks[1]] if looks else None, looked
    )
    return Search(arm, settings_of(arm, audited), records, evaluator, propose, silent)


async def search_feature(
    one: Search,
    stopping: Callable[[], bool] = lambda: False,
    on_scored: Callable[[TreeSearch], Awaitable[None]] | None = None,
) -> TreeSearch:
    """Runs one search to its end, or until it is told to stop.

    Args:
        stopping: Asked before each round of proposals: what has been paid for is still scored.
        on_scored: Called as nodes come to their end, with the search.
    """
    search = TreeSearch(one.settings)
    limit = one.arm.time_limit_seconds if isinstance(one.arm, TreeConfig) else float("inf")
    deadline = time.monotonic() + limit
    while steps := search.ask():
        if steps[0].action == "propose":
            reason = "budget" if stopping() else "time_limit" if time.monotonic() > deadline else None
            if reason:
                search.stop(reason)
                break
        await _take(one, search, steps)
        if on_scored:
            await on_scored(search)
    falsifier = _falsifier_of(one)
    if one.silent and falsifier:
        await judge_finalists(one.evaluator, search, one.silent, falsifier)
    return search


async def _take(one: Search, search: TreeSearch, steps: list[Step]) -> None:
    """Answers a batch of steps, all of one action; told in their order, whatever comes first."""
    nodes = [search.nodes[step.node] for step in steps]
    action = steps[0].action
    if action == "propose":
        # All are waited for, also where one fails: what the others are told is paid for, and must reach the ledger.
        outcomes = await asyncio.gather(*(_outcome(one, search, node) for node in nodes), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        for node, outcome in zip(nodes, outcomes, strict=True):
            search.explained(node.node, **outcome._asdict())  # type: ignore[union-attr]
        return
    falsifier = _falsifier_of(one)
    if action == "rescore" and one.silent and falsifier:
        await falsify(one.evaluator, search, one.silent, falsifier)
    explanations = [node.explanation for node in nodes if node.explanation is not None]
    assert len(explanations) == len(nodes), f"{action} without an explanation"
    if action == "look":
        for node, score in zip(nodes, await one.evaluator.looks(explanations, steps[0].look), strict=True):
            search.looked(node.node, score)
        return
    for node, evaluation in zip(nodes, await one.evaluator.scores(explanations), strict=True):
        if action == "score":
            search.scored(node.node, *evaluation)
        else:
            search.rescored(node.node, evaluation.train_score, evaluation.feedback)


async def _outcome(one: Search, search: TreeSearch, node: Node) -> Outcome:
    if node.kind == "lexical":
        explanation = lexical_explanation(one.records["train"], one.arm.rule_cap)
        return Outcome(explanation, "ok" if explanation else "nothing_fires", None, 0, 0, 0.0)
    assert one.propose is not None, "the search asked for an LLM that it was not given"
    return await one.propose(search, node)


async def falsify(evaluator: Evaluator, search: TreeSearch, silent: Silent, config: FalsifierConfig) -> None:
    """Tries what is kept on silent sequences that sound like it; those predicted most wrongly join the train set."""
    explanations = [node.explanation for node in search.kept() if node.explanation is not None]
    drawn = await silent(explanations, "train", config.num_drawn)
    drawn = _not_among(drawn, evaluator.train)
    mistakes = await evaluator.mistaken(explanations, drawn)
    worst = sorted(range(len(drawn)), key=lambda i: (-mistakes[i], drawn[i].sequence.sequence_id))
    evaluator.grow([drawn[i] for i in worst[: config.num_added] if mistakes[i] > 0])


async def judge_finalists(evaluator: Evaluator, search: TreeSearch, silent: Silent, config: FalsifierConfig) -> None:
    """Scores the best on valid once more, where valid holds what sounds like any of them: a rule that is too broad
    shows there, and the same records judge all."""
    finalists = search.finalists(config.num_finalists)
    explanations = [node.explanation for node in finalists if node.explanation is not None]
    if not explanations:
        return
    drawn = _not_among(await silent(explanations, "valid", config.num_valid), evaluator.valid)
    for node, score in zip(finalists, await evaluator.final_scores(explanations, drawn), strict=True):
        node.final_score = score


def _not_among(drawn: list[ActivationRecord], records: Sequence[ActivationRecord]) -> list[ActivationRecord]:
    known = {record.sequence.sequence_id for record in records}
    return [record for record in drawn if record.sequence.sequence_id not in known]


def _falsifier_of(one: Search) -> FalsifierConfig | None:
    return one.arm.falsifier if isinstance(one.arm, TreeConfig) else None


def llm_proposer(
    call: Call,
    llm: LLMConfig,
    arm: OneShotConfig,
    feature: FeatureId,
    records: Sequence[ActivationRecord],
    holistic: Mapping[int, Float[np.ndarray, "seq"]],
    run_seed: int,
) -> Propose:
    """Asks an LLM for roots and revisions of one feature's explanation.

    Args:
        records: Of train.
        holistic: Holistic activations of them, by sequence.
    """
    begin = explainer.first_messages(records, arm, holistic, llm.answer_format)

    async def propose(search: TreeSearch, node: Node) -> Outcome:
        messages, root = begin, [n.node for n in search.nodes if n.kind == "llm"]
        # Roots are numbered among themselves, so that the arms share their answers.
        name = f"root/{root.index(node.node)}" if node.parent is None else f"node/{node.node}"
        for ancestor in search.path(node.node)[:-1]:
            assert ancestor.explanation is not None and ancestor.feedback is not None
            answer = _as_answer(ancestor.explanation, arm.structured)
            messages = explainer.continue_messages(messages, answer, ancestor.feedback, arm, llm.answer_format)
        seed = f"{run_seed}/{feature}/{name}"
        return await explainer.ask(call, llm, messages, arm, seed, str(feature))

    return propose


def _as_answer(explanation: Explanation, structured: bool) -> str:
    """An explanation as the LLM itself would have written it, also where it did not (the lexical root)."""
    return to_json(explanation) if structured else "; ".join(rule.activates_on for rule in explanation)
