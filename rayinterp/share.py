"""A run directory, pushed to where others can pull it from.

    run directory --push--> its files, then share.json: every file's size and hash --pull--> another run directory

Targets are fsspec URLs (a folder, `s3://`, `gs://`), dataset repositories of the Hugging Face hub and W&B artifacts.
Tables are folders of files, so nothing is packed. Both ways can be interrupted and begun again: what has arrived whole
is not sent twice. What a target says of itself is not trusted: paths lead nowhere outside, and every byte is hashed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

import fsspec
import yaml
from fsspec.implementations.local import LocalFileSystem

from rayinterp.config import differing_fields, without_secret
from rayinterp.errors import UserError
from rayinterp.progress import Progress, silent
from rayinterp.usage import MANIFEST, read_manifest

FORMAT = 1
LISTING, PART_LISTING = "share.json", "share.part.json"
"""What a target holds, written last; and what has arrived so far while a push is under way."""
CONFIG = "run.yaml"
STAGES_TO_RECORDS = ("corpus", "harvest", "index", "records")
TABLES_TO_RECORDS = (
    *("corpus_files", "sequences", "activations", "saes", "features", "embeddings"),
    *("records", "record_counts", "holistic"),
)
"""What any search, simulator and score can start from."""
AT_ONCE = 8
"""Files under way: an object store answers each after a while."""
SAVE_SECONDS = 10.0
"""What a kill may make a push to an object store send again."""
CHUNK = 1 << 20
ARTIFACT_TYPE = "rayinterp-run"


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
        return open(entry.download(root=self.folder), "rb")


class Run(NamedTuple):
    """What is to be pushed."""

    folder: Folder
    rewritten: dict[str, bytes]
    """Files whose content is another one than in the folder."""

    def open(self, path: str) -> IO[bytes]:
        return io.BytesIO(self.rewritten[path]) if path in self.rewritten else self.folder.open(path)

    def upload(self, path: str) -> str | bytes:
        """The file as clients of services take it: a local path, or what is in it."""
        return self.rewritten.get(path) or self.folder.at(path)


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


# the listing


def safe_path(path: Any) -> str:
    """The path, if it leads to a file below the folder that it is taken from.

    Raises:
        ValueError: it might lead elsewhere.
    """
    plain = isinstance(path, str) and path and path.isprintable() and not set(path) & set("\\:")
    if not plain or path != str(PurePosixPath(path)) or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is no path below a run directory")
    if path in (".", LISTING, PART_LISTING):
        raise ValueError(f"{path!r} is none of a run's files")
    return path


def check_no_link(folder: Folder, path: str) -> None:
    """On a local disk, no part of the path below the folder is a symbolic link.

    Raises:
        UserError: one is.
    """
    if folder.is_local and os.path.realpath(folder.at(path)) != os.path.join(os.path.realpath(folder.root), path):
        raise UserError(f"{folder.at(path)} is reached through a symbolic link, which may lead anywhere; remove it")


def listing(files: Iterable[SharedFile]) -> bytes:
    """The listing as it is stored."""
    return json.dumps({"format": FORMAT, "files": [file._asdict() for file in files]}, indent=1).encode()


def parse_listing(content: bytes, where: str) -> list[SharedFile]:
    """Checks everything that a listing says.

    Raises:
        UserError: it is none, is of a later format, or names a path that leads elsewhere.
    """
    try:
        data = json.loads(content)
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
            return parse_listing(stream.read(), f"{where}/{name}")
    except FileNotFoundError:
        return None


def hashed(origin: Origin, path: str) -> SharedFile:
    """The file as it is now."""
    digest, size = hashlib.sha256(), 0
    with origin.open(path) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return SharedFile(path, size, digest.hexdigest())


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
            while size <= file.size and (chunk := source.read(CHUNK)):
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


# push


def push(run_dir: str, target: str, only_records: bool = False, progress: Progress = silent) -> Moved:
    """Brings a run directory, or what its searches start from, to a target.

    Args:
        only_records: The tables from corpus to records alone, with run.yaml and manifest.json.

    Raises:
        UserError: no run there, another run at the target, or a file that changed meanwhile.
    """
    check_address(target)
    folder = open_folder(run_dir)
    stamps = {path: stamp for path, stamp in folder.stamps().items() if is_shared(path, only_records)}
    if CONFIG not in stamps:
        raise UserError(f"{run_dir!r} is no run directory: it holds no {CONFIG}")
    run = Run(folder, {MANIFEST: manifest_to_records(run_dir)} if only_records else {})
    try:
        files = [hashed(run, safe_path(path)) for path in sorted(stamps)]
    except ValueError as error:
        raise UserError(f"{run_dir!r} cannot be pushed: {error}; rename it") from None
    except FileNotFoundError as error:
        raise _changed(run_dir, str(error)) from None
    with _reachable(target):
        return _push_to(target, run, files, progress, lambda: _check_unchanged(folder, stamps, run_dir))


def is_shared(path: str, only_records: bool) -> bool:
    """Whether a file of a run directory is pushed: nothing that is on its way, and nothing of an earlier pull's."""
    name = path.rpartition("/")[2]
    if path in (LISTING, PART_LISTING) or name.endswith(".part") or name.startswith(".write-"):
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


def _push_to(target: str, run: Run, files: list[SharedFile], progress: Progress, check: Any) -> Moved:
    if target.startswith("wandb://"):
        return push_artifact(run, files, target, progress, check)
    if target.startswith("hf://"):
        return push_hub(run, files, target, progress, check)
    return push_folder(run, files, open_folder(target), progress, check)


