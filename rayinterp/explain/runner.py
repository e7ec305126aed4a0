"""Many searches at once: where explainers, simulators and LLMs meet. Writes `candidates` and `explanations`.

    driver --features--> SearchActor (several features at a time each)
                             | propose: LLM (Serve replica or endpoint), through the ledger `llm_calls`
                             | evaluate: simulator replica, a round's candidates per request, through `simulations`
                             | falsify: one retriever for all
                             v
                         committer: nodes as they are scored, then the winner, whose row marks the feature as finished

A feature's arms run one after another, so that equal requests of two arms are paid for once. A search that was
interrupted is run again from its start: ledger and memo answer all that they have been told, so that it comes to where
it was without paying.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import ray
from pydantic import SecretStr

from rayinterp.config import (
    OneShotConfig,
    RunConfig,
    TreeConfig,
    arm_id,
    content_of,
    service_name,
    simulators_of,
)
from rayinterp.errors import UserError
from rayinterp.explain.client import (
    Generate,
    Ledger,
    LLMError,
    LLMReply,
    LLMRequest,
    api_key,
    openai_client,
    price,
    scripted_client,
)
from rayinterp.explain.feature import Propose, Silent, llm_proposer, prepare_search, search_feature
from rayinterp.explain.local import served_client
from rayinterp.explain.search import Node, TreeSearch
from rayinterp.explain.status import Account, Spent, Status
from rayinterp.explanation import Explanation, to_json
from rayinterp.progress import Progress, silent
from rayinterp.records import ActivationRecord, load_records
from rayinterp.retrieve import SharedRetriever, SilentRequest
from rayinterp.simulate.client import SimulatorClient
from rayinterp.simulate.simulator import RuleRequest, SimulateAsync
from rayinterp.subject import FeatureId, interleave
from rayinterp.tables import Tables, sql_in

MAX_FAILURES = 5
"""Features in a row that an LLM fails on before it is taken to be down."""
MAX_TRIES = 3
"""Of a feature on which calls fail while others succeed; the last one goes on without the answers that fail."""
MAX_RESTARTS = 100
"""Of a search actor whose process is lost. Its features are tried again without a limit of their own: while an actor is
being started, tries fail by the second."""
OUTAGE_PAUSE = 20.0
"""Seconds between attempts while an LLM is down."""
UNFINISHED = ("budget", "no_budget")
"""Statuses of explanations that a larger budget would change."""

RetrieveSilent = Callable[[list[SilentRequest]], Awaitable[list[list[ActivationRecord]]]]
OverBudget = Callable[[float], str | None]
"""Why nothing more may be spent, given the dollars spent on LLMs; None while there is something left."""


class Services(NamedTuple):
    """What a search actor talks to."""

    simulators: dict[str, Callable[[], SimulateAsync]]
    """By arm: what simulates the sequences of one feature."""
    llms: dict[str, Generate]
    """By arm."""
    retrieve: RetrieveSilent | None
    """None where no arm has a falsifier."""


Connect = Callable[[RunConfig, Tables, Any, dict[str, SecretStr], Any], Services]
"""Makes them within the actor, of the committer, the keys and the retriever."""


def connect(config: RunConfig, tables: Tables, committer: Any, keys: dict[str, SecretStr], retriever: Any) -> Services:
    """Serve handles, endpoints and the retriever's handle."""
    names = {name for arm in config.explainers.values() for name in simulators_of(arm)}
    simulators = {name: SimulatorClient(name, config, tables, committer).remembering for name in names}
    llms = {name: make_client(name, config, keys.get(name)) for name in llms_used(config)}

    async def retrieve(requests: list[SilentRequest]) -> list[list[ActivationRecord]]:
        return await retriever.silent.remote(requests)

    return Services(simulators, llms, retrieve if retriever else None)


class CallFailedError(RuntimeError):
    """A call failed for good, and the search with it; nothing is lost, and the feature may be tried again."""

    def __init__(self, message: str, transient: bool) -> None:
        super().__init__(message, transient)
        self.transient = transient


