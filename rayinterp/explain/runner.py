"""Many searches at once: where explainers, simulators and LLMs meet. Writes `candidates` and `explanations`.

    driver --features--> SearchActor (several features at a time each)
                             | propose: LLM (Serve replica or endpoint), through the ledger `llm_calls`
                             | evaluate: simulator replica, a whole candidate per request
                             v
                         committer: nodes, then the winner, whose row marks the feature as finished

A feature's arms run one after another, so that equal requests of two arms are paid for once.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
import ray
from pydantic import SecretStr

from rayinterp.config import (
    CascadeConfig,
    LexicalConfig,
    LLMConfig,
    OneShotConfig,
    RunConfig,
    TreeConfig,
    arm_id,
    content_of,
    service_name,
    simulators_of,
)
from rayinterp.errors import UserError
from rayinterp.explain import explainer
from rayinterp.explain.client import Generate, Ledger, api_key, openai_client, scripted_client
from rayinterp.explain.explainer import Call, Outcome
from rayinterp.explain.lexical import lexical_explanation
from rayinterp.explain.local import served_client
from rayinterp.explain.search import Node, SearchSettings, TreeSearch
from rayinterp.explanation import Explanation, to_json
from rayinterp.progress import Progress, silent
from rayinterp.records import ActivationRecord, load_records
from rayinterp.score import evaluate
from rayinterp.simulate.client import SimulateAsync, SimulatorClient
from rayinterp.simulate.simulator import RuleRequest
from rayinterp.sources import generator_for
from rayinterp.subject import FeatureId, interleave
from rayinterp.tables import Tables, sql_in

MAX_FAILURES = 5
"""Features that an LLM fails on before the stage stops asking it."""


class Evaluation(NamedTuple):
    """How an explanation did on the records of the search."""

    train_score: float | None
    valid_score: float | None
    feedback: str


class Evaluator:
    """Scores explanations of one feature on train and valid; a rule already simulated is not simulated again."""

    def __init__(self, records: dict[str, list[ActivationRecord]], simulate: SimulateAsync, num_worst: int) -> None:
        self._records, self._simulate, self._num_worst = records, simulate, num_worst
        self._sequences = tuple(record.sequence for split in ("train", "valid") for record in records[split])
        self._simulated: dict[str, list[np.ndarray]] = {}

    async def __call__(self, explanation: Explanation) -> Evaluation:
        await self._simulate_rules(explanation)
        train, valid = self._records["train"], self._records["valid"]
        train_score, predicted = self._score(explanation, slice(0, len(train)), train)
        valid_score, _ = self._score(explanation, slice(len(train), None), valid)
        return Evaluation(train_score, valid_score, explainer.feedback(train_score, train, predicted, self._num_worst))

    async def train_score(self, explanation: Explanation) -> float | None:
        """The score alone, for a first look."""
        await self._simulate_rules(explanation)
        train = self._records["train"]
        return self._score(explanation, slice(0, len(train)), train)[0]

    def _score(self, explanation: Explanation, part: slice, records: list[ActivationRecord]) -> Any:
        return evaluate(explanation, records, {rule: p[part] for rule, p in self._simulated.items()})

    async def _simulate_rules(self, explanation: Explanation) -> None:
        new = [rule.activates_on for rule in explanation if rule.activates_on not in self._simulated]
        new = list(dict.fromkeys(new))
        if new:
            predictions = await self._simulate([RuleRequest(rule, self._sequences) for rule in new])
            self._simulated.update(zip(new, predictions, strict=True))


def settings_of(arm: LexicalConfig | OneShotConfig | TreeConfig, has_llm: bool) -> SearchSettings:
    """Every explainer is a search: one-shot and lexical are searches of a single root."""
    if isinstance(arm, TreeConfig):
        if not has_llm:
            return SearchSettings(0, arm.lexical_root, 1, 1, 0, arm.stop_score)
        return SearchSettings(
            arm.num_llm_roots, arm.lexical_root, arm.branching_factor, arm.width, arm.depth, arm.stop_score
        )
    lexical = isinstance(arm, LexicalConfig)
    return SearchSettings(0 if lexical or not has_llm else 1, lexical, 1, 1, 0, 1.0)


class Cascade(NamedTuple):
    """A cheaper look at candidates."""

    score: Callable[[Explanation], Awaitable[float | None]]
    """Train correlation by the cheap simulator."""
    keep: int
    """Candidates of a round that go on to the arm's own."""


