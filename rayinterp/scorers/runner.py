"""Further scorers at work, a feature at a time. Writes `scores`.

    driver --features--> scorer actors, several features at a time each --> LLM (by the ledger), simulator, or encoder
       <-- rows of `scores`, which mark the feature as finished --

What is finished is read from `scores`. A feature whose calls failed, or that a budget left out, has rows that say so
and is tried again by the next run; answers that were paid for are in `llm_calls` and are not asked for again. While an
LLM is down, features wait for it, up to `resources.max_outage_seconds`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
from pydantic import SecretStr

from rayinterp import rule_negatives
from rayinterp.config import (
    DetectionConfig,
    EmbeddingConfig,
    FuzzingConfig,
    IntruderConfig,
    JudgeConfig,
    RunConfig,
    ScorerConfig,
    SurprisalConfig,
    scorer_id,
)
from rayinterp.explain.actor import make_client
from rayinterp.explain.client import (
    Generate,
    Ledger,
    LLMError,
    LLMReply,
    LLMRequest,
    api_key,
    limited,
    plain_question,
)
from rayinterp.explain.outage import MAX_TRIES, Outage
from rayinterp.explanation import Explanation, wording
from rayinterp.feature_id import FeatureId
from rayinterp.grade import replace_scores, some_of_each_source
from rayinterp.grade_plan import (
    TRIED_AGAIN,
    Explained,
    Pools,
    count_records,
    count_rule_negatives,
    explained_by,
    first_of_each_sae,
    graded_sources,
    read_explained,
    score_row,
    settings_of,
    shuffled_explanations,
    standing,
)
from rayinterp.index import embedder_path
from rayinterp.progress import Progress, silent
from rayinterp.records import load_records
from rayinterp.scorers.embedding import Embed, cosines, read_vectors
from rayinterp.scorers.intruder import find_intruders, intruder_questions
from rayinterp.scorers.judged import judge, questions
from rayinterp.scorers.surprisal import TokenLosses, surprisal
from rayinterp.scorers.values import Answers, Graded, each_once, rows_of
from rayinterp.simulate.client import SimulatorClient
from rayinterp.simulate.simulator import CONTROL_NULLS
from rayinterp.sources import generator_for
from rayinterp.tables import COMMIT_SECONDS, Tables

MAX_RESTARTS = 100
"""Of an actor whose process is lost."""


class ScorerWork(NamedTuple):
    """What one scorer grades for one feature."""

    feature: FeatureId
    settings: str
    """From `grade_plan.settings_of`."""
    texts: dict[Graded, str]
    """The words of each explanation and control; one empty text where there is no explanation."""
    explanations: dict[str, Explanation]
    """By explainer arm id."""


class ScorerPlan(NamedTuple):
    """What one scorer has left to do."""

    name: str
    arm: str
    """Its name in the tables."""
    work: list[ScorerWork]
    unscored: list[dict[str, Any]]
    """Rows of `scores` for what is not graded."""
    num_finished: int
    """Features that have their scores."""


def plan_scorers(config: RunConfig, tables: Tables, explainers: list[str]) -> list[ScorerPlan]:
    """What every further scorer has left to do: decided from tables and config alone.

    Args:
        explainers: Explainer arm ids of this config.
    """
    return [plan_scorer(config, tables, name, explainers) for name in config.score.scorers]


def plan_scorer(config: RunConfig, tables: Tables, name: str, explainers: list[str]) -> ScorerPlan:
    """What one of them has left to do.

    `max_calls` counts calls whether or not they are remembered, so that a resumed run grades the same features.
    """
    scorer, arm = config.score.scorers[name], scorer_id(config, name)
    called_for = count_rule_negatives(config, tables)
    silent_alone = isinstance(scorer, IntruderConfig)
    num_records = count_records(tables, "test", called_for, scorer.max_records, silent_alone)
    stands = standing(config, tables, arm)
    by_feature = _to_grade(scorer, tables, explainers)
    pools = explained_by(by_feature)
    calls_left = config.llms[scorer.llm].max_calls if isinstance(scorer, JudgeConfig) else None
    plan = ScorerPlan(name, arm, [], [], 0)
    num_finished = 0
    for feature in first_of_each_sae(by_feature, scorer.num_features):
        key, settings = str(feature), settings_of(config, called_for[str(feature)])
        explained = by_feature[feature]
        for explainer, status in explained.failed.items():
            if stands.get((key, explainer)) != status:
                plan.unscored.extend(unscored_rows(config, plan, feature, settings, explainer, status))
        if calls_left is not None and isinstance(scorer, JudgeConfig):
            num_texts = len(texts_of(feature, by_feature, pools, explained.explanations, config))
            calls_left -= most_calls(scorer, num_records[key], num_texts)
        affordable = calls_left is None or calls_left >= 0
        left = {e: x for e, x in explained.explanations.items() if stands.get((key, e)) in (None, *TRIED_AGAIN)}
        if left and affordable:
            texts = texts_of(feature, by_feature, pools, left, config)
            plan.work.append(ScorerWork(feature, settings, texts, left if "" not in left else {}))
        elif left:
            for explainer in (e for e in left if stands.get((key, e)) != "no_budget"):
                plan.unscored.extend(unscored_rows(config, plan, feature, settings, explainer, "no_budget"))
        elif explained.explanations:
            num_finished += 1
    return plan._replace(num_finished=num_finished)


def _to_grade(scorer: ScorerConfig, tables: Tables, explainers: list[str]) -> dict[FeatureId, Explained]:
    """Explained features; for a scorer without explanations every live one, with an empty one of nobody."""
    if not isinstance(scorer, IntruderConfig):
        return read_explained(tables, explainers)
    live = tables.read("features", ["feature_key"], "status = 'live'")["feature_key"].to_pylist()
    return {FeatureId.parse(key): Explained({"": ()}, {}) for key in live}


def texts_of(
    feature: FeatureId,
    by_feature: Mapping[FeatureId, Explained],
    pools: Pools,
    explanations: Mapping[str, Explanation],
    config: RunConfig,
) -> dict[Graded, str]:
    """What is graded on one feature: explanations, of each explainer another feature's, and one null text.

    One control of each kind, since every text costs as many calls as an explanation; over features they are averaged.
    """
    if "" in explanations:
        return {Graded("", ""): ""}
    texts = {Graded(name, ""): wording(explanation) for name, explanation in explanations.items()}
    shuffled = shuffled_explanations(feature, by_feature, pools, config)
    texts |= {Graded(name, "shuffled"): wording(shuffled[name][0]) for name in explanations if name in shuffled}
    null = generator_for(config.seed, feature, "null text").integers(len(CONTROL_NULLS)) if texts else 0
    return texts | ({Graded("", "null"): CONTROL_NULLS[int(null)]} if texts else {})


def most_calls(scorer: JudgeConfig, num_records: int, num_texts: int) -> int:
    """LLM calls that one feature may take."""
    per_text = num_records if isinstance(scorer, IntruderConfig) else -(-num_records // scorer.num_shown)
    return per_text * num_texts * (1 + scorer.max_parse_retries)


def unscored_rows(
    config: RunConfig, plan: ScorerPlan, feature: FeatureId, settings: str, explainer: str, status: str
) -> list[dict[str, Any]]:
    """Rows that say why there is no score."""
    method = config.score.scorers[plan.name].method
    return [
        score_row(*(feature, explainer, "", plan.arm, method, source), num_records=0, status=status, settings=settings)
        for source in graded_sources(config)
    ]


class Services(NamedTuple):
    """What a scorer asks: one of them, by its method."""

    generate: Generate | None = None
    losses: TokenLosses | None = None
    embed: Embed | None = None


Connect = Callable[[RunConfig, Tables, Any, str, "SecretStr | None"], Services]
"""Makes them within the actor, of the committer, the scorer's name and the LLM's key."""


def connect(config: RunConfig, tables: Tables, committer: Any, name: str, key: SecretStr | None) -> Services:
    """Endpoints, Serve handles, or the index's encoder."""
    scorer = config.score.scorers[name]
    if isinstance(scorer, JudgeConfig):
        llm, generate = config.llms[scorer.llm], make_client(scorer.llm, config, key)
        if llm.provider == "local":  # all questions of a feature come at once, and their time runs while they wait
            generate = limited(generate, max(llm.max_concurrency // config.resources.search.num_actors, 1))
        return Services(generate)
    if isinstance(scorer, SurprisalConfig):
        return Services(losses=SimulatorClient(scorer.simulator, config, tables, committer).token_losses)
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(embedder_path(config.index.embedder))
    return Services(embed=partial(encoder.encode, normalize_embeddings=True, show_progress_bar=False))  # type: ignore[arg-type]


class Scored(NamedTuple):
    """What became of one feature."""

    rows: list[dict[str, Any]]
    num_answered: int
    """LLM calls that were answered now, and not by the ledger."""
    usd: float
    """What they cost."""
    failed: bool = False
    """Calls failed that were made."""
    outage: LLMError | None = None
    """What a plain question met with then, where that failed too."""


class ScorerActor:
    """One further scorer, for several features at a time; run as a Ray actor."""

    def __init__(
        self,
        config: RunConfig,
        tables: Tables,
        committer: Any,
        name: str,
        key: SecretStr | None = None,
        connect: Connect = connect,
    ) -> None:
        self._config, self._tables, self._committer = config, tables, committer
        self._scorer, self._arm = config.score.scorers[name], scorer_id(config, name)
        self._name = f"ScorerActor({config.name}, {name})"
        self._services = connect(config, tables, committer, name, key)
        if ray.get_runtime_context().was_current_actor_reconstructed:  # what was told to the one before is looked up
            ray.get(committer.flush.remote())

    def __repr__(self) -> str:  # on Ray's dashboard and in its logs
        return self._name

    async def score(self, work: ScorerWork, refused: str | None = None) -> Scored:
        """Rows of `scores` of one feature.

        Args:
            refused: The status of what would need a new call, where none may be made; what is remembered is used.
        """
        drawn = await asyncio.to_thread(self._load, work.feature)
        records, descriptions = each_once(drawn), list(dict.fromkeys(work.texts.values()))
        ledger, scorer = None, self._scorer
        if not records:
            answers = {text: Answers((), "no_records") for text in descriptions}
        elif isinstance(scorer, JudgeConfig):
            ledger = await self._ledger(scorer, work.feature, refused)
            answers = await self._ask(scorer, ledger, work.feature, records, descriptions)
        elif self._services.losses is not None:
            answers = await surprisal(self._services.losses, descriptions, records)
        else:
            answers = await asyncio.to_thread(self._compare, records, descriptions)
        rows = rows_of(
            *(work.feature, self._arm, scorer.method, drawn),
            {graded: answers[text] for graded, text in work.texts.items()},
            self._config,
        )
        rows = [{**row, "settings": work.settings} for row in rows]
        if refused:
            rows = [{**row, "status": refused} if row["status"] == "llm_error" else row for row in rows]
        failed = not refused and any(row["status"] == "llm_error" for row in rows)
        outage = await self._ask_plainly(scorer, work.feature) if failed and isinstance(scorer, JudgeConfig) else None
        spent = (ledger.num_new, ledger.usd_new) if ledger else (0, 0.0)
        return Scored(rows, *spent, failed, outage)

    def _load(self, feature: FeatureId) -> list[Any]:
        most = self._scorer.max_records
        drawn = some_of_each_source(load_records(self._tables, feature, ("test",))["test"], most)
        if self._config.score.num_rule_negatives:
            drawn += rule_negatives.load_rule_negatives(self._tables, [feature], most)[feature]
        return drawn

    async def _ask(
        self, scorer: JudgeConfig, ledger: Ledger, feature: FeatureId, records: list[Any], descriptions: list[str]
    ) -> dict[str, Answers]:
        llm, seed = self._config.llms[scorer.llm], self._config.seed
        if isinstance(scorer, IntruderConfig):
            asked = intruder_questions(records, scorer.num_shown, feature, seed)
            return {"": await find_intruders(ledger, llm, scorer, asked, len(records), feature, seed)}
        assert isinstance(scorer, DetectionConfig | FuzzingConfig), scorer
        shown = questions(records, scorer.num_shown, feature, seed)
        judged = (judge(ledger, llm, scorer, text, shown, feature, seed) for text in descriptions)
        return dict(zip(descriptions, await asyncio.gather(*judged), strict=True))

    async def _ask_plainly(self, scorer: JudgeConfig, feature: FeatureId) -> LLMError | None:
        """Why a plain question is not answered, if it is not; neither ledger nor account hears of it."""
        assert self._services.generate is not None, "no LLM"
        try:
            await self._services.generate(plain_question(self._config.llms[scorer.llm], 0.0), str(feature))
        except LLMError as error:
            return error
        return None

    def _compare(self, records: list[Any], descriptions: list[str]) -> dict[str, Answers]:
        assert self._services.embed is not None, "no encoder"
        vectors = read_vectors(self._tables, [record.sequence.sequence_id for record in records])
        return cosines(vectors, descriptions, np.asarray(self._services.embed(descriptions)))

    async def _ledger(self, scorer: JudgeConfig, feature: FeatureId, refused: str | None) -> Ledger:
        columns = ["request_hash", "response", "finish_reason", "prompt_tokens", "completion_tokens", "cost_usd"]
        where = f"feature_key = '{feature}'"
        rows = (await asyncio.to_thread(self._tables.read, "llm_calls", columns, where)).to_pylist()
        assert self._services.generate is not None, "no LLM"

        async def write(row: dict[str, Any]) -> None:
            await self._committer.add.remote({"llm_calls": [row]})

        generate = no_new_call if refused else self._services.generate
        return Ledger(generate, self._config.llms[scorer.llm], rows, write, "score")


async def no_new_call(request: LLMRequest, feature_key: str) -> LLMReply:
    """What is asked in place of an LLM when nothing more may be spent, or it is down."""
    raise LLMError("not asked")


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
            usd = _run_scorer(config, tables, plan, committer, progress, over_budget, connect, usd)
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


def _run_scorer(
    config: RunConfig,
    tables: Tables,
    plan: ScorerPlan,
    committer: Any,
    progress: Progress,
    over_budget: Callable[[float], str | None],
    connect: Connect,
    usd: float,
) -> float:
    """One scorer; returns the dollars spent by now."""
    actors, idle = start_actors(config, tables, plan, committer, connect)
    asks_llm = isinstance(config.score.scorers[plan.name], JudgeConfig)
    queue, running = deque((work, 0) for work in plan.work), {}
    done, total = plan.num_finished, plan.num_finished + len(plan.work)
    waiting: list[dict[str, Any]] = []
    last_write, refused = time.monotonic(), None
    outage = Outage(_has_answered(config, tables, plan), config.resources.max_outage_seconds)
    progress(done, total, plan.name)
    try:
        while queue or running or waiting:
            if asks_llm and over_budget(usd) is not None:
                refused = "no_budget"
            while queue and idle and (refused or outage.lets(bool(running))):
                (work, tries), actor = queue.popleft(), idle.pop()
                running[actor.score.options(max_task_retries=-1).remote(work, refused)] = work, tries, actor
            if not running:
                outage.wait()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0) if running else ([], [])
            for reference in ready:
                work, tries, actor = running.pop(reference)
                idle.append(actor)
                scored = ray.get(reference)
                usd += scored.usd
                outage.answered(scored.num_answered)
                if scored.failed and not refused:
                    ray.get(committer.flush.remote())  # so that the next try finds what this one was told
                    if outage.has_answered and not scored.outage:  # on what this feature asked alone
                        outage.is_up()
                        tries += 1
                    elif outage.failed(scored.outage is None or scored.outage.transient):
                        refused = "llm_error"
                    if tries < MAX_TRIES:
                        queue.append((work, tries))
                        progress(done, total, f"{plan.name}, no LLM" if outage.down else plan.name)
                        continue
                done += 1
                waiting += scored.rows
            if waiting and (not (queue or running) or time.monotonic() - last_write > COMMIT_SECONDS):
                ray.get(committer.flush.remote())  # what a score rests on is durable before it
                replace_scores(tables, waiting)
                waiting, last_write = [], time.monotonic()
                progress(done, total, plan.name)
    finally:
        for actor in actors:
            ray.kill(actor)
    return usd


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
