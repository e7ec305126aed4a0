"""Corpus: streams documents and cuts them into fixed-length sequences with stable ids and splits. Writes `sequences`.

One task per input file, each with its own quota, so the table depends on the config alone and not on the number of
workers. What is left out is counted by reason.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import zstandard

from rayinterp import embedded, planted
from rayinterp.config import CorpusConfig, RunConfig
from rayinterp.errors import UserError
from rayinterp.tables import SCHEMAS, Tables

READABLE = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")

FILE_BITS, DOCUMENT_BITS, WINDOW_BITS = 19, 30, 14
"""`sequence_id` packs file, document within the file and window within the document into 63 bits."""


class Tokenizer(Protocol):
    all_special_ids: Any

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Any) -> str: ...


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The subject model's tokenizer."""
    if config.subject.model == "planted":
        return planted.PlantedTokenizer()
    from transformers import AutoTokenizer

    name = config.subject.model
    path = embedded.model_path(name) if embedded.is_embedded(name) else name
    return AutoTokenizer.from_pretrained(path, revision=config.subject.revision)


def list_files(config: CorpusConfig) -> list[str]:
    """Input files in a fixed order: fsspec URLs, or subsets of the embedded corpus.

    Raises:
        UserError: nothing that can be read.
    """
    if config.dataset == "embedded":
        return [f"embedded:{subset}" for subset in embedded.CORPUS_SUBSETS]
    if config.dataset == "planted":
        return ["planted:0"]
    local = fsspec.filesystem("file")
    if local.isfile(config.dataset):
        return [config.dataset]
    if local.isdir(config.dataset) or "://" in config.dataset:
        root = config.dataset.rstrip("/")
    else:
        root = f"hf://datasets/{config.dataset}"
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
        found = sorted(filesystem.glob(f"{path}/{config.files or '**'}"))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"corpus.dataset {config.dataset!r} is not a local file or folder, and cannot be listed as {root} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is known'}); check the "
            "name and the network"
        ) from None
    files = [filesystem.unstrip_protocol(name) for name in found if name.endswith(READABLE)]
    if not files:
        raise UserError(
            f"corpus.dataset {config.dataset!r} (corpus.files {config.files!r}) holds no file ending in "
            f"{', '.join(READABLE)}; give a dataset, a folder or a file that does"
        )
    return files


def read_documents(file: str, seed: int) -> Iterator[dict]:
    """Documents of one input file, streamed."""
    scheme, _, name = file.partition(":")
    if scheme == "embedded":
        yield from embedded.documents(name)
    elif scheme == "planted":
        yield from planted.documents(seed)
    else:
        with fsspec.open(file, "rb") as raw:
            yield from _parse(file, raw)


def _parse(file: str, raw: Any) -> Iterator[dict]:
    if file.endswith(".parquet"):
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    elif file.endswith(".txt"):
        yield {
            "text": raw.read().decode("utf-8", errors="replace"),
            "meta": {"pile_set_name": PurePosixPath(file).stem},
        }
    else:
        if file.endswith(".zst"):
            raw = zstandard.ZstdDecompressor().stream_reader(raw)
        elif file.endswith(".gz"):
            raw = gzip.GzipFile(fileobj=raw)
        for line in io.TextIOWrapper(raw, encoding="utf-8"):
            if line.strip():
                yield json.loads(line)