async def search_feature(
    arm: LexicalConfig | OneShotConfig | TreeConfig,
    records: dict[str, list[ActivationRecord]],
    evaluate: Callable[[Explanation], Awaitable[Evaluation]],
    propose: Callable[[TreeSearch, Node], Awaitable[Outcome]] | None,
    cascade: Cascade | None = None,
) -> TreeSearch:
    """Runs one search to its end.

    Args:
        propose: Asks the LLM for a root or a revision; None where there is no LLM (or no budget for it).
    """
    search = TreeSearch(settings_of(arm, propose is not None))
    deadline = time.monotonic() + arm.time_limit_seconds if isinstance(arm, TreeConfig) else float("inf")

    async def outcome_of(node: Node) -> Outcome:
        if node.kind == "lexical":
            explanation = lexical_explanation(records["train"], arm.rule_cap)
            return Outcome(explanation, "ok" if explanation else "nothing_fires", None, 0, 0, 0.0)
        assert propose is not None, "the search asked for an LLM that it was not given"
        return await propose(search, node)

    async def simulate(node: int, outcome: dict[str, Any]) -> None:
        evaluation = await evaluate(outcome["explanation"])
        status = "ok" if evaluation.train_score is not None else "undefined"
        search.tell(node, **{**outcome, "status": status}, **evaluation._asdict())

    while proposals := search.ask():
        if time.monotonic() > deadline:
            search.stop()
            break
        waiting: list[tuple[int, dict[str, Any]]] = []
        # One after another: whether a candidate is a duplicate must not depend on which answer comes first.
        for proposal in proposals:
            outcome = (await outcome_of(search.nodes[proposal.node]))._asdict()
            explanation = outcome["explanation"]
            if explanation is None:
                search.tell(proposal.node, **outcome)
            elif search.seen(explanation) or any(explanation == other["explanation"] for _, other in waiting):
                search.tell(proposal.node, **{**outcome, "status": "duplicate"})
            elif cascade is None:
                await simulate(proposal.node, outcome)
            else:
                waiting.append((proposal.node, {**outcome, "cascade_score": await cascade.score(explanation)}))
        for place, (node, outcome) in enumerate(sorted(waiting, key=_best_first)):
            if cascade is not None and place >= cascade.keep:
                search.tell(node, **{**outcome, "status": "pruned"})
            else:
                await simulate(node, outcome)
    return search


def cascade_of(
    config: CascadeConfig,
    feature: FeatureId,
    records: dict[str, list[ActivationRecord]],
    simulate: SimulateAsync,
    seed: int,
) -> Cascade:
    """The first look of one feature's searches, at train records alone; on an audited feature nothing is pruned."""
    evaluator = Evaluator({"train": records["train"], "valid": []}, simulate, 1)

    async def score(explanation: Explanation) -> float | None:
        return await evaluator.train_score(explanation)

    audited = generator_for(seed, feature, "cascade").random() < config.audit
    return Cascade(score, sys.maxsize if audited else config.keep)


def _best_first(waiting: tuple[int, dict[str, Any]]) -> tuple[float, int]:
    """What the cheap simulator gives no score at all comes last."""
    node, outcome = waiting
    score = outcome["cascade_score"]
    return (float("inf") if score is None else -score, node)


