"""Dataset repositories of the Hugging Face hub as targets: `hf://datasets/OWNER/NAME[/FOLDER]`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rayinterp.errors import UserError
from rayinterp.progress import Progress
from rayinterp.share.folder import Folder, files_there, open_folder
from rayinterp.share.listing import LISTING, Moved, SharedFile, as_json, check_same_run, read_listing
from rayinterp.share.seen import check_nothing_is_lost
from rayinterp.share.source import Run, must_be_local


def push_hub(run: Run, files: list[SharedFile], target: str, progress: Progress, check: Callable[[], None]) -> Moved:
    """To a dataset repository, as one commit, which is there whole or not at all. It is made private where it is new.

    What the hub has of an interrupted push is not sent again: its client asks by hash.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repository, below = hub_place(target)
    must_be_local(run, target)
    there = hub_folder(target)
    HfApi().create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    complete = read_listing(there, LISTING, target) or []
    known = {file.path: file for file in complete}
    check_same_run(run, there, target)
    check_nothing_is_lost(run, files, complete, target)
    held = files_there(files, there, known)
    left = [file for file in files if file not in held]
    stale = sorted(known.keys() - {file.path for file in files})
    if left or stale or not known:
        check()
        contents = {file.path: run.upload(file.path) for file in left} | {LISTING: as_json(files)}
        operations: list[Any] = [CommitOperationAdd(f"{below}{path}", content) for path, content in contents.items()]
        operations += [CommitOperationDelete(f"{below}{path}") for path in stale]
        HfApi().create_commit(repository, operations, commit_message="rayinterp push", repo_type="dataset")
        check()
    progress(len(files), len(files))
    return Moved(len(left), sum(file.size for file in left), len(held))


def hub_place(target: str) -> tuple[str, str]:
    """`OWNER/NAME`, and what paths begin with in it.

    Raises:
        UserError: no dataset repository.
    """
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)/?", target)
    if match is None or ".." in target.split("/"):
        raise UserError(f"{target!r} is no dataset repository; write hf://datasets/OWNER/NAME or .../NAME/FOLDER")
    return match[1], f"{match[2][1:]}/" if match[2] else ""


def hub_folder(target: str) -> Folder:
    """The repository as a file system, to read from."""
    hub_place(target)
    return open_folder(target.rstrip("/"))
