"""Further scorers at work, a feature at a time. Writes `scores`.

    driver --features--> scorer actors, several features at a time each --> LLM (by the ledger), simulator, or encoder
       <-- rows of `scores`, which mark the feature as finished --

What is finished is read from `scores`. A feature whose calls failed, or that a budget left out, has rows that say so
and is tried again by the next run; answers that were paid for are in `llm_calls` and are not asked for again. While an
LLM is down, features wait for it, up to `resources.max_outage_seconds`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

from rayinterp.config import EmbeddingConfig, JudgeConfig, RunConfig, SurprisalConfig
from rayinterp.explain.client import api_key
from rayinterp.explain.outage import MAX_TRIES, Outage
from rayinterp.grade import replace_scores
from rayinterp.progress import Progress, silent
from rayinterp.scorers.actor import Connect, Scored, ScorerActor, connect
from rayinterp.scorers.plan import ScorerPlan, ScorerWork
from rayinterp.tables import COMMIT_SECONDS, Tables

MAX_RESTARTS = 100
"""Of an actor whose process is lost."""


def run_scorers(
    config: RunConfig,
    tables: Tables,
    plans: list[ScorerPlan],
    committer: Any,
    progress: Progress = silent,
    over_budget: Callable[[float], str | None] = lambda usd: None,
    connect: Connect = connect,
) -> dict[str, int]:
    """Does what the plans name, one scorer after another; returns counts by scorer and status.

    Args:
        over_budget: Why nothing more may be spent, given the dollars that these calls have cost.
    """
    usd = 0.0
    for plan in plans:
        replace_scores(tables, plan.unscored)
        if plan.work:
            driver = _Driver(config, tables, plan, committer, progress, over_budget, connect, usd)
            try:
                driver.run()
            finally:
                driver.end()
            usd = driver.usd
    if any(plan.work for plan in plans):
        ray.get(committer.flush.remote())
        for table in ("scores", "llm_calls"):
            tables.finish(table)
    counts: dict[str, int] = {}
    for plan in plans:
        where = f"simulator = '{plan.arm}' and control = ''"
        for status in tables.read("scores", ["status"], where)["status"].to_pylist():
            counts[f"{plan.name} {status}"] = counts.get(f"{plan.name} {status}", 0) + 1
    return dict(sorted(counts.items()))


class _Driver:
    """Hands one scorer's features to its actors, and writes what comes back.

    queue --idle slot--> running --scored--> waiting to be written
      ^                     |failed: tried again; while everything fails one at a time, with pauses
      +---------------------+

    Args:
        usd: Dollars that the scorers before it have spent.
    """

    def __init__(
        self,
        config: RunConfig,
        tables: Tables,
        plan: ScorerPlan,
        committer: Any,
        progress: Progress,
        over_budget: Callable[[float], str | None],
        connect: Connect,
        usd: float,
    ) -> None:
        self._tables, self._plan, self._committer = tables, plan, committer
        self._progress, self._over_budget = progress, over_budget
        self.usd = usd
        self._asks_llm = isinstance(config.score.scorers[plan.name], JudgeConfig)
        self._refused: str | None = None
        """The status of what would need a new call, once none may be made."""
        self._outage = Outage(_has_answered(config, tables, plan), config.resources.max_outage_seconds)
        self._queue = deque((work, 0) for work in plan.work)
        self._running: dict[Any, tuple[ScorerWork, int, Any]] = {}
        self._waiting: list[dict[str, Any]] = []
        self._last_write = time.monotonic()
        self._done = plan.num_finished
        self._actors, self._idle = start_actors(config, tables, plan, committer, connect)

    def run(self) -> None:
        """Scores the features that are left."""
        self._say()
        while self._queue or self._running or self._waiting:
            if self._asks_llm and self._over_budget(self.usd) is not None:
                self._refused = "no_budget"
            while self._queue and self._idle and (self._refused or self._outage.lets(bool(self._running))):
                self._submit(*self._queue.popleft())
            for work, tries, scored in self._wait():
                self._take(work, tries, scored)
            is_last = not (self._queue or self._running)
            if self._waiting and (is_last or time.monotonic() - self._last_write > COMMIT_SECONDS):
                self._write()

    def end(self) -> None:
        """Lets the actors go."""
        for actor in self._actors:
            ray.kill(actor)

    def _say(self) -> None:
        note = f"{self._plan.name}, no LLM" if self._outage.down else self._plan.name
        self._progress(self._done, self._plan.num_finished + len(self._plan.work), note)

    def _submit(self, work: ScorerWork, tries: int) -> None:
        actor = self._idle.pop()
        self._running[actor.score.options(max_task_retries=-1).remote(work, self._refused)] = work, tries, actor

    def _wait(self) -> list[tuple[ScorerWork, int, Scored]]:
        """Features that have ended; returns after a moment where none has."""
        if not self._running:
            self._outage.wait()
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0)
        ended = []
        for reference in ready:
            work, tries, actor = self._running.pop(reference)
            self._idle.append(actor)
            ended.append((work, tries, ray.get(reference)))
        return ended

    def _take(self, work: ScorerWork, tries: int, scored: Scored) -> None:
        """Keeps a feature's rows, or puts it back."""
        self.usd += scored.usd
        self._outage.answered(scored.num_answered)
        if scored.failed and not self._refused:
            tries = self._after_failure(tries, scored)
            if tries < MAX_TRIES:
                self._queue.append((work, tries))
                self._say()
                return
        self._done += 1
        self._waiting += scored.rows

    def _after_failure(self, tries: int, scored: Scored) -> int:
        """Tries of a feature by now; or that no call will be made any more."""
        ray.get(self._committer.flush.remote())  # so that the next try finds what this one was told
        if self._outage.has_answered and not scored.outage:  # on what this feature asked alone
            self._outage.is_up()
            return tries + 1
        if self._outage.failed(scored.outage is None or scored.outage.transient):
            self._refused = "llm_error"
        return tries

    def _write(self) -> None:
        ray.get(self._committer.flush.remote())  # what a score rests on is durable before it
        replace_scores(self._tables, self._waiting)
        self._waiting, self._last_write = [], time.monotonic()
        self._say()