def llm_proposer(
    call: Call,
    llm: LLMConfig,
    arm: OneShotConfig,
    feature: FeatureId,
    records: list[ActivationRecord],
    run_seed: int,
) -> Callable[[TreeSearch, Node], Awaitable[Outcome]]:
    """Asks an LLM for roots and revisions of one feature's explanation."""
    begin = explainer.first_messages(records, arm)

    async def propose(search: TreeSearch, node: Node) -> Outcome:
        messages, root = begin, [n.node for n in search.nodes if n.kind == "llm"]
        # Roots are numbered among themselves, so that the arms share their answers.
        name = f"root/{root.index(node.node)}" if node.parent is None else f"node/{node.node}"
        for ancestor in search.path(node.node)[:-1]:
            assert ancestor.explanation is not None and ancestor.feedback is not None
            answer = _as_answer(ancestor.explanation, arm.structured)
            messages = explainer.continue_messages(messages, answer, ancestor.feedback, arm)
        seed = f"{run_seed}/{feature}/{name}"
        return await explainer.ask(call, llm, messages, arm, seed, str(feature))

    return propose


def _as_answer(explanation: Explanation, structured: bool) -> str:
    """An explanation as the LLM itself would have written it, also where it did not (the lexical root)."""
    return to_json(explanation) if structured else "; ".join(rule.activates_on for rule in explanation)


def arm_ids(config: RunConfig, name: str) -> tuple[str, str]:
    """The explainer's and its simulator's names in the tables; the first covers all that an explanation depends on."""
    arm = config.explainers[name]
    simulator = config.simulators[arm.simulator]
    context = [
        {k: v for k, v in content_of(config.simulators[asked]).items() if k not in _GRADING}
        for asked in simulators_of(arm)
    ]
    if isinstance(arm, OneShotConfig):
        context.append(content_of(config.llms[arm.llm]))
    return arm_id(name, arm, *context), arm_id(arm.simulator, simulator)


_GRADING = {"num_features", "max_records", "max_pairs"}
"""Fields of a simulator arm that play no part in a search."""


def candidate_rows(feature: FeatureId, ids: tuple[str, str], search: TreeSearch) -> list[dict[str, Any]]:
    return [
        {
            "feature_key": str(feature),
            "explainer": ids[0],
            "simulator": ids[1],
            "node": node.node,
            "parent": node.parent,
            "depth": node.depth,
            "kind": node.kind,
            "explanation": None if node.explanation is None else to_json(node.explanation),
            "status": node.status,
            "cascade_score": node.cascade_score,
            "train_score": node.train_score,
            "valid_score": node.valid_score,
            "thought": node.thought,
            "feedback": None if node.parent is None else search.nodes[node.parent].feedback,
            "prompt_tokens": node.prompt_tokens,
            "completion_tokens": node.completion_tokens,
            "cost_usd": node.cost_usd,
        }
        for node in search.nodes
    ]


def explanation_row(
    feature: FeatureId, ids: tuple[str, str], search: TreeSearch | None, status: str | None = None
) -> dict[str, Any]:
    """The winner, or why there is none."""
    winner = search.winner() if search else None
    costs = [node.cost_usd for node in search.nodes if node.prompt_tokens] if search else []
    return {
        "feature_key": str(feature),
        "sae": feature.sae,
        "feature": feature.index,
        "explainer": ids[0],
        "simulator": ids[1],
        "explanation": to_json(winner.explanation) if winner and winner.explanation else None,
        "train_score": winner.train_score if winner else None,
        "valid_score": winner.valid_score if winner else None,
        "num_candidates": len(search.nodes) if search else 0,
        "status": status or ("ok" if winner else "no_explanation"),
        "cost_usd": None if any(cost is None for cost in costs) else sum(c for c in costs if c is not None),
    }


def why_not(records: dict[str, list[ActivationRecord]], over_budget: bool) -> str | None:
    """The status of an arm that cannot or may not be run on a feature; None where it can."""
    for split in ("train", "valid"):
        if not records[split]:
            return "no_records"
        if not any(record.activations.any() for record in records[split]):
            return "no_positives"
    return "no_budget" if over_budget else None


