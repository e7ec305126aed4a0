"""From a target to a run directory, which may hold a part of it already; every file is checked."""

from __future__ import annotations

import tempfile

from rayinterp.errors import UserError
from rayinterp.progress import Progress, silent
from rayinterp.share import artifact, hub
from rayinterp.share.folder import DamagedError, Folder, check_address, copy_all, open_folder, reachable
from rayinterp.share.listing import (
    CONFIG,
    LISTING,
    PART_LISTING,
    Moved,
    Origin,
    SharedFile,
    check_same_run,
    hashed,
    read_listing,
)
from rayinterp.share.seen import remember, seen_at
from rayinterp.usage import MANIFEST


def pull(target: str, run_dir: str, progress: Progress = silent) -> Moved:
    """Brings what was pushed into a run directory, which may hold a part of it already.

    Raises:
        UserError: nothing to pull, a damaged file, a path that leads elsewhere, or a directory with another content.
    """
    check_address(target)
    folder = open_folder(run_dir)
    with tempfile.TemporaryDirectory() as name, reachable(target):
        origin = _origin(target, name)
        files = read_listing(origin, LISTING, target)
        if files is None:
            unfinished = read_listing(origin, PART_LISTING, target) is not None
            raise UserError(
                f"{target!r} holds a push that did not come to its end; push again, which sends only what is missing"
                if unfinished
                else f"{target!r} holds nothing that was pushed (no {LISTING})"
            )
        check_same_run(origin, folder, run_dir)
        seen = seen_at(folder, target)
        left = files_left(files, folder, seen)
        stale = _stale(files, seen)
        skipped = len(files) - len(left)
        # First what says whose directory this is.
        left.sort(key=lambda file: file.path != CONFIG)
        progress(skipped, len(files))
        try:
            for number, _ in enumerate(copy_all(origin, left, folder), skipped + 1):
                progress(number, len(files))
        except DamagedError as error:
            raise UserError(
                f"{target!r} is damaged: {error}. Nothing of that file was kept, the others stay. Pull again; if it "
                "stays so, delete it there and push again from the original"
            ) from None
        for path in stale:
            folder.remove(path)
        remember(folder, target, files)
    return Moved(len(left), sum(file.size for file in left), skipped)


def _origin(target: str, name: str) -> Origin:
    if target.startswith("wandb://"):
        return artifact.open_artifact(target, name)
    return hub.hub_folder(target) if target.startswith("hf://") else open_folder(target)


def files_left(files: list[SharedFile], folder: Folder, seen: list[SharedFile]) -> list[SharedFile]:
    """Files that the directory lacks, or has as they were seen at the target, which has them anew.

    What was written there since is never replaced: run.yaml and manifest.json go on with the directory, anything else
    is an error.

    Raises:
        UserError: names the first such file.
    """
    stamps = folder.stamps()
    known = {file.path: file for file in seen}
    left = []
    for file in files:
        if file.path not in stamps:
            left.append(file)
            continue
        here = hashed(folder, file.path)
        if here == file:
            continue
        if here == known.get(file.path):
            left.append(file)
        elif file.path not in (CONFIG, MANIFEST):
            raise UserError(
                f"{folder.at(file.path)} has another content than what is to be pulled, and would be overwritten; "
                "pull into another directory, or delete that file if it is damaged"
            )
    listed = known.keys() | {file.path for file in files}
    changing = {_table(file.path) for file in left} - {None}
    for path in stamps:
        # Files of a table's versions have names of their own: nothing would be overwritten, and one version hidden.
        if _table(path) in changing and path not in listed and not path.endswith(".part"):
            raise UserError(
                f"{folder.at(path)} was written since the last pull: the table there is another than the one to be "
                "pulled; pull into another directory"
            )
    return left


def _table(path: str) -> str | None:
    """The table that a file is of."""
    first, sign, _ = path.partition("/")
    return first if sign and first.endswith(".lance") else None


def _stale(files: list[SharedFile], seen: list[SharedFile]) -> list[str]:
    """Files that the target had of tables that have other files now: an old version with a higher number
    would hide the new one."""
    paths = {file.path for file in files}
    tables = {_table(path) for path in paths} - {None}
    return [file.path for file in seen if file.path not in paths and _table(file.path) in tables]
