"""The whole run: stages in order over one run directory, which remembers its config and what made it.

    prepare (no Ray) -> connect -> corpus -> harvest -> index -> records -> explain -> score -> report

Every stage reads from its tables what is left to do, so running again is safe and short.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import ray
import yaml
from ray import serve
from ray._private import worker
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.serve.exceptions import RayServeException

from rayinterp.config import (
    UPSTREAM,
    JudgeConfig,
    LLMSimulatorConfig,
    RunConfig,
    StageResources,
    SurprisalConfig,
    differing_fields,
    llms_used,
    service_name,
    simulators_of,
    to_yaml,
)
from rayinterp.corpus import run_corpus
from rayinterp.errors import EngineError, UserError
from rayinterp.explain.local import deploy_llm
from rayinterp.explain.rows import arm_ids
from rayinterp.explain.runner import arms_left, dollars_spent, live_features, reopen, run_explain
from rayinterp.grade import run_score
from rayinterp.grade_plan import plan_score
from rayinterp.harvest import run_harvest
from rayinterp.holistic import run_holistic
from rayinterp.index import run_index
from rayinterp.plan import by_stage, plan_run
from rayinterp.pools import beside_driver
from rayinterp.preflight import Prepared, check_outlasts_job, prepare
from rayinterp.progress import Progress, Published, silent
from rayinterp.rating import run_complexity, unrated
from rayinterp.records import run_records
from rayinterp.report import write_report
from rayinterp.rule_negatives import add_rule_negatives
from rayinterp.scorers.plan import plan_scorers
from rayinterp.scorers.runner import run_scorers
from rayinterp.simulate.serve import deploy_simulator
from rayinterp.sizes import measure
from rayinterp.tables import Committer, Tables
from rayinterp.usage import Meter, update_manifest, write_whole

PACKAGES = ("rayinterp", "ray", "torch", "transformers", "pylance", "lancedb", "lance-ray", "sae-lens", "pydantic")
"""Versions that the manifest keeps."""

ESTIMATED = ("seconds", "gpu_hours", "usd", "llm_calls")
"""Of the plan, what the manifest keeps of every stage."""

STAGES = ("corpus", "harvest", "index", "records", "explain", "score", "report")


class Run(NamedTuple):
    """What every stage is handed."""

    config: RunConfig
    tables: Tables
    prepared: Prepared


def open_run(config: RunConfig, stages: Sequence[str] = STAGES) -> Run:
    """Checks the config, and the run directory against it, and writes `run.yaml` and `manifest.json`.

    Raises:
        UserError: the config cannot work here, or the directory holds tables of another upstream config.
    """
    if in_a_jobs_copy():
        check_outlasts_job(config.run_dir)
    prepared = prepare(config, stages)
    freeze(config)
    write_manifest(config, {}, estimate(config))
    return Run(config, Tables(absolute(config.run_dir)), prepared)


def in_a_jobs_copy() -> bool:
    """Whether this is a Ray job that was submitted with its working directory."""
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
    return bool((job.get("runtime_env") or {}).get("working_dir"))


def absolute(run_dir: str) -> str:
    """The run directory as workers find it, whatever folder they run in; URLs stay as they are."""
    return run_dir if "://" in run_dir else str(Path(run_dir).resolve())


def freeze(config: RunConfig) -> None:
    """Writes `run.yaml`; refuses a directory whose upstream tables were made by other settings."""
    path = _path(config, "run.yaml")
    filesystem, name = fsspec.core.url_to_fs(path)
    content = to_yaml(config).encode()
    if filesystem.exists(name):
        before = filesystem.cat_file(name)
        if before == content:
            return
        old = yaml.safe_load(before)
        if not isinstance(old, dict):
            raise UserError(f"{path} is damaged: it holds no settings; put back what it held, or delete it")
        differing = differing_fields(old, config.model_dump(mode="json"))
        tables = Tables(absolute(config.run_dir))
        if differing and any(tables.exists(table) for table in ("windows", "corpus_files", "sequences")):
            raise UserError(
                f"run_dir {config.run_dir!r} holds tables made with other settings:\n"
                + "\n".join(f"  {line}" for line in differing)
                + f"\nGive another run_dir, or set these back. Sections {', '.join(UPSTREAM)} are fixed per directory; "
                "explainers, simulators, LLMs and resources may change."
            )
    write_whole(filesystem, name, content)


def estimate(config: RunConfig) -> dict[str, dict[str, float | None]]:
    """What every stage of the whole run should take, for the report to hold against what it took."""
    planned = by_stage(plan_run(config, measure(config)))
    return {stage: {name: getattr(plan, name) for name in ESTIMATED} for stage, plan in planned.items()}


def write_manifest(
    config: RunConfig, counts: dict[str, dict[str, int]], estimated: dict[str, dict[str, float | None]] | None = None
) -> None:
    """Adds versions and stage counts to `manifest.json`, and the estimate of a run that begins."""

    def change(manifest: dict[str, Any]) -> None:
        manifest.setdefault("stages", {}).update(counts)
        manifest["packages"] = {package: _version(package) for package in PACKAGES}
        manifest["python"] = platform.python_version()
        manifest["models"] = {
            "subject": [config.subject.model, config.subject.revision],
            "saes": [config.subject.saes.release, config.subject.saes.sae_id],
            "embedder": config.index.embedder,
        }
        manifest.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
        if estimated is not None:
            manifest["estimate"] = estimated

    update_manifest(config.run_dir, change)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _path(config: RunConfig, name: str) -> str:
    return f"{config.run_dir.rstrip('/')}/{name}"


@contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """Joins the cluster that the config or RAY_ADDRESS names, or that `ray start` has left on this machine, as on the
    head of a cluster; else starts a local one for the time of the block.

    A cluster that is already connected is used and left running.
    """
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # its bars are off, as asked
    address = config.resources.address or os.environ.get("RAY_ADDRESS")
    context = ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
    if is_open(context.dashboard_url) and os.environ.get("RAY_AUTH_MODE") != "token":
        warnings.warn(
            f"the cluster's dashboard and job server answer at {context.dashboard_url}: whoever reaches that may run "
            "code on the cluster. Start Ray with --dashboard-host=127.0.0.1; docs/security.md says how to reach it",
            stacklevel=2,
        )
    try:
        if started_here():
            check_gpus(config)
        yield
    finally:
        try:
            stop_services(config)
        finally:
            ray.shutdown()


def started_here() -> bool:
    """Whether this process has started the Ray it is connected to, and nobody can add nodes."""
    node = worker._global_node
    return node is not None and node.is_head()


def is_open(dashboard_url: str | None) -> bool:
    """Whether a dashboard (`host:port`; empty for none) answers beyond its own machine."""
    host = (dashboard_url or "").rpartition(":")[0].strip("[]")
    return host not in ("", "localhost", "127.0.0.1", "::1")


def check_gpus(config: RunConfig) -> None:
    """On a machine of its own a run cannot wait for GPUs to join.

    Raises:
        UserError: a stage asks for more GPUs than there are.
    """
    there = ray.cluster_resources().get("GPU", 0)
    for stage, resources in config.resources:
        if isinstance(resources, StageResources) and resources.num_actors * resources.num_gpus > there:
            raise UserError(
                f"resources.{stage} asks for {resources.num_actors} x {resources.num_gpus:g} GPUs, this machine has "
                f"{there:g}; set resources.{stage}.num_gpus=0 to use CPUs, or join a cluster with resources.address"
            )


def stop_services(config: RunConfig) -> None:
    """Takes down this run's Serve apps; on a cluster that others use, theirs stay, and those that are shared."""
    standing = config.resources.standing
    ours = {service_name("simulator", name, config) for name in config.simulators if name not in standing}
    ours |= {service_name("llm", name, config) for name in config.llms}
    for app in ours & set(serve.status().applications):
        serve.delete(app, _blocking=False)  # a replica may take minutes to answer what it has