class SearchActor:
    """Runs the searches of several features at a time; all waiting is asynchronous."""

    def __init__(
        self,
        config: RunConfig,
        tables: Tables,
        committer: Any,
        keys: dict[str, SecretStr],
        retriever: Any = None,
        connect: Connect = connect,
    ) -> None:
        self._config, self._tables, self._outbox = config, tables, Outbox(committer)
        self._services = connect(config, tables, committer, keys, retriever)
        self._restarted = ray.get_runtime_context().was_current_actor_reconstructed
        if self._restarted:  # what was told to the one before is looked up, so it must be in the table
            ray.get(committer.flush.remote())
        self._spent = Spent()
        self._stopping = False

    async def spent(self) -> Spent:
        """What this actor has asked for since it was started."""
        return self._spent

    async def stop(self) -> None:
        """Ends all searches between two steps; what they have found is kept."""
        self._stopping = True

    async def explain(
        self, feature: FeatureId, arms: list[str], has_llm: bool, fresh: bool, tolerant: bool
    ) -> Explained:
        """Runs the named arms for one feature and hands their rows to the committer.

        Args:
            fresh: Nothing has been asked about it before, so that the ledger need not be read. An actor that was
                started anew cannot rely on it.
            tolerant: Go on without the LLM answers that fail. Else the arm that meets one has no explanation's row
                and is left for another try.
        """
        records = await asyncio.to_thread(load_records, self._tables, feature, ("train", "valid"))
        simulators: dict[str, SimulateAsync] = {}
        ledgers: dict[str, Ledger] = {}
        best: list[float] = []
        for name in arms:
            arm, ids = self._config.explainers[name], arm_ids(self._config, name)
            hopeless = why_not(records, isinstance(arm, OneShotConfig) and not has_llm)
            if hopeless:
                await self._commit([], explanation_row(feature, ids, None, hopeless))
                continue
            for simulator in simulators_of(arm):
                simulators[simulator] = simulators.get(simulator) or self._counting(simulator)
            propose = None
            if isinstance(arm, OneShotConfig):
                ledgers[arm.llm] = ledgers.get(arm.llm) or await self._ledger(
                    arm.llm, feature, fresh and not self._restarted
                )
                propose = self._proposer(arm, ledgers[arm.llm], feature, records, tolerant)
            silent = self._silent(feature) if isinstance(arm, TreeConfig) and arm.falsifier else None
            one = prepare_search(arm, feature, records, simulators, propose, silent, self._config.seed)
            commit = NodeCommitter(feature, ids, self._commit_nodes)
            try:
                search = await search_feature(one, lambda: self._stopping, commit)
            except CallFailedError as failure:
                return Explained(best, str(failure.args[0]), failure.transient)
            cut = self._stopping and any(node.status == "stopped" for node in search.nodes)
            row = explanation_row(feature, ids, search, "budget" if cut else None, len(one.evaluator.falsifiers))
            await self._commit(commit.rest(search), row)
            best += [] if row["valid_score"] is None else [row["valid_score"]]
        return Explained(best, None, False)

    def _counting(self, simulator: str) -> SimulateAsync:
        simulate = self._services.simulators[simulator]()

        async def counted(requests: list[RuleRequest]) -> list[list[Any]]:
            answers = await simulate(requests)
            for request in requests:
                self._spent.pairs += len(request.sequences)
                self._spent.simulated_tokens += sum(len(sequence.tokens) for sequence in request.sequences)
            return answers

        return counted

    def _proposer(
        self, arm: OneShotConfig, ledger: Ledger, feature: FeatureId, records: dict[str, Any], tolerant: bool
    ) -> Propose:
        async def call(request: LLMRequest, feature_key: str) -> tuple[LLMReply, float | None]:
            try:
                return await ledger(request, feature_key)
            except LLMError as error:
                self._spent.failed_calls += 1
                if tolerant:
                    raise
                raise CallFailedError(str(error), error.transient) from None

        llm = self._config.llms[arm.llm]
        return llm_proposer(call, llm, arm, feature, records["train"], self._config.seed)

    async def _ledger(self, llm: str, feature: FeatureId, fresh: bool) -> Ledger:
        rows: list[dict[str, Any]] = []
        if not fresh:
            table = await asyncio.to_thread(self._tables.read, "llm_calls", None, f"feature_key = '{feature}'")
            rows = table.to_pylist()
        generate, config = self._services.llms[llm], self._config.llms[llm]

        async def counted(request: LLMRequest, feature_key: str) -> LLMReply:
            reply = await generate(request, feature_key)
            self._spent.calls += 1
            self._spent.usd += price(config, reply) or 0.0
            return reply

        async def write(row: dict[str, Any]) -> None:
            await self._outbox.add({"llm_calls": [row]})

        return Ledger(counted, config, rows, write)

    def _silent(self, feature: FeatureId) -> Silent:
        retrieve = self._services.retrieve
        assert retrieve is not None, "a falsifier without a retriever"

        async def silent(explanations: list[Explanation], count: int) -> list[ActivationRecord]:
            texts = [tuple(rule.activates_on for rule in explanation) for explanation in explanations]
            found = await retrieve([SilentRequest(feature, of_one, "train", count) for of_one in texts])
            return list({r.sequence.sequence_id: r for of_one in found for r in of_one}.values())

        return silent

    async def _commit_nodes(self, candidates: list[dict[str, Any]]) -> None:
        await self._outbox.add({"candidates": candidates})

    async def _commit(self, candidates: list[dict[str, Any]], explanation: dict[str, Any]) -> None:
        await self._outbox.add({"candidates": candidates, "explanations": [explanation]})