class SearchActor:
    """Runs the searches of several features at a time; all waiting is asynchronous."""

    def __init__(self, config: RunConfig, tables: Tables, committer: Any, keys: dict[str, SecretStr]) -> None:
        self._config, self._tables, self._committer = config, tables, committer
        self._simulators = {
            name: SimulatorClient(name, config, tables, committer)
            for name in {name for arm in config.explainers.values() for name in simulators_of(arm)}
        }
        self._clients = {name: make_client(name, config, keys.get(name)) for name in llms_used(config)}

    async def explain(self, feature: FeatureId, arms: list[str], has_llm: bool) -> str | None:
        """Runs the named arms for one feature and hands their rows to the committer.

        Returns the first failure of an LLM call: the arm that met it has no rows, and is left for the next run.
        """
        records = await asyncio.to_thread(load_records, self._tables, feature, ("train", "valid"))
        sequences = [record.sequence for of_split in records.values() for record in of_split]
        simulators: dict[str, SimulateAsync] = {}
        ledgers: dict[str, Ledger] = {}
        for name in arms:
            arm, ids = self._config.explainers[name], arm_ids(self._config, name)
            hopeless = why_not(records, isinstance(arm, OneShotConfig) and not has_llm)
            if hopeless:
                await self._commit([], explanation_row(feature, ids, None, hopeless))
                continue
            for simulator in simulators_of(arm):
                if simulator not in simulators:
                    simulators[simulator] = await self._simulators[simulator].remembering(sequences)
            evaluator = Evaluator(records, simulators[arm.simulator], getattr(arm, "num_worst_records", 1))
            cascade = None
            if isinstance(arm, TreeConfig) and arm.cascade:
                cascade = cascade_of(
                    arm.cascade, feature, records, simulators[arm.cascade.simulator], self._config.seed
                )
            propose = None
            if isinstance(arm, OneShotConfig):
                if arm.llm not in ledgers:
                    ledgers[arm.llm] = await self._ledger(arm.llm, feature)
                llm = self._config.llms[arm.llm]
                propose = llm_proposer(ledgers[arm.llm], llm, arm, feature, records["train"], self._config.seed)
            search = await search_feature(arm, records, evaluator, propose, cascade)
            failures = [node.thought for node in search.nodes if node.status == "llm_error"]
            if failures:
                return failures[0]
            await self._commit(candidate_rows(feature, ids, search), explanation_row(feature, ids, search))
        return None

    async def _ledger(self, llm: str, feature: FeatureId) -> Ledger:
        rows = await asyncio.to_thread(self._tables.read, "llm_calls", None, f"feature_key = '{feature}'")

        async def write(row: dict[str, Any]) -> None:
            await self._committer.add.remote({"llm_calls": [row]})

        return Ledger(self._clients[llm], self._config.llms[llm], rows.to_pylist(), write)

    async def _commit(self, candidates: list[dict[str, Any]], explanation: dict[str, Any]) -> None:
        await self._committer.add.remote({"candidates": candidates, "explanations": [explanation]})


def llms_used(config: RunConfig) -> set[str]:
    return {arm.llm for arm in config.explainers.values() if isinstance(arm, OneShotConfig)}


def make_client(name: str, config: RunConfig, key: SecretStr | None) -> Generate:
    """The client of one LLM arm; `key` where it has an endpoint."""
    llm = config.llms[name]
    if llm.provider == "local":
        return served_client(service_name("llm", name, config))
    if llm.provider == "scripted":
        return scripted_client(llm)
    assert key is not None, f"no key for {name}"
    return openai_client(llm, key)


