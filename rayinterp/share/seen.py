"""What a run directory has seen of each target, when it was last pushed to or pulled from: `share.seen.json`.

Only what was seen is replaced, in either direction: nobody's work goes without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from rayinterp.errors import UserError
from rayinterp.share.folder import Folder
from rayinterp.share.listing import SEEN, SharedFile, as_data, parse_listing
from rayinterp.share.source import Run, is_shared


def seen_at(folder: Folder, target: str) -> list[SharedFile]:
    """What the target held when this directory last had to do with it; empty where it never had."""
    listing = _all_seen(folder).get(_place(target))
    return parse_listing(listing, folder.at(SEEN)) if listing is not None else []


def remember(folder: Folder, target: str, files: Iterable[SharedFile]) -> None:
    """Writes down what the target holds after a push or a pull."""
    seen = _all_seen(folder) | {_place(target): as_data(files)}
    folder.write(SEEN, json.dumps(seen, indent=1).encode())


def check_nothing_is_lost(run: Run, files: list[SharedFile], there: list[SharedFile], target: str) -> None:
    """A push may replace what its directory has seen at the target, and add to anything.

    Args:
        files: What is to be pushed.
        there: What the target's listing says.

    Raises:
        UserError: the target holds files that would go, or be replaced, and that this directory has not seen there.
    """
    if run.only_records and not all(is_shared(file.path, only_records=True) for file in there):
        raise UserError(
            f"{target!r} holds a whole run, whose explanations and scores --only-records would take away; push the "
            "whole run, or name another target"
        )
    lost = sorted(set(there) - set(files) - set(seen_at(run.folder, target)))
    if lost:
        raise UserError(
            f"{target!r} holds {len(lost)} files that this run directory has not seen there and a push would take away "
            f"({lost[0].path} is one): pull from it first, or name another target"
        )


def _all_seen(folder: Folder) -> dict[str, object]:
    try:
        with folder.open(SEEN) as stream:
            seen = json.loads(stream.read())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{folder.at(SEEN)} is damaged; delete it, and pull before you push") from None
    return seen if isinstance(seen, dict) else {}


def _place(target: str) -> str:
    """The target whatever its spelling, and whichever version of a W&B artifact is meant."""
    place, name = target.rstrip("/").rsplit("/", 1) if "/" in target else ("", target)
    return f"{place}/{name.partition(':')[0]}" if target.startswith("wandb://") else target.rstrip("/")
