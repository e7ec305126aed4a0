"""W&B artifacts as targets: `wandb://ENTITY/PROJECT/NAME[:VERSION]`."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from rayinterp.errors import UserError
from rayinterp.progress import Progress
from rayinterp.share.listing import FORMAT, LISTING, Moved, SharedFile, as_json
from rayinterp.share.source import Run, must_be_local

ARTIFACT_TYPE = "rayinterp-run"


class Artifact(NamedTuple):
    """A version of a W&B artifact."""

    artifact: Any
    folder: str
    """Where files are kept on their way."""

    def open(self, path: str) -> IO[bytes]:
        try:
            entry = self.artifact.get_entry(path)
        except KeyError:
            raise FileNotFoundError(path) from None
        path = entry.download(root=self.folder, skip_cache=True)  # a run has more bytes than a cache should get
        stream = open(path, "rb")  # noqa: SIM115 - handed out
        os.unlink(path)  # its bytes go with the stream: a file at a time, not the run, has to fit
        return stream


def open_artifact(target: str, folder: str) -> Artifact:
    """A version of an artifact, the newest where none is named, to read from.

    Args:
        folder: Keeps files on their way.

    Raises:
        UserError: no address of an artifact, or the package is not installed.
    """
    entity, project, name, version = artifact_place(target)
    wandb = require_wandb()
    return Artifact(wandb.Api().artifact(f"{entity}/{project}/{name}:{version or 'latest'}"), folder)


def push_artifact(
    run: Run, files: list[SharedFile], target: str, progress: Progress, check: Callable[[], None]
) -> Moved:
    """As a new version of a W&B artifact, which W&B makes visible once it is whole; it keeps what has not changed."""
    entity, project, name, version = artifact_place(target)
    if version:
        raise UserError(f"{target!r} names a version, which W&B numbers itself; push to {target.rpartition(':')[0]!r}")
    wandb = require_wandb()
    must_be_local(run, target)
    check()
    # Of this machine and its program W&B is told nothing.
    quiet = wandb.Settings(
        console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True
    )
    with wandb.init(entity=entity, project=project, job_type="push", settings=quiet) as logged:
        artifact = wandb.Artifact(name, type=ARTIFACT_TYPE, metadata={"format": FORMAT, "num_files": len(files)})
        for file in files:
            content = run.upload(file.path)
            if isinstance(content, str):
                artifact.add_file(content, name=file.path, policy="immutable")
            else:
                _add_bytes(artifact, file.path, content)
        _add_bytes(artifact, LISTING, as_json(files))
        logged.log_artifact(artifact)
        if not logged.offline:
            artifact.wait()
    check()
    progress(len(files), len(files))
    return Moved(len(files), sum(file.size for file in files), 0)


def _add_bytes(artifact: Any, path: str, content: bytes) -> None:
    with artifact.new_file(path, mode="wb") as stream:
        stream.write(content)


def artifact_place(target: str) -> tuple[str, str, str, str]:
    """Entity, project, name and version (empty for none) of an artifact.

    Raises:
        UserError: no address of an artifact.
    """
    match = re.fullmatch(r"wandb://([\w.-]+)/([\w.-]+)/([\w.-]+)(?::([\w.-]+))?", target)
    if match is None:
        raise UserError(f"{target!r} is no W&B artifact; write wandb://ENTITY/PROJECT/NAME or .../NAME:VERSION")
    return match[1], match[2], match[3], match[4] or ""


def require_wandb() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb:// needs the package wandb, not installed here; run `pip install 'rayinterp[wandb]'`")
    import wandb

    return wandb