def calls_per_feature(config: RunConfig) -> int:
    """LLM calls that a feature's arms make at most."""
    calls = 0
    for arm in config.explainers.values():
        if isinstance(arm, OneShotConfig):
            nodes = 1
            if isinstance(arm, TreeConfig):
                nodes = arm.num_llm_roots + arm.depth * arm.width * arm.branching_factor
            calls += nodes * (1 + arm.max_parse_retries)
    return calls


def features_with_llm(config: RunConfig, features: list[FeatureId]) -> set[FeatureId]:
    """Features that the call budget reaches, in the given order; decided before the first call: resuming agrees."""
    budgets = [config.llms[name].max_calls for name in llms_used(config)]
    limited = [budget for budget in budgets if budget is not None]
    if not limited:
        return set(features)
    return set(features[: min(limited) // max(calls_per_feature(config), 1)])


def live_features(tables: Tables) -> list[FeatureId]:
    """Features that have records, in the order in which budgets are spent."""
    keys = tables.read("features", ["feature_key"], "status = 'live'")["feature_key"].to_pylist()
    return interleave(sorted(FeatureId.parse(key) for key in keys))


def run_explain(config: RunConfig, tables: Tables, committer: Any, progress: Progress = silent) -> dict[str, int]:
    """Explains every live feature with every arm that it lacks; returns counts by status.

    Raises:
        UserError: an LLM failed for good on some features; the others are finished and kept.
    """
    features = live_features(tables)
    left = arms_left(config, tables, features)
    affordable = features_with_llm(config, features)
    resources = config.resources.search
    # As an argument: actors on other machines lack the driver's environment, and a runtime environment is shown to all.
    keys = {name: api_key(config.llms[name]) for name in llms_used(config) if config.llms[name].provider == "openai"}
    actor_class = ray.remote(SearchActor).options(
        num_cpus=resources.num_cpus, max_concurrency=config.resources.searches_per_actor, max_restarts=-1
    )
    actors = [actor_class.remote(config, tables, committer, keys) for _ in range(resources.num_actors)] if left else []
    queue, waiting, done = list(left.items()), {}, len(features) - len(left)
    failures: list[str] = []
    progress(done, len(features))
    idle = [actor for actor in actors for _ in range(config.resources.searches_per_actor)]
    while (queue and len(failures) < MAX_FAILURES) or waiting:
        while queue and idle and len(failures) < MAX_FAILURES:
            feature, arms = queue.pop(0)
            actor = idle.pop()
            waiting[actor.explain.options(max_task_retries=2).remote(feature, arms, feature in affordable)] = actor
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        idle.append(waiting.pop(ready))
        failure = ray.get(ready)
        failures += [failure] if failure else []
        done += failure is None
        progress(done, len(features))
    if left:
        ray.get(committer.flush.remote())
    for actor in actors:
        ray.kill(actor)  # pyright: ignore[reportArgumentType]
    if failures:
        raise UserError(
            f"LLM calls failed on {len(failures)} features ({failures[0]}); what is finished is kept. "
            "Mend it (llms.*: key, base_url, model, quota) and run the same command again"
        )
    lost = arms_left(config, tables, features)
    assert not lost, f"the committer lost the rows of {len(lost)} features; run the same command again"
    statuses = tables.read("explanations", ["status"])["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def arms_left(config: RunConfig, tables: Tables, features: list[FeatureId]) -> dict[FeatureId, list[str]]:
    """Explainer arms without a winner's row, by feature."""
    finished: set[tuple[str, str]] = set()
    if features:
        rows = tables.read("explanations", ["feature_key", "explainer"], sql_in("explainer", _all_ids(config)))
        finished = set(zip(rows["feature_key"].to_pylist(), rows["explainer"].to_pylist(), strict=True))
    left = {
        feature: [name for name in config.explainers if (str(feature), arm_ids(config, name)[0]) not in finished]
        for feature in features
    }
    return {feature: arms for feature, arms in left.items() if arms}


def _all_ids(config: RunConfig) -> list[str]:
    return [arm_ids(config, name)[0] for name in config.explainers]
