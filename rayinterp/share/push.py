"""From a run directory to a target; begun again, it sends what is missing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from rayinterp.errors import UserError
from rayinterp.progress import Progress, silent
from rayinterp.share.artifact import push_artifact
from rayinterp.share.folder import DamagedError, check_address, copy_all, files_there, open_folder, reachable
from rayinterp.share.hub import push_hub
from rayinterp.share.listing import (
    CONFIG,
    LISTING,
    PART_LISTING,
    Moved,
    SharedFile,
    as_json,
    check_same_run,
    hashed,
    read_listing,
    safe_path,
)
from rayinterp.share.seen import check_nothing_is_lost, remember
from rayinterp.share.source import Run, changed, check_unchanged, is_shared, manifest_to_records
from rayinterp.usage import MANIFEST

SAVE_SECONDS = 10.0
"""What a kill may make a push to an object store send again."""


def push(run_dir: str, target: str, only_records: bool = False, progress: Progress = silent) -> Moved:
    """Brings a run directory, or what its searches start from, to a target.

    Args:
        only_records: The tables from corpus to records alone, with run.yaml and manifest.json.

    Raises:
        UserError: no run there, another run or somebody else's results at the target, or a file that changed meanwhile.
    """
    check_address(target)
    folder = open_folder(run_dir)
    stamps = {path: stamp for path, stamp in folder.stamps().items() if is_shared(path, only_records)}
    if CONFIG not in stamps:
        raise UserError(f"{run_dir!r} is no run directory: it holds no {CONFIG}")
    run = Run(folder, {MANIFEST: manifest_to_records(run_dir)} if only_records else {}, only_records)
    try:
        files = [hashed(run, safe_path(path)) for path in sorted(stamps)]
    except ValueError as error:
        raise UserError(f"{run_dir!r} cannot be pushed: {error}; rename it") from None
    except FileNotFoundError as error:
        raise changed(run_dir, str(error)) from None
    with reachable(target):
        moved = _push_to(target, run, files, progress, lambda: check_unchanged(folder, stamps, run_dir))
        remember(folder, target, files)
    return moved


def _push_to(target: str, run: Run, files: list[SharedFile], progress: Progress, check: Callable[[], None]) -> Moved:
    if target.startswith("wandb://"):
        return push_artifact(run, files, target, progress, check)
    if target.startswith("hf://"):
        return push_hub(run, files, target, progress, check)
    return push_folder(run, files, target, progress, check)


def push_folder(run: Run, files: list[SharedFile], url: str, progress: Progress, check: Callable[[], None]) -> Moved:
    """To any file system. The listing is taken away while files change, so that nobody pulls half a push."""
    target = open_folder(url)
    if run.folder.is_local and target.is_local:
        roots = [os.path.realpath(folder.root) for folder in (run.folder, target)]
        if os.path.commonpath(roots) in roots:
            raise UserError(f"{target.root!r} and {run.folder.root!r} lie within each other; push to another folder")
    complete = read_listing(target, LISTING, target.root)
    known = {file.path: file for file in complete or read_listing(target, PART_LISTING, target.root) or []}
    check_same_run(run, target, target.root)
    check_nothing_is_lost(run, files, complete or [], url)
    there = files_there(files, target, known)
    left = [file for file in files if file not in there]
    stale = known.keys() - {file.path for file in files}
    if left or stale or complete is None:
        arrived, saved = sorted(there), time.monotonic()
        target.write(PART_LISTING, as_json(arrived))
        target.remove(LISTING)
        try:
            for file in copy_all(run, left, target):
                arrived.append(file)
                progress(len(arrived), len(files))
                if time.monotonic() - saved > SAVE_SECONDS:
                    target.write(PART_LISTING, as_json(arrived))
                    saved = time.monotonic()
        except DamagedError as error:
            raise changed(run.folder.root, str(error)) from None
        finally:
            target.write(PART_LISTING, as_json(arrived))
        check()
        for path in stale:
            target.remove(path)
        target.write(LISTING, as_json(files))
        target.remove(PART_LISTING)
    progress(len(files), len(files))
    return Moved(len(left), sum(file.size for file in left), len(there))
