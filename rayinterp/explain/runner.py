"""Many searches at once. Writes `candidates` and `explanations`.

    driver --features--> search actors (`actor`), several features at a time each
                             v
                         committer: nodes as they are scored, then the winner, whose row marks the feature as finished

A feature's arms run one after another, so that equal requests of two arms are paid for once. A search that was
interrupted is run again from its start. The ledger answers all that it has been told, and the memo of an LLM simulator
gives the numbers of before: it comes to where it was without paying. Late interaction has no memo, and rounds a little
otherwise where other texts shared its batches: the few requests whose feedback shows that are made and paid for anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import ray

from rayinterp.config import OneShotConfig, RunConfig, TreeConfig, features_within_calls
from rayinterp.errors import UserError
from rayinterp.explain.actor import Connect, Explained, SearchActor, connect, llm_keys
from rayinterp.explain.outage import MAX_TRIES, Outage
from rayinterp.explain.rows import arm_ids, explanation_row
from rayinterp.explain.status import Account, Status
from rayinterp.feature_id import FeatureId, interleave
from rayinterp.progress import Progress, silent
from rayinterp.retrieve import SharedRetriever
from rayinterp.tables import Tables, sql_in

MAX_RESTARTS = 100
"""Of a search actor whose process is lost. Its features are tried again without a limit of their own: while an actor is
being started, tries fail by the second."""
TRIED_AGAIN = ("budget", "no_budget", "llm_error")
"""Statuses of explanations that another run may change."""

OverBudget = Callable[[float], str | None]
"""Why nothing more may be spent, given the dollars spent on LLMs; None while there is something left."""


def features_with_llm(config: RunConfig, features: list[FeatureId]) -> set[FeatureId]:
    """Features that the call budget reaches, in the given order; decided before the first call: resuming agrees."""
    return set(features[: features_within_calls(config)])


def live_features(tables: Tables) -> list[FeatureId]:
    """Features that have records, in the order in which budgets are spent."""
    keys = tables.read("features", ["feature_key"], "status = 'live'")["feature_key"].to_pylist()
    return interleave(sorted(FeatureId.parse(key) for key in keys))


def arms_left(config: RunConfig, tables: Tables, features: list[FeatureId]) -> dict[FeatureId, list[str]]:
    """Explainer arms without a winner's row, by feature."""
    ids = {name: arm_ids(config, name)[0] for name in config.explainers}
    finished: set[tuple[str, str]] = set()
    if features:
        rows = tables.read("explanations", ["feature_key", "explainer"], sql_in("explainer", ids.values()))
        finished = set(zip(rows["feature_key"].to_pylist(), rows["explainer"].to_pylist(), strict=True))
    left = {feature: [name for name, arm in ids.items() if (str(feature), arm) not in finished] for feature in features}
    return {feature: arms for feature, arms in left.items() if arms}


def reopen(config: RunConfig, tables: Tables, over_budget: OverBudget) -> None:
    """Forgets searches that a budget ended or prevented, where there is more of it now, and those that had no answer
    from their LLM."""
    if over_budget(dollars_spent(tables)) is not None:
        return
    affordable = features_with_llm(config, live_features(tables))
    ids = {name: arm_ids(config, name)[0] for name in config.explainers}
    where = f"{sql_in('status', TRIED_AGAIN)} and {sql_in('explainer', ids.values())}"
    with_llm = {ids[name] for name, arm in config.explainers.items() if isinstance(arm, OneShotConfig)}
    by_arm: dict[str, list[str]] = {}
    for row in tables.read("explanations", ["feature_key", "explainer"], where).to_pylist():
        if FeatureId.parse(row["feature_key"]) in affordable or row["explainer"] not in with_llm:
            by_arm.setdefault(row["explainer"], []).append(row["feature_key"])
    if by_arm:
        # All arms of a feature are graded on what any of them called for, and that arm's winner may be another now.
        features = sorted({key for keys in by_arm.values() for key in keys})
        graded = f"{sql_in('explainer', ['', *ids.values()])} and {sql_in('feature_key', features)}"
        for table in ("scores", "predictions", "test_records"):
            tables.delete(table, graded)
    for arm, keys in by_arm.items():
        for table in ("complexity", "candidates", "explanations"):
            tables.delete(table, f"explainer = '{arm}' and {sql_in('feature_key', keys)}")


def dollars_spent(tables: Tables) -> float:
    """On LLM calls that have a price."""
    return sum(tables.read("llm_calls", ["cost_usd"], "cost_usd is not null")["cost_usd"].to_pylist())


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
        try:
            failure = driver.run(left, features)
        finally:
            driver.end()
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
        self._asked_about = tables.distinct("llm_calls", "feature_key")
        asking = {arm_ids(config, name)[0] for name, arm in config.explainers.items() if isinstance(arm, OneShotConfig)}
        has_answered = asking <= tables.distinct("candidates", "explainer", "prompt_tokens > 0")
        self._outage = Outage(has_answered, config.resources.max_outage_seconds)
        self._calls = 0

    def run(self, left: dict[FeatureId, list[str]], features: list[FeatureId]) -> str | None:
        """Explains what is left; returns the failure that ended it early, if one did."""
        affordable = features_with_llm(self._config, features)
        queue = deque(_Task(feature, arms, 0) for feature, arms in left.items())
        status = Status(len(features), len(features) - len(left))
        failure: str | None = None
        while queue or self._running:
            self._committer.tick.remote()
            status.spent = self._account.read()
            stop = self._over_budget(status.spent.usd)
            if stop:
                self._stop(queue)
            while queue and self._idle and self._outage.lets(bool(self._running)):
                self._submit(queue.popleft(), affordable)
            for task, done in self._wait():
                status.take(done.valid_scores, finished=done.failure is None)
                self._outage.answered(done.num_answered)
                if done.failure is not None:
                    failure = self._after_failure(task, done, queue) or failure
            if failure:
                queue.clear()
            self._progress(status.done, status.total, status.figures(len(queue), len(self._running), stop))
        return failure

    def end(self) -> None:
        """Makes what has been handed over durable, and lets the actors go."""
        try:
            ray.get(self._committer.flush.remote())
        finally:  # also where the committer is what was lost
            for actor in [*self._actors, *([self._retriever] if self._retriever else [])]:
                ray.kill(actor)

    def _submit(self, task: _Task, affordable: set[FeatureId]) -> None:
        actor, key = self._idle.pop(), str(task.feature)
        is_last_try = task.tries + 1 >= MAX_TRIES
        arguments = (task.feature, task.arms, task.feature in affordable, key not in self._asked_about, is_last_try)
        self._asked_about.add(key)
        self._running[actor.explain.options(max_task_retries=-1).remote(*arguments)] = task, actor

    def _wait(self) -> list[tuple[_Task, Explained]]:
        """Tasks that have ended; returns after a moment where none has."""
        if not self._running:
            self._outage.wait()
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
        ray.get(self._committer.flush.remote())  # so that the next try finds what this one was told
        calls = self._account.read(at_once=True).calls  # by those that are still under way too
        self._outage.answered(calls - self._calls)
        self._calls = max(calls, self._calls)
        left = task._replace(arms=list(done.left))
        if not (self._outage.has_answered and done.llm_answers):  # it says nothing of the feature
            queue.append(left)
            return done.failure if self._outage.failed(done.transient) else None
        self._outage.is_up()
        queue.append(left._replace(tries=task.tries + 1 if done.transient else MAX_TRIES - 1))
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
    actor = ray.remote(SharedRetriever).options(num_cpus=resources.num_cpus, max_restarts=-1, max_task_retries=-1)
    return actor.remote(config, tables)