def push_folder(run: Run, files: list[SharedFile], target: Folder, progress: Progress, check: Any) -> Moved:
    """To any file system. The listing is taken away while files change, so that nobody pulls half a push."""
    if run.folder.is_local and target.is_local:
        roots = [os.path.realpath(folder.root) for folder in (run.folder, target)]
        if os.path.commonpath(roots) in roots:
            raise UserError(f"{target.root!r} and {run.folder.root!r} lie within each other; push to another folder")
    complete = read_listing(target, LISTING, target.root)
    known = {file.path: file for file in complete or read_listing(target, PART_LISTING, target.root) or []}
    check_same_run(run, target, target.root)
    there = files_there(files, target, known)
    left = [file for file in files if file not in there]
    stale = known.keys() - {file.path for file in files}
    if left or stale or complete is None:
        arrived, saved = sorted(there), time.monotonic()
        target.write(PART_LISTING, listing(arrived))
        target.remove(LISTING)
        try:
            for file in copy_all(run, left, target):
                arrived.append(file)
                progress(len(arrived), len(files))
                if time.monotonic() - saved > SAVE_SECONDS:
                    target.write(PART_LISTING, listing(arrived))
                    saved = time.monotonic()
        except DamagedError as error:
            raise _changed(run.folder.root, str(error)) from None
        finally:
            target.write(PART_LISTING, listing(arrived))
        check()
        for path in stale:
            target.remove(path)
        target.write(LISTING, listing(files))
        target.remove(PART_LISTING)
    progress(len(files), len(files))
    return Moved(len(left), sum(file.size for file in left), len(there))


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


def push_hub(run: Run, files: list[SharedFile], target: str, progress: Progress, check: Any) -> Moved:
    """To a dataset repository, as one commit, which is there whole or not at all. It is made private where it is new.

    What the hub has of an interrupted push is not sent again: its client asks by hash.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repository, below = hub_place(target)
    _must_be_local(run, target)
    there = hub_folder(target)
    HfApi().create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    known = {file.path: file for file in read_listing(there, LISTING, target) or []}
    check_same_run(run, there, target)
    held = files_there(files, there, known)
    left = [file for file in files if file not in held]
    stale = sorted(known.keys() - {file.path for file in files})
    if left or stale or not known:
        check()
        contents = {file.path: run.upload(file.path) for file in left} | {LISTING: listing(files)}
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


def push_artifact(run: Run, files: list[SharedFile], target: str, progress: Progress, check: Any) -> Moved:
    """As a new version of a W&B artifact, which W&B makes visible once it is whole; it keeps what has not changed."""
    entity, project, name, version = artifact_place(target)
    if version:
        raise UserError(f"{target!r} names a version, which W&B numbers itself; push to {target.rpartition(':')[0]!r}")
    wandb = require_wandb()
    _must_be_local(run, target)
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
        _add_bytes(artifact, LISTING, listing(files))
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


def _must_be_local(run: Run, target: str) -> None:
    if not run.folder.is_local:
        raise UserError(f"{target!r} takes files of this machine alone; `rayinterp pull` the run into a folder first")


def _check_unchanged(folder: Folder, before: dict[str, tuple[Any, ...]], run_dir: str) -> None:
    """Tables that are written to meanwhile would arrive as a mixture of two states."""
    now = folder.stamps()
    tables = {path.partition("/")[0] for path in before if "/" in path}
    seen = {path: stamp for path, stamp in now.items() if path in before or path.partition("/")[0] in tables}
    for path in sorted(before.keys() | seen.keys()):
        if before.get(path) != seen.get(path) and is_shared(path, only_records=False):
            raise _changed(run_dir, path)


def _changed(run_dir: str, what: str) -> UserError:
    return UserError(
        f"{run_dir!r} changed while it was pushed ({what}): a stage is at work there. The target cannot be pulled from "
        "until a push is complete: wait for the stage to end, or stop it, and push again"
    )


# pull


def pull(target: str, run_dir: str, progress: Progress = silent) -> Moved:
    """Brings what was pushed into a run directory, which may hold a part of it already.

    Raises:
        UserError: nothing to pull, a damaged file, a path that leads elsewhere, or a directory with another content.
    """
    check_address(target)
    folder = open_folder(run_dir)
    with tempfile.TemporaryDirectory() as name, _reachable(target):
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
        left = files_left(files, folder, run_dir)
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
        folder.write(LISTING, listing(files))
    return Moved(len(left), sum(file.size for file in left), skipped)


def _origin(target: str, name: str) -> Origin:
    if target.startswith("wandb://"):
        entity, project, artifact, version = artifact_place(target)
        wandb = require_wandb()
        return Artifact(wandb.Api().artifact(f"{entity}/{project}/{artifact}:{version or 'latest'}"), name)
    return hub_folder(target) if target.startswith("hf://") else open_folder(target)


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


def files_left(files: list[SharedFile], folder: Folder, run_dir: str) -> list[SharedFile]:
    """Files that the directory lacks, or has as an earlier pull left them and the target has anew.

    What was written there since is never replaced: run.yaml and manifest.json go on with the directory, anything else
    is an error.

    Raises:
        UserError: names the first such file.
    """
    stamps = folder.stamps()
    pulled = {file.path: file for file in read_listing(folder, LISTING, run_dir) or []}
    left = []
    for file in files:
        if file.path not in stamps:
            left.append(file)
            continue
        here = hashed(folder, file.path)
        if here == file:
            continue
        if here == pulled.get(file.path):
            left.append(file)
        elif file.path not in (CONFIG, MANIFEST):
            raise UserError(
                f"{folder.at(file.path)} has another content than what is to be pulled, and would be overwritten; "
                "pull into another directory, or delete that file if it is damaged"
            )
    return left


@contextmanager
def _reachable(target: str) -> Iterator[None]:
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