def deploy(run: Run, simulators: set[str], llms: set[str]) -> None:
    """Starts the Serve apps that a stage needs and that do not run yet."""
    config = run.config
    for name in sorted(simulators):
        app = service_name("simulator", name, config)
        deploy_simulator(name, config.simulators[name], config.resources.simulator, app)
    for name in sorted(llms):
        if config.llms[name].provider == "local":
            deploy_llm(service_name("llm", name, config), config.llms[name], config.resources.llm)


def start_committer(tables: Tables) -> Any:
    """The run's one writer of search results. Lost with what it holds, it is not started anew: the stage ends, and the
    next run does again what was not durable."""
    return ray.remote(Committer).options(num_cpus=0, scheduling_strategy=beside_driver()).remote(tables)


def service_gpus(config: RunConfig) -> float | None:
    """GPUs that replicas of this run's services hold now; None where Serve does not say."""
    resources = config.resources
    held = {
        service_name("simulator", name, config): resources.simulator.num_gpus
        for name, arm in config.simulators.items()
        if isinstance(arm, LLMSimulatorConfig)
    }
    held |= {
        service_name("llm", name, config): resources.llm.num_gpus
        for name, arm in config.llms.items()
        if arm.provider == "local"
    }
    if not any(held.values()):
        return 0.0
    try:
        apps = serve.status().applications
    except (RayError, RayServeException):  # its controller may be starting, or gone
        return None
    return sum(
        num_gpus * sum(count for state, count in deployment.replica_states.items() if state != "STOPPED")
        for app, num_gpus in held.items()
        if app in apps
        for deployment in apps[app].deployments.values()
    )


