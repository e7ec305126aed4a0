"""The search actor: several features at a time, everything that they wait for, and where their rows go.

SearchActor --propose--> LLM, through the ledger `llm_calls`
            --evaluate--> simulator, through `simulations`
            --falsify--> the one retriever
            --rows--> outbox --> committer
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import ray
from pydantic import SecretStr
from ray.util.metrics import Counter

from rayinterp.config import LLMConfig, OneShotConfig, RunConfig, TreeConfig, llms_used, service_name, simulators_of
from rayinterp.explain.client import (
    Generate,
    Ledger,
    LLMError,
    LLMReply,
    LLMRequest,
    api_key,
    limited,
    plain_question,
    price,
    scripted_client,
)
from rayinterp.explain.feature import Propose, Silent, llm_proposer, prepare_search, search_feature
from rayinterp.explain.planted_llm import planted_client
from rayinterp.explain.rows import NodeCommitter, arm_ids, explanation_row, why_not
from rayinterp.explain.served import served_client
from rayinterp.explain.status import Spent
from rayinterp.explanation import Explanation, claims
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord, load_records, read_holistic
from rayinterp.retrieve import SilentRequest
from rayinterp.simulate.client import SimulatorClient
from rayinterp.simulate.simulator import RuleRequest, SimulateAsync
from rayinterp.tables import Tables

RetrieveSilent = Callable[[list[SilentRequest]], Awaitable[list[list[ActivationRecord]]]]


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


def llm_keys(config: RunConfig) -> dict[str, SecretStr]:
    """Of the endpoints, to be handed to actors: elsewhere they lack the driver's environment, and a runtime environment
    is shown to all."""
    return {n: api_key(config.llms[n]) for n in llms_used(config) if config.llms[n].provider == "openai"}


def make_client(name: str, config: RunConfig, key: SecretStr | None) -> Generate:
    """The client of one LLM arm in one of the search actors, which share its limits; `key` where it has an endpoint."""
    return metered(_client(name, config, key), config.name, name, config.llms[name])


def _client(name: str, config: RunConfig, key: SecretStr | None) -> Generate:
    llm = config.llms[name]
    if llm.provider == "local":
        return served_client(service_name("llm", name, config), config.resources.llm.timeout_seconds)
    if llm.provider == "scripted":
        return scripted_client(llm)
    if llm.provider == "planted":
        return planted_client(llm.model)
    from rayinterp.explain.endpoint import openai_client  # the package takes a second, of which others need nothing

    assert key is not None, f"no key for {name}"
    actors = config.resources.search.num_actors
    rate = llm.requests_per_minute / actors if llm.requests_per_minute else None
    return limited(openai_client(llm, key), max(llm.max_concurrency // actors, 1), rate)


def metered(generate: Generate, run: str, name: str, llm: LLMConfig) -> Generate:
    """A client whose calls are counted in Ray's metrics, with the tags `run` and `llm`."""
    tags = {"run": run, "llm": name}
    keys = tuple(tags)
    calls = Counter("rayinterp_llm_calls", "LLM calls answered.", keys)
    failures = Counter("rayinterp_llm_failures", "LLM calls that failed after all retries.", keys)
    tokens = Counter("rayinterp_llm_tokens", "Tokens of answered calls.", (*keys, "kind"))
    usd = Counter("rayinterp_llm_usd", "Dollars for answered calls, by the config's prices.", keys)
    for metric in (calls, failures, tokens, usd):
        metric.set_default_tags(tags)

    async def counted(request: LLMRequest, feature_key: str) -> LLMReply:
        try:
            reply = await generate(request, feature_key)
        except LLMError:
            failures.inc()
            raise
        calls.inc()
        for kind, count in (("prompt", reply.prompt_tokens), ("completion", reply.completion_tokens)):
            if count:  # Ray refuses to count nothing
                tokens.inc(count, {"kind": kind})
        if cost := price(llm, reply):
            usd.inc(cost)
        return reply

    return counted


