"""Settings of a tree search, tuned on features that the run itself does not use. Writes `tune.json`.

    config --> <run_dir>-tune: corpus to records, of other features
    sampled settings --> trial: an explainer arm of that directory --some features at a time--> objective --> ASHA

Ray Tune decides which trials go on. Each is an arm like any other, named by its content: all share one ledger, one memo
and one committer, the samples follow from the seed, and so a second call pays for nothing that is paid.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from typing import Any, NamedTuple

import fsspec
import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from rayinterp.config import RunConfig, TreeConfig, llms_used, simulators_of
from rayinterp.errors import UserError
from rayinterp.explain.actor import Connect, SearchActor, connect, llm_keys
from rayinterp.explain.rows import arm_ids
from rayinterp.explain.runner import arms_left, live_features, start_retriever
from rayinterp.feature_id import FeatureId
from rayinterp.preflight import prepare
from rayinterp.progress import Progress, silent
from rayinterp.run import deploy, open_run, run_stage, start_committer
from rayinterp.tables import Tables

SPACE: dict[str, list[Any]] = {
    "strategy": ["beam", "best_first", "successive_halving"],
    "num_llm_roots": [1, 2, 3, 5],
    "width": [1, 2, 3, 4],
    "branching_factor": [1, 2, 3],
    "depth": [0, 1, 2, 3, 4],
    "temperature": [0.6, 0.8, 1.0, 1.2],
    "num_records_shown": [5, 10, 15, 20],
}
"""What is tried. Choices rather than ranges: trials that ask the same question share its answer."""
NUM_SAMPLED = 64
"""Features per SAE that the tuning directory knows, most of them live one hopes."""
FEATURES_A_REPORT = 2
"""A trial says how it does after each so many features, and may be stopped."""
STAGES = ("corpus", "harvest", "index", "records")


class Tuned(NamedTuple):
    """What came of it."""

    metric: str
    """What trials were compared by."""
    trials: list[dict[str, Any]]
    """Best first: settings, explainer, num_features, valid_score, usd, tokens, objective, finished."""

    @property
    def best(self) -> dict[str, Any]:
        return self.trials[0]


def tune_search(
    config: RunConfig,
    arm: str,
    num_samples: int = 20,
    num_features: int = 8,
    progress: Progress = silent,
    connect: Connect = connect,
) -> Tuned:
    """Tries settings of one tree arm.

    Raises:
        UserError: no such arm, or no features are left to tune on.
    """
    _tree(config, arm)
    run = open_run(tuning_config(config), (*STAGES, "explain"))
    for stage in STAGES:
        run_stage(run, stage)
    features = live_features(run.tables)[:num_features]
    if not features:
        raise UserError(f"none of the features sampled for tuning is live; see record_counts in {run.config.run_dir!r}")
    base = run.config.model_copy(update={"explainers": {arm: _tree(config, arm)}})
    committer = start_committer(run.tables)
    deploy(run, set(simulators_of(base.explainers[arm])), llms_used(base))
    retriever = start_retriever(base, run.tables) if _tree(base, arm).falsifier else None
    trial = tune.with_parameters(
        _trial, base=base, arm=arm, features=features, tables=run.tables, committer=committer,
        services=(llm_keys(base), retriever, connect),
    )  # fmt: skip
    resources = config.resources.search
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tuner = tune.Tuner(
                tune.with_resources(trial, {"cpu": resources.num_cpus}),
                param_space={name: tune.choice(values) for name, values in space(_tree(base, arm)).items()},
                tune_config=tune.TuneConfig(
                    metric="objective",
                    mode="max",
                    num_samples=num_samples,
                    max_concurrent_trials=resources.num_actors,
                    search_alg=BasicVariantGenerator(random_state=config.seed),
                    scheduler=ASHAScheduler(
                        time_attr="num_features",
                        max_t=len(features),
                        grace_period=min(FEATURES_A_REPORT, len(features)),
                        reduction_factor=2,
                    ),
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch, verbose=0, callbacks=[_Told(progress, num_samples * len(features))]
                ),
            )
            results = tuner.fit()
    finally:
        ray.get(committer.flush.remote())
        for actor in filter(None, (committer, retriever)):
            ray.kill(actor)
    for table in ("llm_calls", "candidates", "explanations", "simulations"):
        run.tables.finish(table)
    if results.errors:
        said = str(results.errors[0]).strip().splitlines()[-1]
        raise UserError(f"{len(results.errors)} of {num_samples} trials failed, the first with: {said}")
    tuned = Tuned(metric_of(base, arm), _ranked([r.metrics for r in results if r.metrics], len(features)))
    _write(run.config, {"arm": arm, "features": [str(feature) for feature in features], **tuned._asdict()})
    return tuned


def tuning_config(config: RunConfig) -> RunConfig:
    """The run's own config in a directory beside it, on a sample of the features that it leaves out.

    Raises:
        UserError: it leaves none out.
    """
    everything = config.model_copy(update={"subject": config.subject.model_copy(update={"features": "all"})})
    of_all, own = prepare(everything).features, prepare(config).features
    left = sorted(set.intersection(*map(set, of_all.values())) - set().union(*own.values()))
    if not left:
        raise UserError(
            f"subject.features is {config.subject.features!r}: every feature is the run's own, and settings are tuned "
            "on others; set a smaller number"
        )
    generator = np.random.default_rng([config.seed, *b"tune"])
    sample = sorted(generator.choice(left, min(NUM_SAMPLED, len(left)), replace=False).tolist())
    subject = config.subject.model_copy(update={"features": sample})
    return config.model_copy(update={"run_dir": f"{config.run_dir.rstrip('/')}-tune", "subject": subject})


def space(arm: TreeConfig) -> dict[str, list[Any]]:
    """What may be tried with this arm: one that has a cascade looks first in its own way."""
    if arm.cascade is None:
        return SPACE
    return {**SPACE, "strategy": [s for s in SPACE["strategy"] if s != "successive_halving"]}


def metric_of(config: RunConfig, arm: str) -> str:
    """Dollars where the LLM has a price."""
    llm = config.llms[_tree(config, arm).llm]
    return "valid score per dollar" if _has_price(llm) else "valid score per 1,000 LLM tokens"


def objective(valid_scores: list[float | None], usd: float | None, tokens: int) -> float:
    """Mean valid score of the winners by mean cost of a feature; a feature without a winner counts as 0.

    What another trial has paid for counts too: it is what the settings would cost by themselves.
    """
    total = sum(score or 0.0 for score in valid_scores)
    cost = tokens / 1000 if usd is None else usd
    return total / cost if cost else 0.0


def measured(config: RunConfig, tables: Tables, arm: str, features: list[FeatureId]) -> dict[str, Any]:
    """What the tables say of an arm on some features."""
    explainer, keys = arm_ids(config, arm)[0], {str(feature) for feature in features}
    where = f"explainer = '{explainer}'"
    winners = tables.read("explanations", ["feature_key", "valid_score"], where).to_pylist()
    nodes = tables.read("candidates", ["feature_key", "prompt_tokens", "completion_tokens", "cost_usd"], where)
    paid = [node for node in nodes.to_pylist() if node["feature_key"] in keys]
    scores = [row["valid_score"] for row in winners if row["feature_key"] in keys]
    tokens = sum(node["prompt_tokens"] + node["completion_tokens"] for node in paid)
    usd = sum(node["cost_usd"] or 0.0 for node in paid) if _has_price(config.llms[_tree(config, arm).llm]) else None
    return {
        "explainer": explainer,
        "num_features": len(scores),
        "valid_score": float(np.mean([score or 0.0 for score in scores])),
        "usd": usd,
        "tokens": tokens,
        "objective": objective(scores, usd, tokens),
    }


def _trial(
    settings: dict[str, Any],
    base: RunConfig,
    arm: str,
    features: list[FeatureId],
    tables: Tables,
    committer: Any,
    services: tuple[Any, Any, Connect],
) -> None:
    """One arm, feature by feature, within one process: what a search actor does, without its driver."""
    tree = TreeConfig.model_validate(_tree(base, arm).model_dump() | settings)
    config = base.model_copy(update={"explainers": {arm: tree}})
    keys, retriever, connect = services

    async def searches() -> None:
        actor = SearchActor(config, tables, committer, keys, retriever, connect)
        for done in range(FEATURES_A_REPORT, len(features) + FEATURES_A_REPORT, FEATURES_A_REPORT):
            block = features[max(done - FEATURES_A_REPORT, 0) : done]
            left = arms_left(config, tables, block)
            searches = (actor.explain(f, [arm], has_llm=True, fresh=False, tolerant=False) for f in left)
            failures = [done.failure for done in await asyncio.gather(*searches) if done.failure]
            await committer.flush.remote()
            if failures:  # left for the next call: what failed is no measure of the settings
                raise UserError(f"LLM calls failed ({failures[0]}); what is paid is kept: run the same command again")
            tune.report({**measured(config, tables, arm, features[:done]), "settings": settings})

    asyncio.run(searches())


def _ranked(metrics: list[dict[str, Any]], num_features: int) -> list[dict[str, Any]]:
    """Trials that saw all features before those that were stopped; of each the better first."""
    names = ("settings", "explainer", "num_features", "valid_score", "usd", "tokens", "objective")
    trials = [{name: metric[name] for name in names} for metric in metrics if "objective" in metric]
    trials = [trial | {"finished": trial["num_features"] == num_features} for trial in trials]
    return sorted(trials, key=lambda trial: (not trial["finished"], -trial["objective"]))


def _tree(config: RunConfig, arm: str) -> TreeConfig:
    found = config.explainers.get(arm)
    if not isinstance(found, TreeConfig):
        trees = [name for name, explainer in config.explainers.items() if isinstance(explainer, TreeConfig)]
        raise UserError(
            f"--arm is {arm!r}, which is no explainer with method: tree; there are: {', '.join(trees) or 'none'}"
        )
    return found


def _has_price(llm: Any) -> bool:
    return llm.usd_per_million_prompt_tokens is not None and llm.usd_per_million_completion_tokens is not None


def _write(config: RunConfig, results: dict[str, Any]) -> None:
    filesystem, path = fsspec.core.url_to_fs(f"{config.run_dir}/tune.json")
    filesystem.pipe_file(path, json.dumps(results, indent=2).encode())


class _Told(tune.Callback):
    """Passes on how many features the trials have done, of all that they would do if none were stopped."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._done: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._done[trial.trial_id] = result["num_features"]
        self._progress(sum(self._done.values()), self._total)