def corpus(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Text to `sequences`, by actors that tokenise."""
    with meter.holds(run.config.resources.corpus):
        return run_corpus(run.config, run.tables, progress)


def harvest(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Sequences to `activations` and `features`, by actors with the subject model and its SAEs."""
    with meter.holds(run.config.resources.harvest):
        return run_harvest(run.config, run.tables, *run.prepared, progress)


def index(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Sequences to `embeddings`, by actors with a sentence encoder."""
    with meter.holds(run.config.resources.index):
        return run_index(run.config, run.tables, progress)


def records(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Every feature's `records`; where arms ask for them, `holistic` activations, by actors as in harvest."""
    counts = run_records(run.config, run.tables, *run.prepared, progress)
    with meter.holds(run.config.resources.harvest):
        return counts | run_holistic(run.config, run.tables, *run.prepared, progress)


def explain(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Records to `explanations`: deploys what the arms ask, and searches until every arm has a row for each feature."""
    config = run.config
    reopen(config, run.tables, meter.over_budget)
    if not arms_left(config, run.tables, live_features(run.tables)):
        counts = run_explain(config, run.tables, None, progress)
    else:
        committer = start_committer(run.tables)
        deploy(run, {name for arm in config.explainers.values() for name in simulators_of(arm)}, llms_used(config))
        counts = run_explain(config, run.tables, committer, progress, meter.over_budget)
    for table in ("llm_calls", "candidates", "explanations", "simulations"):
        if not run.tables.is_finished(table):  # by a run that was killed here, say
            run.tables.finish(table)
    return counts


def score(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Explanations to `scores` and `complexity`, on test: first the rule negatives are drawn, then what is to be graded
    is planned with them, and what that asks is deployed."""
    config, tables = run.config, run.tables
    explainers = [arm_ids(config, name)[0] for name in config.explainers]
    to_grade = plan_score(config, tables, explainers).explanations()
    for plan in plan_scorers(config, tables, explainers):
        to_grade = {work.feature: work.explanations for work in plan.work if work.explanations} | to_grade
    with meter.holds(config.resources.index):
        add_rule_negatives(config, tables, to_grade)
    plan = plan_score(config, tables, explainers)  # with the records that were added
    scorers = plan_scorers(config, tables, explainers)
    arms = [config.score.scorers[one.name] for one in scorers if one.work]
    committer = start_committer(tables) if plan.blocks or arms else None
    rater = config.score.complexity.simulator
    raters = {rater} if rater and unrated(config, tables, explainers) else set()
    simulators = {arm.simulator for arm in arms if isinstance(arm, SurprisalConfig)}
    deploy(
        run,
        {simulator for simulator, _ in plan.blocks} | simulators | raters,
        {arm.llm for arm in arms if isinstance(arm, JudgeConfig)},
    )
    run_complexity(config, tables, explainers)
    counts = run_score(config, tables, plan, committer, progress)
    usd = dollars_spent(tables)
    return counts | run_scorers(
        config, tables, scorers, committer, progress, lambda more: meter.over_budget(usd + more)
    )


def report(run: Run, progress: Progress, meter: Meter) -> dict[str, int]:
    """Writes report.html from the tables."""
    write_report(run.tables, run.config)
    return {}


_RUNNERS: dict[str, Callable[[Run, Progress, Meter], dict[str, int]]] = {
    "corpus": corpus,
    "harvest": harvest,
    "index": index,
    "records": records,
    "explain": explain,
    "score": score,
    "report": report,
}

_READS: dict[str, str] = {
    "harvest": "sequences",
    "index": "sequences",
    "records": "embeddings",
    "explain": "record_counts",
    "score": "explanations",
    "report": "features",
}
"""The table without which a stage has nothing to read; the stage before it writes that."""


def run_stage(run: Run, stage: str, progress: Progress = silent) -> dict[str, int]:
    """Does what is left of one stage; returns counts for people.

    Raises:
        UserError: the stage before it has not run, the budget or the disk is spent, or a process was lost.
    """
    needed = _READS.get(stage)
    if needed and not run.tables.exists(needed):
        raise UserError(
            f"stage {stage} reads the table {needed}, which {run.config.run_dir!r} does not hold yet; run the stages "
            f"before it first: {', '.join(STAGES[: STAGES.index(stage)])}"
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they would be drawn on top of ours
    context.raise_original_map_exception = True  # so that a worker's UserError reaches the user as one
    try:
        with Meter(run.config, stage, lambda: service_gpus(run.config)) as meter:
            told = Published(run.config.name, stage, progress)
            counts = _RUNNERS[stage](run, meter.within_budget(told, dollars_spent(run.tables)), meter)
    except (RayActorError, OutOfMemoryError) as error:
        said = str(error).strip().splitlines()[-1]
        raise UserError(
            f"stage {stage} lost a process that it cannot go on without ({said}); what is committed is kept: run the "
            "same command again"
        ) from error
    except EngineError as error:
        raise UserError(
            f"stage {stage}: {str(error).strip().splitlines()[-1]}, on several replicas; what is committed is kept: "
            "their logs, on Ray's dashboard, say what they lack; run the same command again"
        ) from error
    except OSError as error:  # of a worker, too: Ray raises what it raised
        if "no space left" not in str(error).lower():
            raise
        raise UserError(
            f"stage {stage}: no space left for {run.config.run_dir!r}; what is committed is kept: make room and run "
            "the same command again"
        ) from error
    if counts:
        write_manifest(run.config, {stage: counts})
    return counts
