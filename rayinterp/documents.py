"""Documents of a corpus, streamed from wherever it lies. Knows nothing of tokens, sequences or Ray.

    local files, s3://, gs://, hf:// through fsspec     *.jsonl[.zst|.gz], *.parquet, *.txt
    Hugging Face datasets                               shards of a streaming dataset
    embedded, planted                                   what this package brings along

What cannot be decoded is left out, counted and named in `Dropped`; what cannot be reached (a network or a permission)
is an error, because trying again may help.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from rayinterp import embedded, planted
from rayinterp.config import PLANTED, CorpusConfig
from rayinterp.errors import UserError

READABLE = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")
CORRUPT = (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError, pa.ArrowInvalid)
"""What decoders raise on damaged input."""
MAX_NAMED = 100
"""Damaged places named per input file; all are counted."""
CHUNK = 1 << 16
"""Bytes read at a time: at most so much is lost before a damaged place."""
MAX_ZSTD_WINDOW = 1 << 31
"""The largest window that `zstd --long` writes."""


@dataclass
class Dropped:
    """What was left out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    """Damaged places, `reason: where`."""

    def name(self, reason: str, where: str) -> None:
        """Counts one damaged place and keeps its name."""
        self.counts[reason] += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(f"{reason}: {where}")


def list_files(config: CorpusConfig) -> list[str]:
    """Input files in a fixed order: fsspec URLs, shards of a Hugging Face dataset, or subsets of the embedded corpus.

    Raises:
        UserError: nothing that can be read.
    """
    if config.dataset == "embedded":
        return [f"embedded:{subset}" for subset in embedded.CORPUS_SUBSETS]
    if config.dataset in PLANTED:
        return [f"planted:{config.dataset}"]
    if config.reader == "datasets":
        return [f"datasets:{shard}" for shard in range(_open_dataset(config).num_shards)]
    local = fsspec.filesystem("file")
    if local.isfile(config.dataset):
        return [config.dataset]
    if local.isdir(config.dataset) or "://" in config.dataset:
        root = config.dataset.rstrip("/")
    else:
        root = f"hf://datasets/{config.dataset}" + (f"@{config.revision}" if config.revision else "")
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
        found = filesystem.glob(f"{glob.escape(path)}/{config.files or '**'}", detail=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"corpus.dataset {config.dataset!r} is not a local file or folder, and cannot be listed as {root} "
            f"({_first_line(error)}); check the name and the network"
        ) from None
    # A folder may be called x.parquet: its parts are listed themselves.
    names = sorted(name for name, info in found.items() if info["type"] == "file" and name.endswith(READABLE))
    files = [filesystem.unstrip_protocol(name) for name in names]
    if not files:
        raise UserError(
            f"corpus.dataset {config.dataset!r} (corpus.files {config.files!r}) holds no file ending in "
            f"{', '.join(READABLE)}; give a dataset, a folder or a file that does"
        )
    return files


def _open_dataset(config: CorpusConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            config.dataset, config.hf_config, split=config.hf_split, revision=config.revision, streaming=True
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"corpus.dataset {config.dataset!r} (hf_config {config.hf_config!r}, hf_split {config.hf_split!r}) cannot "
            f"be opened as a Hugging Face dataset ({_first_line(error)}); check the names and the network"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no more is known').splitlines()[0]}"


def read_documents(file: str, config: CorpusConfig, seed: int, dropped: Dropped) -> Iterator[dict[str, Any]]:
    """Documents of one input file, streamed; a damaged file gives what can be read of it."""
    scheme, _, name = file.partition(":")
    if scheme == "embedded":
        yield from embedded.documents(name)
    elif scheme == "planted":
        yield from planted.WORLDS[name].documents(seed)
    elif scheme == "datasets":
        dataset = _open_dataset(config)
        yield from dataset.shard(dataset.num_shards, int(name))
    else:
        with fsspec.open(file, "rb") as raw:
            try:
                yield from _decode(file, raw, dropped)
            except CORRUPT as error:
                dropped.name("corrupt_file", f"{file} ({_first_line(error)}); what comes before is kept")


def _decode(file: str, raw: Any, dropped: Dropped) -> Iterator[dict[str, Any]]:
    if file.endswith(".parquet"):
        yield from _parquet_rows(file, raw, dropped)
    elif file.endswith(".txt"):
        text = raw.read().decode("utf-8", errors="replace")
        yield {"text": text, "meta": {"pile_set_name": PurePosixPath(file).stem}}
    elif file.endswith(".zst"):
        yield from _json_lines(file, _zstd_chunks(raw), dropped)
    elif file.endswith(".gz"):
        # `read` would throw away what it has when it comes to a damaged place.
        yield from _json_lines(file, iter(partial(gzip.GzipFile(fileobj=raw).read1, CHUNK), b""), dropped)
    else:
        yield from _json_lines(file, _chunks(raw), dropped)


def _parquet_rows(file: str, raw: Any, dropped: Dropped) -> Iterator[dict[str, Any]]:
    """Rows of one row group after another, so that a damaged one does not take the rest along."""
    parquet = pq.ParquetFile(raw)
    for group in range(parquet.num_row_groups):
        try:
            for batch in parquet.iter_batches(batch_size=256, row_groups=[group]):
                yield from batch.to_pylist()
        except UnicodeDecodeError as error:
            dropped.name("corrupt_row_group", f"{file} row group {group} ({_first_line(error)})")
        except OSError as error:
            # Arrow reports damaged pages as plain OSErrors; those of a disk or a network have an errno or a subclass.
            if type(error) is not OSError or error.errno is not None:
                raise
            dropped.name("corrupt_row_group", f"{file} row group {group} ({_first_line(error)})")


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk


def _zstd_chunks(raw: Any) -> Iterator[bytes]:
    """Decompressed bytes of every frame; the library's own reader ends in silence at the first one, or where a file
    is cut off."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame = None
    for chunk in _chunks(raw):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")


def _json_lines(file: str, chunks: Iterable[bytes], dropped: Dropped) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(chunks), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested a thousand deep
            document = None
        if isinstance(document, dict):
            yield document
        else:
            dropped.name("corrupt_line", f"{file}:{number}")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
