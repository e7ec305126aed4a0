"""A run as a Ray job: what travels with it to the cluster, and its log, followed from here.

    config -> check -> runtime environment -> job server -> log lines, until the job ends

A job that was stopped, or lost its cluster, is submitted again with the same arguments: its run directory says what is
left to do.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from rayinterp.config import RunConfig, StageResources, judges_used, llms_used
from rayinterp.errors import UserError
from rayinterp.preflight import check_outlasts_job

NODE_VARIABLES = (
    *("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL"),
    *("AWS_ALLOW_HTTP", "GOOGLE_APPLICATION_CREDENTIALS"),
)
"""What models and buckets are reached with, where a node has it."""
SIDE_BY_SIDE = {"harvest", "index"}
"""Stages that may work on one run directory at the same time."""
CONSTRAINTS = "constraints.txt"
AGENT_SECONDS = 60
"""A head that has just come up answers before the agent that starts jobs does."""
LOST_SECONDS = 60
"""How long a log is asked for again after the connection was lost."""


def runtime_env(config: RunConfig) -> dict[str, Any]:
    """What Ray lays out on every node before the job starts there. `.gitignore` and `.rayignore` say what stays here.

    Raises:
        UserError: an extra that rayinterp does not have.
    """
    job = config.job
    env: dict[str, Any] = {"env_vars": dict(job.env)} if job.env else {}
    if job.image:
        return env | {"container": {"image": job.image, "run_options": container_options(config)}}
    env |= {"working_dir": str(Path(job.working_dir).resolve()), "excludes": list(job.excludes)}
    if job.extras:
        packages = requirements_of(job.extras, pins(Path(job.working_dir) / CONSTRAINTS))
        env["pip"] = {"packages": packages, "pip_check": False}
    return env


def container_options(config: RunConfig) -> list[str]:
    """What podman is told of a job's container: the node's GPUs, and which of its variables to hand on, by name.

    Ray itself hands on what begins with RAY_ and no more.
    """
    asked = [config.llms[name] for name in llms_used(config) | judges_used(config)]
    keys = [llm.api_key_env for llm in asked if llm.provider == "openai"]
    pools = [resources for _, resources in config.resources if isinstance(resources, StageResources)]
    gpus = ["--device=nvidia.com/gpu=all"] if any(pool.num_gpus for pool in pools) else []
    return [*gpus, *(f"--env={name}" for name in sorted({*keys, *NODE_VARIABLES}))]


def requirements_of(extras: list[str], pinned: dict[str, str]) -> list[str]:
    """What the extras add to rayinterp, with exact versions where they are pinned.

    Raises:
        UserError: an extra that rayinterp does not have.
    """
    known = metadata.metadata("rayinterp").get_all("Provides-Extra") or []
    for extra in extras:
        if extra not in known:
            raise UserError(f"job.extras has {extra!r}, which is no extra of rayinterp; it has {', '.join(known)}")
    found = []
    for requirement in map(Requirement, metadata.requires("rayinterp") or []):
        marker = requirement.marker
        if marker and not marker.evaluate({"extra": ""}) and any(marker.evaluate({"extra": extra}) for extra in extras):
            version = pinned.get(_normal(requirement.name))
            found.append(f"{requirement.name}=={version}" if version else f"{requirement.name}{requirement.specifier}")
    return sorted(set(found))


def pins(path: Path) -> dict[str, str]:
    """Versions by package name, from lines `name==version`."""
    lines = path.read_text().splitlines() if path.exists() else []
    split = (line.split("#")[0].partition("==") for line in lines)
    return {_normal(name): version.strip() for name, sign, version in split if sign}


def _normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def entrypoint(script: str, arguments: list[str]) -> str:
    """The shell command that the job runs."""
    return shlex.join(["python", f"jobs/{script}.py", *arguments])


def check_job(config: RunConfig, config_path: str, script: str) -> None:
    """What can be known to go wrong on the cluster.

    Raises:
        UserError: a run directory that would be lost with the job, a file that does not travel with it, or one that is
            another there.
    """
    check_outlasts_job(config.run_dir)
    if Path(config_path).is_absolute() or ".." in Path(config_path).parts:
        raise UserError(f"config {config_path!r} lies outside of job.working_dir; name it relative to that folder")
    if config.job.image:
        return
    folder = Path(config.job.working_dir)
    for file in (config_path, f"jobs/{script}.py"):
        if not (folder / file).exists():
            raise UserError(
                f"job.working_dir {config.job.working_dir!r} has no {file}, which the job reads; set it to a checkout "
                "of rayinterp"
            )
        if stays_here(folder.resolve(), file, config.job.excludes):
            raise UserError(
                f"{file} stays here, by .gitignore, .rayignore or job.excludes of job.working_dir "
                f"{config.job.working_dir!r}, and the job reads it; move it to configs/, say"
            )
    if (folder / config_path).read_bytes() != Path(config_path).read_bytes():
        raise UserError(
            f"{config_path} is another file here than in job.working_dir {config.job.working_dir!r}, which the job "
            "reads; submit from that folder"
        )


def stays_here(folder: Path, file: str, excludes: list[str]) -> bool:
    """Whether Ray leaves a file of a working directory behind."""
    patterns = [*get_excludes_from_ignore_files(folder, include_gitignore=True), _get_excludes(folder, excludes)]
    return any(left(folder / file) for left in patterns)


def connect(address: str) -> JobSubmissionClient:
    """The job server of a cluster.

    Raises:
        UserError: nobody answers there, or not without a token.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else Ray takes RAY_ADDRESS over the address that it is given
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"the job server at {address!r} asks for a token: set RAY_AUTH_MODE=token, with the cluster's token in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on the head prints it)"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no job server answers at {address!r} ({_first_line(error)}); `ray dashboard cluster/aws.yaml` opens a "
            "tunnel to one, `ray start --head` starts one on this machine"
        ) from None


