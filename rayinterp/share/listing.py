"""What a target says that it holds: `share.json`, every file's size and hash. Nothing in it is trusted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

import yaml

from rayinterp.config import differing_fields
from rayinterp.errors import UserError

FORMAT = 1
LISTING, PART_LISTING = "share.json", "share.part.json"
"""What a target holds, written last; and what has arrived so far while a push is under way."""
SEEN = "share.seen.json"
"""In a run directory: what each target held when it was last pushed to or pulled from."""
CONFIG = "run.yaml"
CHUNK = 1 << 20
"""Bytes read at a time."""


class SharedFile(NamedTuple):
    """One line of the listing."""

    path: str
    """Below the run directory, with slashes."""
    size: int
    """Bytes."""
    sha256: str


class Moved(NamedTuple):
    """What a push or a pull did."""

    num_files: int
    num_bytes: int
    num_skipped: int
    """Files that were there already."""


class Origin(Protocol):
    """Where files can be read from."""

    def open(self, path: str) -> IO[bytes]:
        """Raises FileNotFoundError where there is none."""
        ...


def safe_path(path: Any) -> str:
    """The path, if it leads to a file below the folder that it is taken from.

    Raises:
        ValueError: it might lead elsewhere.
    """
    plain = isinstance(path, str) and path and path.isprintable() and not set(path) & set("\\:")
    if not plain or path != str(PurePosixPath(path)) or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is no path below a run directory")
    if path in (".", LISTING, PART_LISTING, SEEN):
        raise ValueError(f"{path!r} is none of a run's files")
    return path


def as_data(files: Iterable[SharedFile]) -> dict[str, Any]:
    """The listing as JSON has it."""
    return {"format": FORMAT, "files": [file._asdict() for file in files]}


def as_json(files: Iterable[SharedFile]) -> bytes:
    """The listing as it is stored."""
    return json.dumps(as_data(files), indent=1).encode()


def parse_listing(data: Any, where: str) -> list[SharedFile]:
    """Checks everything that a listing says.

    Raises:
        UserError: it is none, is of a later format, or names a path that leads elsewhere.
    """
    try:
        if data["format"] > FORMAT:
            raise UserError(
                f"{where} has format {data['format']}, this rayinterp reads up to {FORMAT}; install a later one"
            )
        files = [SharedFile(safe_path(one["path"]), int(one["size"]), str(one["sha256"])) for one in data["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is refused ({error}); nothing was written: push again from the original") from None
    if len({file.path for file in files}) < len(files) or not all(
        re.fullmatch("[0-9a-f]{64}", file.sha256) and file.size >= 0 for file in files
    ):
        raise UserError(f"{where} is refused (a path twice, or no hash); push again from the original")
    return files


def read_listing(origin: Origin, name: str, where: str) -> list[SharedFile] | None:
    """The listing of that name; None where there is none."""
    try:
        with origin.open(name) as stream:
            content = stream.read()
    except FileNotFoundError:
        return None
    try:
        data = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}/{name} is no JSON ({error}); push again from the original") from None
    return parse_listing(data, f"{where}/{name}")


def hashed(origin: Origin, path: str) -> SharedFile:
    """The file as it is now."""
    digest, size = hashlib.sha256(), 0
    with origin.open(path) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return SharedFile(path, size, digest.hexdigest())


def check_same_run(one: Origin, other: Origin, where: str) -> None:
    """Two directories have one upstream config, or one of them has none yet.

    Raises:
        UserError: they differ; names the fields.
    """
    configs = []
    for origin in (one, other):
        try:
            with origin.open(CONFIG) as stream:
                configs.append(yaml.safe_load(stream.read()))
        except FileNotFoundError:
            return
        except yaml.YAMLError:
            raise UserError(f"{CONFIG} is not valid YAML, on one side of {where!r}") from None
    if not all(isinstance(config, dict) for config in configs):
        raise UserError(f"{CONFIG} holds no config, on one side of {where!r}")
    differing = differing_fields(configs[1], configs[0])
    if differing:
        raise UserError(
            f"{where!r} holds another run, made with other settings:\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nName another directory or target."
        )