def _has_answered(config: RunConfig, tables: Tables, plan: ScorerPlan) -> bool:
    """Whether the LLM that a scorer asks, if any, has ever answered in this run directory."""
    scorer = config.score.scorers[plan.name]
    return isinstance(scorer, JudgeConfig) and config.llms[scorer.llm].model in tables.distinct("llm_calls", "model")


def start_actors(
    config: RunConfig, tables: Tables, plan: ScorerPlan, committer: Any, connect: Connect
) -> tuple[list[Any], list[Any]]:
    """The actors of one scorer, and each as often as it takes features at a time."""
    scorer, resources = config.score.scorers[plan.name], config.resources
    key, at_once, shape = None, resources.searches_per_actor, resources.search
    if isinstance(scorer, JudgeConfig) and config.llms[scorer.llm].provider == "openai":
        key = api_key(config.llms[scorer.llm])
    if isinstance(scorer, SurprisalConfig):
        # A request waits behind those before it, and its time runs: no more than keep the replicas busy.
        at_once = -(-2 * resources.simulator.most_actors // shape.num_actors)
    if isinstance(scorer, EmbeddingConfig):
        at_once, shape = 1, resources.index
    # Actors share an LLM's limits by their number, so there are as many of them for few features.
    num_actors = shape.num_actors if isinstance(scorer, JudgeConfig) else min(shape.num_actors, len(plan.work))
    actor = ray.remote(ScorerActor).options(
        num_cpus=shape.num_cpus, num_gpus=shape.num_gpus, max_concurrency=at_once, max_restarts=MAX_RESTARTS
    )
    arguments = (config, tables, committer, plan.name, key, connect)
    actors: list[Any] = [actor.remote(*arguments) for _ in range(num_actors)]
    return actors, actors * at_once
