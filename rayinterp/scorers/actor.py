"""The scorer actor: one further scorer, several features at a time, and what it asks.

ScorerActor --questions--> LLM, through the ledger `llm_calls`; or simulator; or sentence encoder
            <-- answers --
            --rows of `scores`--> driver
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
from pydantic import SecretStr

from rayinterp import rule_negatives
from rayinterp.config import (
    DetectionConfig,
    FuzzingConfig,
    IntruderConfig,
    JudgeConfig,
    RunConfig,
    SurprisalConfig,
    scorer_id,
)
from rayinterp.explain.actor import make_client
from rayinterp.explain.client import Generate, Ledger, LLMError, LLMReply, LLMRequest, limited, plain_question
from rayinterp.feature_id import FeatureId
from rayinterp.grade import some_of_each_source
from rayinterp.index import embedder_path
from rayinterp.records import load_records
from rayinterp.scorers.embedding import Embed, cosines, read_vectors
from rayinterp.scorers.intruder import find_intruders, intruder_questions
from rayinterp.scorers.judged import judge, questions
from rayinterp.scorers.plan import ScorerWork
from rayinterp.scorers.surprisal import TokenLosses, surprisal
from rayinterp.scorers.values import Answers, each_once, rows_of
from rayinterp.simulate.client import SimulatorClient
from rayinterp.tables import Tables


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