def field(document: dict, path: str) -> Any:
    """A nested field, `meta.pile_set_name`; None where it is missing."""
    value: Any = document
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def stable_hash(text: str) -> int:
    """63 bits that depend on the text alone (Python's own hash changes from process to process)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def split_of(seed: int, document_id: int, shares: tuple[float, float, float]) -> str:
    """train, valid or test as a function of seed and document."""
    place = stable_hash(f"{seed}:{document_id}") / 2**63
    return "train" if place < shares[0] else "valid" if place < shares[0] + shares[1] else "test"


def quotas(total: int, num_files: int) -> list[int]:
    """`total` shared evenly, the first files taking one more where it does not divide."""
    return [total // num_files + (i < total % num_files) for i in range(num_files)]


def windows(
    document: dict, tokenizer: Tokenizer, config: CorpusConfig, seed: int, dropped: Counter
) -> list[tuple[int, list[int], str]]:
    """Windows of one document as (window number, token ids, text); a long document gives a seeded sample of its own."""
    text = field(document, config.text_field)
    if not isinstance(text, str) or not text:
        dropped["document_without_text"] += 1
        return []
    length = config.sequence_length
    ids = tokenizer.encode(text, add_special_tokens=False)
    numbers = np.arange(min(len(ids) // length, 1 << WINDOW_BITS))
    if len(ids) // length > len(numbers):
        dropped["beyond_window_numbers"] += len(ids) // length - len(numbers)
    if len(numbers) == 0:
        dropped["document_too_short"] += 1
    if len(numbers) > config.max_sequences_per_document:
        dropped["over_document_cap"] += len(numbers) - config.max_sequences_per_document
        rng = np.random.default_rng([seed, stable_hash(text)])
        numbers = np.sort(rng.choice(numbers, config.max_sequences_per_document, replace=False))
    special = set(tokenizer.all_special_ids)
    kept = []
    for number in numbers.tolist():
        window = ids[number * length : (number + 1) * length]
        window_text = tokenizer.decode(window)
        if special.intersection(window):
            dropped["special_token"] += 1
        elif config.ascii_only and not window_text.isascii():
            dropped["not_ascii"] += 1
        else:
            kept.append((number, window, window_text))
    return kept


def cut_file(
    file_number: int, file: str, quota: int, tokenizer: Tokenizer, config: CorpusConfig, seed: int
) -> tuple[list[dict], Counter]:
    """Sequences of one input file, up to its quota, and what was dropped on the way, by reason."""
    rows: list[dict] = []
    dropped: Counter = Counter()
    seen: set[tuple[int, ...]] = set()
    for document_number, document in enumerate(read_documents(file, seed)):
        if len(rows) >= quota:
            break
        kept = windows(document, tokenizer, config, seed, dropped)
        if not kept:
            continue
        document_id = stable_hash(field(document, config.text_field))
        for number, ids, text in kept[: quota - len(rows)]:
            if tuple(ids) in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(tuple(ids))
            place = (file_number << DOCUMENT_BITS | document_number) << WINDOW_BITS | number
            rows.append(
                {
                    "sequence_id": place,
                    "document_id": document_id,
                    "subset": str(field(document, config.subset_field) or PurePosixPath(file).name),
                    "split": split_of(seed, document_id, config.splits),
                    "token_ids": ids,
                    "text": text,
                }
            )
    dropped["short_of_quota"] += quota - len(rows)
    return rows, dropped


class FileCutter:
    """What a Ray Data worker runs: an input file to its sequences."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config)

    def __call__(self, file: dict[str, Any]) -> list[dict[str, Any]]:
        corpus, seed = self._config.corpus, self._config.seed
        rows, dropped = cut_file(file["number"], file["file"], file["quota"], self._tokenizer, corpus, seed)
        table = pa.Table.from_pylist(rows, schema=_CUT_SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return [{"rows": sink.getvalue().to_pybytes(), "dropped": json.dumps(dropped)}]


_CUT_SCHEMA = pa.schema([f for f in SCHEMAS["sequences"] if f.name not in ("shard", "row")])


def number_shards(sequences: pa.Table, shard_size: int) -> tuple[pa.Table, int]:
    """Sorts by id, drops later copies of a window, numbers shards and rows; also returns how many were dropped."""
    sequences = sequences.sort_by("sequence_id")
    first: dict[bytes, int] = {}
    for place, ids in enumerate(sequences["token_ids"].to_pylist()):
        first.setdefault(np.asarray(ids, dtype=np.int32).tobytes(), place)
    kept = sequences.take(pa.array(list(first.values()), pa.int64()))
    number = np.arange(kept.num_rows, dtype=np.int32)
    kept = kept.append_column("shard", pa.array(number // shard_size))
    kept = kept.append_column("row", pa.array(number % shard_size))
    return kept.select(SCHEMAS["sequences"].names).cast(SCHEMAS["sequences"]), sequences.num_rows - kept.num_rows


def run_corpus(config: RunConfig, tables: Tables) -> dict[str, int]:
    """Writes `sequences` in one commit; returns counts of what was kept and dropped."""
    files, resources = list_files(config.corpus), config.resources.corpus
    work = [
        {"number": number, "file": file, "quota": quota}
        for number, (file, quota) in enumerate(zip(files, quotas(config.corpus.num_sequences, len(files)), strict=True))
        if quota
    ]
    results = (
        ray.data.from_items(work, override_num_blocks=len(work))
        .flat_map(
            FileCutter,
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=min(len(work), resources.num_actors)),
            num_cpus=resources.num_cpus,
        )
        .take_all()
    )
    parts = [pa.ipc.open_stream(result["rows"]).read_all() for result in results]
    sequences, duplicates = number_shards(pa.concat_tables(parts), config.corpus.shard_size)
    if sequences.num_rows == 0:
        raise UserError(
            f"corpus.dataset {config.corpus.dataset!r} gave no sequence of {config.corpus.sequence_length} tokens; "
            "lower corpus.sequence_length, or set corpus.ascii_only to false"
        )
    tables.create("sequences", sequences)
    tables.finish("sequences")
    dropped = sum((Counter(json.loads(result["dropped"])) for result in results), Counter())
    return {"sequences": sequences.num_rows, **+dropped, "duplicate": dropped["duplicate"] + duplicates}