class CallFailedError(RuntimeError):
    """A call failed for good, and the search with it; nothing is lost, and the feature may be tried again."""

    def __init__(self, message: str, transient: bool, llm_answers: bool) -> None:
        super().__init__(message, transient, llm_answers)
        self.transient, self.llm_answers = transient, llm_answers


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
        self._ids = {name: arm_ids(config, name) for name in config.explainers}
        self._spent = Spent()
        self._stopping = False

    def __repr__(self) -> str:  # on Ray's dashboard and in its logs
        return f"SearchActor({self._config.name})"

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
            tolerant: Go on without the LLM answers that fail while the LLM answers a plain question. Else the arm that
                meets one has no explanation's row and is left for another try.
        """
        records = await asyncio.to_thread(load_records, self._tables, feature, ("train", "valid"))
        simulators: dict[str, SimulateAsync] = {}
        ledgers: dict[str, Ledger] = {}
        best: list[float] = []
        for place, name in enumerate(arms):
            arm, ids = self._config.explainers[name], self._ids[name]
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
                propose = await self._proposer(arm, ledgers[arm.llm], feature, records, tolerant)
            silent = self._silent(feature) if isinstance(arm, TreeConfig) and arm.falsifier else None
            one = prepare_search(arm, feature, records, simulators, propose, silent, self._config.seed)
            commit = NodeCommitter(feature, ids, self._commit_nodes)
            try:
                search = await search_feature(one, lambda: self._stopping, commit)
            except CallFailedError as failure:
                answered = sum(ledger.num_new for ledger in ledgers.values())
                left, message = arms[place:], str(failure.args[0])
                return Explained(best, answered, left, message, failure.transient, failure.llm_answers)
            row = explanation_row(feature, ids, search, num_falsifiers=len(one.evaluator.falsifiers))
            await self._commit(commit.rest(search), row)
            best += [] if row["valid_score"] is None else [row["valid_score"]]
        return Explained(best, sum(ledger.num_new for ledger in ledgers.values()))

    def _counting(self, simulator: str) -> SimulateAsync:
        simulate = self._services.simulators[simulator]()

        async def counted(requests: list[RuleRequest]) -> list[list[Any]]:
            answers = await simulate(requests)
            for request in requests:
                self._spent.pairs += len(request.sequences)
                self._spent.simulated_tokens += sum(len(sequence.tokens) for sequence in request.sequences)
            return answers

        return counted

    async def _proposer(
        self, arm: OneShotConfig, ledger: Ledger, feature: FeatureId, records: dict[str, Any], tolerant: bool
    ) -> Propose:
        async def call(request: LLMRequest, feature_key: str) -> tuple[LLMReply, float | None]:
            try:
                return await ledger(request, feature_key)
            except LLMError as error:
                self._spent.failed_calls += 1
                llm_answers = await self._answers(arm, feature_key)
                if tolerant and llm_answers:
                    raise
                raise CallFailedError(str(error), error.transient, llm_answers) from None

        llm = self._config.llms[arm.llm]
        holistic = await asyncio.to_thread(read_holistic, self._tables, feature) if arm.holistic else {}
        return llm_proposer(call, llm, arm, feature, records["train"], holistic, self._config.seed)

    async def _answers(self, arm: OneShotConfig, feature_key: str) -> bool:
        """Whether an arm's LLM answers a plain question; neither ledger nor account hears of it."""
        question = plain_question(self._config.llms[arm.llm], arm.temperature)
        try:
            await self._services.llms[arm.llm](question, feature_key)
        except LLMError:
            return False
        return True

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

        async def silent(explanations: list[Explanation], split: str, count: int) -> list[ActivationRecord]:
            requests = [SilentRequest(feature, claims(explanation), split, count) for explanation in explanations]
            found = await retrieve(requests)
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
    num_answered: int
    """LLM calls that were answered now, and not by the ledger."""
    left: Sequence[str] = ()
    """Arms that are not finished."""
    failure: str | None = None
    """Of an LLM call, where arms are left."""
    transient: bool = False
    """Whether that may pass by itself."""
    llm_answers: bool = False
    """Whether the LLM answered a plain question then."""
