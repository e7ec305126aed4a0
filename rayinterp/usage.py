"""What a run has spent, kept in `manifest.json` over all of its resumptions and held against its budget.

    run_stage -> Meter (a thread writes every 30 s, and at the end) -> manifest["usage"][stage]
                   | over_budget(usd): a sentence once a limit is reached, without looking at anything but the clock

Knows nothing of Ray: what services hold is a call that it is handed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from rayinterp.config import BudgetConfig, PoolResources, RunConfig
from rayinterp.errors import UserError
from rayinterp.progress import Progress

MANIFEST, LOCK = "manifest.json", ".write-manifest"
SAVE_SECONDS = 30.0
"""What a kill may lose of the account."""
WITHHELD = ("corpus", "harvest", "index", "records")
"""Stages that stop when the budget is spent; explain asks for itself, and so do scorers that ask an LLM."""

_writing = threading.Lock()
logger = logging.getLogger(__name__)


def read_manifest(run_dir: str) -> dict[str, Any]:
    """What the run directory says of itself; empty where it says nothing yet."""
    filesystem, name = fsspec.core.url_to_fs(f"{run_dir.rstrip('/')}/{MANIFEST}")
    return json.loads(filesystem.cat_file(name)) if filesystem.exists(name) else {}


def update_manifest(run_dir: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Reads, changes and writes `manifest.json`.

    Harvest and index may have a driver each: on a disk they take turns. An object store cannot be locked; there what
    one of them wrote in the same moment is written again with its next account, half a minute later.
    """
    filesystem, name = fsspec.core.url_to_fs(f"{run_dir.rstrip('/')}/{MANIFEST}")
    on_disk = isinstance(filesystem, LocalFileSystem)
    with _writing, FileLock(f"{run_dir}/{LOCK}") if on_disk else nullcontext():
        manifest = read_manifest(run_dir)
        change(manifest)
        write_whole(filesystem, name, json.dumps(manifest, indent=2).encode())


def write_whole(filesystem: AbstractFileSystem, name: str, content: bytes) -> None:
    """Replaces a file: whoever reads meanwhile, or after a kill, finds the old content or the new one."""
    if not isinstance(filesystem, LocalFileSystem):  # an object store replaces an object whole as it is
        filesystem.pipe_file(name, content)
        return
    part = f"{name}.{os.getpid()}.part"  # of two drivers on one directory, each its own
    try:
        filesystem.pipe_file(part, content)
        os.replace(part, name)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise


class Spent(NamedTuple):
    """Time of a stage, or of a run."""

    seconds: float = 0.0
    """On the clock."""
    gpu_hours: float = 0.0
    """GPUs held by its actors and services, busy or not."""

    def plus(self, seconds: float, num_gpus: float) -> Spent:
        return Spent(self.seconds + seconds, self.gpu_hours + num_gpus * seconds / 3600)


def usage_of(manifest: dict[str, Any]) -> dict[str, Spent]:
    """What every stage has spent so far."""
    return {
        stage: Spent(float(spent["seconds"]), float(spent["gpu_hours"]))
        for stage, spent in manifest.get("usage", {}).items()
    }


def exceeded(budget: BudgetConfig, spent: Spent, usd: float) -> str | None:
    """The first limit that is reached, with what is spent and what to do; None while there is something left.

    Args:
        usd: What LLM calls have cost.
    """
    usd += (budget.usd_per_gpu_hour or 0) * spent.gpu_hours
    for field, limit, used in (
        ("max_usd", budget.max_usd, usd),
        ("max_gpu_hours", budget.max_gpu_hours, spent.gpu_hours),
        ("max_hours", budget.max_hours, spent.seconds / 3600),
    ):
        if limit is not None and used >= limit:
            unit = {"max_usd": "dollars", "max_gpu_hours": "GPU-hours", "max_hours": "hours"}[field]
            return (
                f"budget.{field} is {limit:g}, and {used:.4g} {unit} are spent; nothing that is computed is lost: "
                f"raise budget.{field} and run the same command again to go on where it stopped"
            )
    return None


class Meter:
    """Counts one stage's time, on top of what the manifest says of earlier runs. A context manager.

    Args:
        service_gpus: GPUs that services hold now; None where that cannot be told, and what was last known stands.
        clock: Seconds that only go up.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        service_gpus: Callable[[], float | None] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir, self._budget, self._stage = config.run_dir, config.budget, stage
        self._service_gpus, self._clock = service_gpus, clock
        before = usage_of(read_manifest(config.run_dir))
        self._spent = before.get(stage, Spent())
        others = [spent for name, spent in before.items() if name != stage]
        self._others = Spent(sum(s.seconds for s in others), sum(s.gpu_hours for s in others))
        self._gpus_of_pool = self._gpus_of_services = 0.0
        self._last = clock()
        self._counting, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_saving, name="usage", daemon=True)

    def __enter__(self) -> Meter:
        self._gpus_of_services = self._service_gpus() or 0.0
        self._last = self._clock()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.save()

    def _keep_saving(self) -> None:
        while not self._ended.wait(SAVE_SECONDS):
            try:
                self.save()
            except Exception as error:  # a store that does not answer now may do so in half a minute
                logger.warning("what stage %s has spent could not be written down: %s", self._stage, error)

    def save(self) -> None:
        """Asks what services hold, counts up to now and writes it down."""
        gpus = self._service_gpus()
        with self._counting:
            if gpus is not None:
                self._gpus_of_services = gpus
            self._count()
            spent = self._spent
        account = {"seconds": round(spent.seconds, 1), "gpu_hours": round(spent.gpu_hours, 5)}
        update_manifest(self._run_dir, lambda manifest: manifest.setdefault("usage", {}).update({self._stage: account}))

    def _count(self) -> None:
        now = self._clock()
        self._spent, self._last = self._up_to(now), now

    def _up_to(self, now: float) -> Spent:
        return self._spent.plus(now - self._last, self._gpus_of_pool + self._gpus_of_services)

    @contextmanager
    def holds(self, actors: PoolResources) -> Iterator[None]:
        """For the time that a pool of actors works; one that may grow counts as grown."""
        with self._counting:
            self._count()
            self._gpus_of_pool = actors.most_actors * actors.num_gpus
        try:
            yield
        finally:
            with self._counting:
                self._count()
                self._gpus_of_pool = 0.0

    def spent(self) -> Spent:
        """By all stages, in this run and those before it."""
        with self._counting:
            spent = self._up_to(self._clock())
        return Spent(*(a + b for a, b in zip(spent, self._others, strict=True)))

    def over_budget(self, usd: float) -> str | None:
        """Why nothing new should be begun, for people; None while the budget lasts.

        Args:
            usd: What LLM calls of this run directory have cost so far (`cost_usd` in `llm_calls`).
        """
        return exceeded(self._budget, self.spent(), usd)

    def within_budget(self, progress: Progress, usd: float) -> Progress:
        """A stage's progress, which ends the stage when the budget is spent and something is left to do.

        What progress is told of is in the tables, so a stage that stops there loses nothing that counts.

        Raises:
            UserError: from the progress it returns.
        """

        def told(done: int, total: int, note: str | dict[str, str] = "") -> None:
            progress(done, total, note)
            reason = self.over_budget(usd) if done < total and self._stage in WITHHELD else None
            if reason:
                raise UserError(f"stage {self._stage} stopped at {done} of {total}: {reason}")

        return told
