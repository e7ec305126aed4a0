"""Folders of any file system that fsspec knows; copying between them, checked by hash, several files at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rayinterp.config import without_secret
from rayinterp.errors import UserError
from rayinterp.share import listing
from rayinterp.share.listing import Origin, SharedFile, hashed

AT_ONCE = 8
"""Files under way: an object store answers each after a while."""


class Folder(NamedTuple):
    """A folder of a file system."""

    filesystem: Any
    root: str

    def at(self, path: str) -> str:
        return f"{self.root}/{path}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def open(self, path: str) -> IO[bytes]:
        check_no_link(self, path)
        return self.filesystem.open(self.at(path), "rb")

    def write(self, path: str, content: bytes) -> None:
        self.filesystem.makedirs(self.root, exist_ok=True)
        self.filesystem.pipe_file(self.at(path), content)

    def remove(self, path: str) -> None:
        if self.filesystem.exists(self.at(path)):
            self.filesystem.rm_file(self.at(path))

    def stamps(self) -> dict[str, tuple[Any, ...]]:
        """Size, and what else tells one content from the next, of every file by its path."""
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(self.root):
            return {}
        found = self.filesystem.find(self.root, detail=True)
        return {
            name[len(self.root) + 1 :]: (info["size"], info.get("mtime"), info.get("ETag"))
            for name, info in found.items()
        }


def open_folder(url: str) -> Folder:
    """The folder that a path or a URL names, which need not be there.

    Raises:
        UserError: the URL holds a secret, or its file system needs a package that is not installed.
    """
    check_address(url)
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url!r}: {error}") from None
    return Folder(filesystem, root.rstrip("/"))


def check_address(url: str) -> None:
    """What is secret does not belong into an address, which is shown.

    Raises:
        UserError: it holds a password or a query.
    """
    try:
        without_secret(url)
    except ValueError as error:
        raise UserError(f"the address {error}") from None


def check_no_link(folder: Folder, path: str) -> None:
    """On a local disk, no part of the path below the folder is a symbolic link.

    Raises:
        UserError: one is.
    """
    if folder.is_local and os.path.realpath(folder.at(path)) != os.path.join(os.path.realpath(folder.root), path):
        raise UserError(f"{folder.at(path)} is reached through a symbolic link, which may lead anywhere; remove it")


class DamagedError(Exception):
    """What was read is not what is listed."""


def copy(origin: Origin, file: SharedFile, folder: Folder) -> None:
    """Copies one file under a temporary name, and gives it its own once it has arrived whole.

    Raises:
        DamagedError: what arrived is not what is listed; nothing of it is kept.
    """
    destination, part = folder.at(file.path), f"{folder.at(file.path)}.part"
    check_no_link(folder, file.path)
    check_no_link(folder, f"{file.path}.part")
    digest, size = hashlib.sha256(), 0
    folder.filesystem.makedirs(destination.rpartition("/")[0], exist_ok=True)
    try:
        source = origin.open(file.path)
    except FileNotFoundError:
        raise DamagedError("not there") from None
    try:
        with source, folder.filesystem.open(part, "wb") as copied:
            # No more than is listed: who wrote the target must not be able to fill the disk.
            while size <= file.size and (chunk := source.read(listing.CHUNK)):
                digest.update(chunk)
                size += len(chunk)
                copied.write(chunk)
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise DamagedError(f"{size:,} bytes of {file.size:,}" if size != file.size else "another content")
        folder.filesystem.mv(part, destination)
    finally:
        if folder.filesystem.exists(part):
            folder.filesystem.rm_file(part)


def copy_all(origin: Origin, files: Sequence[SharedFile], folder: Folder) -> Iterator[SharedFile]:
    """Copies several files at a time; yields each that has arrived, and begins no more after the first that fails."""

    def one(file: SharedFile) -> SharedFile:
        try:
            copy(origin, file, folder)
        except DamagedError as error:
            raise DamagedError(f"{file.path}: {error}") from None
        return file

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(one, files)


def files_there(files: list[SharedFile], target: Folder, known: dict[str, SharedFile]) -> set[SharedFile]:
    """Files that the target holds already.

    Args:
        known: What its listing says, by path. To read a remote file is to transfer it: where the size is right, the
            listing, written after the file had arrived, is believed.
    """
    stamps = target.stamps()
    same_size = [file for file in files if file.path in stamps and stamps[file.path][0] == file.size]
    if target.is_local:
        return {file for file in same_size if hashed(target, file.path) == file}
    return {file for file in same_size if known.get(file.path) == file}


@contextmanager
def reachable(target: str) -> Iterator[None]:
    """What services and networks say becomes one message."""
    try:
        yield
    except Exception as error:
        home = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError | ImportError) and home not in ("wandb", "huggingface_hub", "httpx"):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{target!r} cannot be reached ({why}); what has arrived is kept: give access to it and try again"
        ) from None
