"""The run directory that is pushed: which of its files, and whether they stay as they are meanwhile."""

from __future__ import annotations

import io
import json
from typing import IO, Any, NamedTuple

from rayinterp.errors import UserError
from rayinterp.share.folder import Folder
from rayinterp.share.listing import CONFIG, LISTING, PART_LISTING, SEEN
from rayinterp.usage import MANIFEST, read_manifest

STAGES_TO_RECORDS = ("corpus", "harvest", "index", "records")
TABLES_TO_RECORDS = (
    *("corpus_files", "sequences", "activations", "saes", "features", "embeddings"),
    *("records", "record_counts", "holistic"),
)
"""What any search, simulator and score can start from."""


class Run(NamedTuple):
    """What is to be pushed."""

    folder: Folder
    rewritten: dict[str, bytes]
    """Files whose content is another one than in the folder."""
    only_records: bool = False

    def open(self, path: str) -> IO[bytes]:
        return io.BytesIO(self.rewritten[path]) if path in self.rewritten else self.folder.open(path)

    def upload(self, path: str) -> str | bytes:
        """The file as clients of services take it: a local path, or what is in it."""
        return self.rewritten.get(path) or self.folder.at(path)


def is_shared(path: str, only_records: bool) -> bool:
    """Whether a file of a run directory is pushed: nothing that is on its way, and nothing of an earlier pull's."""
    name = path.rpartition("/")[2]
    if path in (LISTING, PART_LISTING, SEEN) or name.endswith(".part") or name.startswith(".write-"):
        return False
    if not only_records:
        return True
    table, _, of_table = path.partition(".lance/")
    return path in (CONFIG, MANIFEST) or (bool(of_table) and table in TABLES_TO_RECORDS)


def manifest_to_records(run_dir: str) -> bytes:
    """The manifest without what later stages did and spent, which would count in the budget of those to come."""
    manifest = read_manifest(run_dir)
    for part in ("stages", "usage"):
        of_stages = manifest.get(part, {})
        manifest[part] = {stage: of_stages[stage] for stage in of_stages if stage in STAGES_TO_RECORDS}
    return json.dumps(manifest, indent=2).encode()


def must_be_local(run: Run, target: str) -> None:
    if not run.folder.is_local:
        raise UserError(f"{target!r} takes files of this machine alone; `rayinterp pull` the run into a folder first")


def check_unchanged(folder: Folder, before: dict[str, tuple[Any, ...]], run_dir: str) -> None:
    """Tables that are written to meanwhile would arrive as a mixture of two states."""
    now = folder.stamps()
    tables = {path.partition("/")[0] for path in before if "/" in path}
    seen = {path: stamp for path, stamp in now.items() if path in before or path.partition("/")[0] in tables}
    for path in sorted(before.keys() | seen.keys()):
        if before.get(path) != seen.get(path) and is_shared(path, only_records=False):
            raise changed(run_dir, path)


def changed(run_dir: str, what: str) -> UserError:
    return UserError(
        f"{run_dir!r} changed while it was pushed ({what}): a stage is at work there. The target cannot be pulled from "
        "until a push is complete: wait for the stage to end, or stop it, and push again"
    )