def submit(client: JobSubmissionClient, config: RunConfig, config_path: str, script: str, arguments: list[str]) -> str:
    """Starts the job; returns its submission id.

    Args:
        script: The entry point in jobs/, e.g. run.
        arguments: Its own.

    Raises:
        UserError: what `check_job` finds, another job at work on the run directory, or what the server says against it.
    """
    check_job(config, config_path, script)
    for job in client.list_jobs():
        if not job.status.is_terminal() and _in_the_way(job.metadata or {}, config.run_dir, script):
            raise UserError(
                f"job {job.submission_id} is at work on run_dir {config.run_dir!r}; follow it with `ray job logs "
                f"--follow {job.submission_id}`, or end it with `ray job stop {job.submission_id}` and submit again"
            )
    job = {
        "entrypoint": entrypoint(script, arguments),
        "runtime_env": runtime_env(config),
        "metadata": {"run_dir": config.run_dir, "run": config.name, "config": config_path, "job": script},
        "submission_id": f"{re.sub(r'[^a-zA-Z0-9]+', '-', config.name)}-{script}-{uuid.uuid4().hex[:6]}",
    }
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"the job server did not take the job: {_first_line(error)}") from None
            time.sleep(1)


def _in_the_way(job: dict[str, str], run_dir: str, script: str) -> bool:
    """Whether a job at work (its metadata) writes what this one would."""
    same = job.get("run_dir", "").rstrip("/") == run_dir.rstrip("/")
    return same and {job.get("job"), script} != SIDE_BY_SIDE


def follow(client: JobSubmissionClient, submission_id: str, say: Callable[[str], None]) -> JobStatus:
    """Hands the job's log over as it grows; returns how it ended. To stop following ends nothing on the cluster.

    Raises:
        UserError: the job server has not answered for `LOST_SECONDS`; the job goes on.
    """
    said, answered = 0, time.monotonic()

    async def tail() -> None:
        nonlocal said, answered
        place = 0  # a log that is asked for again comes from its start
        async for text in client.tail_job_logs(submission_id):
            say(text[max(said - place, 0) :])
            place += len(text)
            said, answered = max(said, place), time.monotonic()

    while True:
        try:
            asyncio.run(tail())
            status = client.get_job_status(submission_id)
            if status.is_terminal():
                return status
            answered = time.monotonic()
        except (RuntimeError, OSError, ClientError) as error:  # a tunnel that was cut, a head that is busy
            if time.monotonic() - answered > LOST_SECONDS:
                raise UserError(
                    f"the job server has not answered for {LOST_SECONDS} s ({_first_line(error)}); if the head stands, "
                    f"job {submission_id} goes on: `ray job logs --follow {submission_id}` shows it again"
                ) from None
        time.sleep(1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