class Outbox:
    """Hands the rows of all searches to the committer; while one message is on its way, the next is gathered."""

    def __init__(self, committer: Any) -> None:
        self._committer = committer
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._next: asyncio.Future[None] | None = None
        self._sending = asyncio.Lock()

    async def add(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        """Returns when the committer has them."""
        for table, new in rows.items():
            self._rows.setdefault(table, []).extend(new)
        self._next = self._next or asyncio.ensure_future(self._send())
        await asyncio.shield(self._next)

    async def _send(self) -> None:
        async with self._sending:
            rows, self._rows, self._next = self._rows, {}, None
            await self._committer.add.remote(rows)


class Explained(NamedTuple):
    """What became of one feature."""

    valid_scores: list[float]
    """Of the winners."""
    failure: str | None
    """Of an LLM call, where arms are left."""
    transient: bool
    """Whether that may pass by itself."""


class NodeCommitter:
    """Hands each node of one search over as it comes to its end.

    Failed calls and what was stopped wait for the search to end: run again, it may get an answer.
    """

    def __init__(
        self, feature: FeatureId, ids: tuple[str, str], write: Callable[[list[dict[str, Any]]], Awaitable[None]]
    ) -> None:
        self._feature, self._ids, self._write = feature, ids, write
        self._written: set[int] = set()

    async def __call__(self, search: TreeSearch) -> None:
        new = [n for n in search.nodes if n.node not in self._written and n.status in _ENDED]
        self._written.update(node.node for node in new)
        if new:
            await self._write([candidate_row(self._feature, self._ids, search, node) for node in new])

    def rest(self, search: TreeSearch) -> list[dict[str, Any]]:
        """Rows of what has not been handed over, but for proposals that were never answered."""
        left = [n for n in search.nodes if n.node not in self._written and n.status != "stopped"]
        return [candidate_row(self._feature, self._ids, search, node) for node in left]


_ENDED = ("ok", "duplicate", "pruned", "undefined", "parse_error", "cut_off", "nothing_fires")


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


def candidate_row(feature: FeatureId, ids: tuple[str, str], search: TreeSearch, node: Node) -> dict[str, Any]:
    return {
        "feature_key": str(feature),
        "explainer": ids[0],
        "simulator": ids[1],
        "node": node.node,
        "parent": node.parent,
        "depth": node.depth,
        "kind": node.kind,
        "explanation": None if node.explanation is None else to_json(node.explanation),
        "status": node.status,
        "cascade_score": node.looks[-1] if node.looks else None,
        "train_score": node.train_score,
        "valid_score": node.valid_score,
        "thought": node.thought,
        "feedback": None if node.parent is None else search.nodes[node.parent].feedback,
        "prompt_tokens": node.prompt_tokens,
        "completion_tokens": node.completion_tokens,
        "cost_usd": node.cost_usd,
    }


def explanation_row(
    feature: FeatureId,
    ids: tuple[str, str],
    search: TreeSearch | None,
    status: str | None = None,
    num_falsifiers: int = 0,
) -> dict[str, Any]:
    """The winner, or why there is none."""
    winner = search.winner() if search else None
    nodes = [node for node in search.nodes if node.status != "stopped"] if search else []
    costs = [node.cost_usd for node in nodes if node.prompt_tokens]
    return {
        "feature_key": str(feature),
        "sae": feature.sae,
        "feature": feature.index,
        "explainer": ids[0],
        "simulator": ids[1],
        "explanation": to_json(winner.explanation) if winner and winner.explanation else None,
        "train_score": winner.train_score if winner else None,
        "valid_score": winner.valid_score if winner else None,
        "num_candidates": len(nodes),
        "num_falsifiers": num_falsifiers,
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


def llms_used(config: RunConfig) -> set[str]:
    return {arm.llm for arm in config.explainers.values() if isinstance(arm, OneShotConfig)}


def llm_keys(config: RunConfig) -> dict[str, SecretStr]:
    """Of the endpoints, to be handed to actors: elsewhere they lack the driver's environment, and a runtime environment
    is shown to all."""
    return {n: api_key(config.llms[n]) for n in llms_used(config) if config.llms[n].provider == "openai"}


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


def reopen(config: RunConfig, tables: Tables, over_budget: OverBudget) -> None:
    """Forgets that a budget ended or prevented searches, where there is more of it now."""
    if over_budget(dollars_spent(tables)) is not None:
        return
    affordable = features_with_llm(config, live_features(tables))
    where = f"{sql_in('status', UNFINISHED)} and {sql_in('explainer', _all_ids(config))}"
    for row in tables.read("explanations", ["feature_key", "explainer"], where).to_pylist():
        if FeatureId.parse(row["feature_key"]) in affordable:
            this = f"feature_key = '{row['feature_key']}' and explainer = '{row['explainer']}'"
            for table in ("scores", "predictions", "explanations"):
                tables.delete(table, this)


def dollars_spent(tables: Tables) -> float:
    """On LLM calls that have a price."""
    return sum(tables.read("llm_calls", ["cost_usd"], "cost_usd is not null")["cost_usd"].to_pylist())


def _all_ids(config: RunConfig) -> list[str]:
    return [arm_ids(config, name)[0] for name in config.explainers]


def run_explain(
    config: RunConfig,
    tables: Tables,
    committer: Any,
    progress: Progress = silent,
    over_budget: OverBudget = lambda usd: None,
    connect: Connect = connect,
) -> dict[str, int]:
    """Explains every live feature with every arm that it lacks; returns counts by status.

    Raises:
        UserError: an LLM failed for good on some features; the others are finished and kept.
    """
    features = live_features(tables)
    left = arms_left(config, tables, features)
    if left:
        usd = dollars_spent(tables)
        driver = _Driver(config, tables, committer, progress, lambda more: over_budget(usd + more), connect)
        failure = driver.run(left, features)
        if failure:
            raise UserError(
                f"LLM calls failed ({failure}); what is finished is kept. Mend it (llms.*: key, base_url, model, "
                "quota) and run the same command again"
            )
        lost = arms_left(config, tables, features)
        assert not lost, f"the committer lost the rows of {len(lost)} features; run the same command again"
    progress(len(features), len(features))
    statuses = tables.read("explanations", ["status"])["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


class _Task(NamedTuple):
    feature: FeatureId
    arms: list[str]
    tries: int


class _Driver:
    """Hands features to search actors, and keeps account.

    queue --idle slot--> running --done--> status
      ^                     |failed: tried again; while everything fails one at a time, with pauses
      +---------------------+
    """

    def __init__(
        self,
        config: RunConfig,
        tables: Tables,
        committer: Any,
        progress: Progress,
        over_budget: OverBudget,
        connect: Connect,
    ) -> None:
        self._config, self._tables, self._committer = config, tables, committer
        self._progress, self._over_budget = progress, over_budget
        resources = config.resources.search
        keys = llm_keys(config)
        falsifies = any(isinstance(arm, TreeConfig) and arm.falsifier for arm in config.explainers.values())
        self._retriever = start_retriever(config, tables) if falsifies else None
        actor = ray.remote(SearchActor).options(
            num_cpus=resources.num_cpus,
            max_concurrency=config.resources.searches_per_actor + 2,
            max_restarts=MAX_RESTARTS,
        )
        arguments = (config, tables, committer, keys, self._retriever, connect)
        self._actors = [actor.remote(*arguments) for _ in range(resources.num_actors)]
        self._idle = self._actors * config.resources.searches_per_actor
        self._running: dict[Any, tuple[_Task, Any]] = {}
        self._account = Account(self._actors)
        self._failures_in_a_row, self._last_success, self._resume_at = 0, time.monotonic(), 0.0

    def run(self, left: dict[FeatureId, list[str]], features: list[FeatureId]) -> str | None:
        """Explains what is left; returns the failure that ended it early, if one did."""
        affordable = features_with_llm(self._config, features)
        asked_about = self._tables.distinct("llm_calls", "feature_key")
        queue = deque(_Task(feature, arms, 0) for feature, arms in left.items())
        status = Status(len(features), len(features) - len(left))
        failure: str | None = None
        while queue or self._running:
            status.spent = self._account.read()
            stop = self._over_budget(status.spent.usd)
            if stop:
                self._stop(queue)
            while queue and self._may_submit():
                task, actor = queue.popleft(), self._idle.pop()
                tolerant = task.tries + 1 >= MAX_TRIES and status.spent.calls > 0
                fresh = str(task.feature) not in asked_about
                asked_about.add(str(task.feature))
                arguments = (task.feature, task.arms, task.feature in affordable, fresh, tolerant)
                self._running[actor.explain.options(max_task_retries=-1).remote(*arguments)] = task, actor
            for task, done in self._wait():
                status.take(done.valid_scores, finished=done.failure is None)
                if done.failure is None:
                    self._failures_in_a_row, self._last_success = 0, time.monotonic()
                else:
                    failure = self._after_failure(task, done, queue) or failure
            if failure:
                queue.clear()
            self._progress(status.done, status.total, status.figures(len(queue), len(self._running), stop))
        ray.get(self._committer.flush.remote())
        for actor in [*self._actors, *([self._retriever] if self._retriever else [])]:
            ray.kill(actor)
        return failure

    def _may_submit(self) -> bool:
        down = self._failures_in_a_row >= MAX_FAILURES
        return bool(self._idle) and time.monotonic() >= self._resume_at and not (down and self._running)

    def _wait(self) -> list[tuple[_Task, Explained]]:
        """Tasks that have ended; returns after a moment where none has."""
        if not self._running:
            time.sleep(min(max(self._resume_at - time.monotonic(), 0.0), 1.0))
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0)
        if ready:
            ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        ended = []
        for reference in ready:
            task, actor = self._running.pop(reference)
            self._idle.append(actor)
            ended.append((task, ray.get(reference)))
        return ended

    def _after_failure(self, task: _Task, done: Explained, queue: deque[_Task]) -> str | None:
        """Puts the feature back, or says that there is no point in going on."""
        self._failures_in_a_row += 1
        ray.get(self._committer.flush.remote())  # so that the next try finds what this one was told
        answered = self._account.read(at_once=True).calls > 0
        down_for = time.monotonic() - self._last_success
        if self._failures_in_a_row >= MAX_FAILURES:
            if not answered or not done.transient or down_for > self._config.resources.max_outage_seconds:
                return done.failure
            self._resume_at = time.monotonic() + OUTAGE_PAUSE
            queue.append(task)
        elif task.tries + 1 >= MAX_TRIES and not answered:
            return done.failure
        else:
            queue.append(task._replace(tries=task.tries + 1 if done.transient else MAX_TRIES - 1))
        return None

    def _stop(self, queue: deque[_Task]) -> None:
        """Ends the searches under way, and leaves a row for each that the budget does not reach."""
        for actor in self._actors:  # said again each time: an actor that was started anew has not heard it
            actor.stop.remote()
        rows = [
            explanation_row(task.feature, arm_ids(self._config, name), None, "no_budget")
            for task in queue
            for name in task.arms
        ]
        queue.clear()
        if rows:
            ray.get(self._committer.add.remote({"explanations": rows}))


def start_retriever(config: RunConfig, tables: Tables) -> Any:
    """The falsifiers' one retriever."""
    resources = config.resources.index
    actor = ray.remote(SharedRetriever).options(
        num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=-1, max_task_retries=-1
    )
    return actor.remote(config, tables)
