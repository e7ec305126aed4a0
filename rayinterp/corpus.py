"""Corpus: cuts documents into fixed-length sequences with stable ids and splits. Writes `sequences`, `corpus_files`.

    input files -> FileCutter (actor pool) -> `windows` -> distinct, numbered (the driver) -> `sequences`

Each input file has its own quota, so the tables depend on the config alone and not on the number of workers. A worker
streams its file into `windows`, which is dropped at the end; a run that was killed goes on with the files that are
left. Of a file, and of the corpus, the digests of windows are held and not their text. What is left out is counted by
reason.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from rayinterp import embedded, planted
from rayinterp.config import PLANTED, CorpusConfig, RunConfig
from rayinterp.documents import Dropped, list_files, read_documents
from rayinterp.errors import UserError
from rayinterp.pools import map_units
from rayinterp.progress import Progress, Throughput, silent
from rayinterp.tables import COMMIT_SECONDS, SCHEMAS, Tables

if TYPE_CHECKING:
    from jaxtyping import Bool

FILE_BITS, DOCUMENT_BITS, WINDOW_BITS = 19, 30, 14
"""`sequence_id` packs file, document within the file and window within the document into 63 bits."""
ROWS_AT_A_TIME = 4096


class Tokenizer(Protocol):
    all_special_ids: Any

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Any) -> str: ...


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The subject model's tokenizer."""
    if config.subject.model in PLANTED:
        return planted.PlantedTokenizer(planted.WORLDS[config.subject.model].vocabulary)
    from transformers import AutoTokenizer

    name, revision = embedded.resolve(config.subject.model), config.subject.revision
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)


def field(document: dict[str, Any], path: str) -> Any:
    """A nested field, `meta.pile_set_name`; None where it is missing."""
    value: Any = document
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def stable_hash(text: str) -> int:
    """63 bits that depend on the text alone (Python's own hash changes from process to process)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def digest(text: str) -> bytes:
    """16 bytes that tell texts apart, white space aside: two of a billion agree by chance once in 10^20 corpora.

    Of the text and not of its tokens: a copy that begins one space later would else stand in two splits.
    """
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def split_of(seed: int, document_id: int, shares: tuple[float, float, float]) -> str:
    """train, valid or test as a function of seed and document."""
    place = stable_hash(f"{seed}:{document_id}") / 2**63
    return "train" if place < shares[0] else "valid" if place < shares[0] + shares[1] else "test"


def quotas(total: int, num_files: int) -> list[int]:
    """`total` shared evenly, the first files taking one more where it does not divide."""
    return [total // num_files + (i < total % num_files) for i in range(num_files)]


def windows(
    document: dict[str, Any], tokenizer: Tokenizer, config: CorpusConfig, seed: int, dropped: Counter[str]
) -> list[tuple[int, list[int], str]]:
    """Windows of one document as (window number, token ids, text); a long document gives a seeded sample of its own."""
    text = field(document, config.text_field)
    if not isinstance(text, str) or not text:
        dropped["document_without_text"] += 1
        return []
    if any("\ud800" <= character <= "\udfff" for character in text):  # half of a pair, which no encoding can write
        dropped["document_not_unicode"] += 1
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
    file_number: int, file: str, quota: int, tokenizer: Tokenizer, config: CorpusConfig, seed: int, dropped: Dropped
) -> Iterator[dict[str, Any]]:
    """Sequences of one input file, streamed, up to its quota; what is left out on the way goes to `dropped`."""
    seen: set[bytes] = set()
    for document_number, document in enumerate(read_documents(file, config, seed, dropped)):
        if len(seen) >= quota:
            break
        kept = windows(document, tokenizer, config, seed, dropped.counts)
        if not kept:
            continue
        document_id = stable_hash(field(document, config.text_field))
        subset = str(field(document, config.subset_field) or PurePosixPath(file).name).encode("utf-8", "replace")
        for number, ids, text in kept:
            window_digest = digest(text)
            if window_digest in seen:
                dropped.counts["duplicate"] += 1
                continue
            if len(seen) >= quota:
                break
            seen.add(window_digest)
            if file_number >> FILE_BITS or document_number >> DOCUMENT_BITS:
                raise UserError(
                    f"the corpus has more than {1 << FILE_BITS:,} files, or one of more than {1 << DOCUMENT_BITS:,} "
                    "documents, and sequences would share an id; give it in other files"
                )
            yield {
                "sequence_id": (file_number << DOCUMENT_BITS | document_number) << WINDOW_BITS | number,
                "document_id": document_id,
                "subset": subset.decode(),
                "split": split_of(seed, document_id, config.splits),
                "token_ids": ids,
                "text": text,
                "digest": window_digest,
            }
    dropped.counts["short_of_quota"] += quota - len(seen)


class FileCutter:
    """What the actor pool runs: one input file in, fragments of `windows` out."""

    def __init__(self, config: RunConfig, tables: Tables) -> None:
        self._config, self._tables = config, tables
        self._tokenizer = load_tokenizer(config)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        corpus, seed, dropped = self._config.corpus, self._config.seed, Dropped()
        number, file, quota = int(item["file_number"]), item["file"], int(item["quota"])
        counted = Counter()

        def batches() -> Iterator[pa.RecordBatch]:
            rows: list[dict[str, Any]] = []
            for row in cut_file(number, file, quota, self._tokenizer, corpus, seed, dropped):
                rows.append({**row, "file_number": number})
                if len(rows) == ROWS_AT_A_TIME:
                    counted["sequences"] += len(rows)
                    yield pa.RecordBatch.from_pylist(rows, SCHEMAS["windows"])
                    rows = []
            counted["sequences"] += len(rows)
            if rows:
                yield pa.RecordBatch.from_pylist(rows, SCHEMAS["windows"])

        fragments = self._tables.write_fragments("windows", batches())
        counts = {reason: count for reason, count in sorted(dropped.counts.items()) if count}
        return {
            "unit": number,
            "fragments": fragments,
            "num_tokens": counted["sequences"] * corpus.sequence_length,
            "row": json.dumps(
                {
                    "file_number": number,
                    "file": file,
                    "quota": quota,
                    "num_sequences": counted["sequences"],
                    "dropped": json.dumps(counts),
                    "damaged": dropped.named,
                }
            ),
        }


def first_of_each(digests: pa.Array) -> Bool[np.ndarray, "n"]:
    """True at the first place of every distinct digest."""
    pairs = np.frombuffer(b"".join(digests.to_pylist()), dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))  # stable: of equal digests the first place comes first
    again = (pairs[order][1:] == pairs[order][:-1]).all(axis=1)
    keep = np.ones(len(pairs), dtype=bool)
    keep[order[1:][again]] = False
    return keep


def number_shards(
    batches: Iterator[pa.RecordBatch], keep: Bool[np.ndarray, "n"], shard_size: int
) -> Iterator[pa.RecordBatch]:
    """Batches of `sequences` from batches of `windows` in sequence_id order: kept rows with their shard and row."""
    schema = SCHEMAS["sequences"]
    place = number = 0
    for batch in batches:
        kept = batch.filter(pa.array(keep[place : place + batch.num_rows]))
        place += batch.num_rows
        numbers = np.arange(number, number + kept.num_rows, dtype=np.int32)
        number += kept.num_rows
        columns = {"shard": pa.array(numbers // shard_size), "row": pa.array(numbers % shard_size)}
        arrays = [columns[name] if name in columns else kept.column(name) for name in schema.names]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def run_corpus(config: RunConfig, tables: Tables, progress: Progress = silent) -> dict[str, int]:
    """Writes what is left of `sequences`; returns counts of what was kept and dropped."""
    if not tables.exists("sequences"):
        _cut_files(config, tables, progress)
        digests = [batch.column(0) for batch in tables.sorted_batches("windows", ["digest"], "file_number")]
        keep = first_of_each(pa.chunked_array(digests, pa.binary(16)).combine_chunks())
        if not keep.any():
            counts = _counts(tables)
            tables.drop("windows")
            tables.drop("corpus_files")
            raise UserError(
                f"corpus.dataset {config.corpus.dataset!r} gave no sequence of {config.corpus.sequence_length} tokens "
                f"({counts}); lower corpus.sequence_length, or set corpus.ascii_only to false"
            )
        columns = [name for name in SCHEMAS["sequences"].names if name in SCHEMAS["windows"].names]
        batches = tables.sorted_batches("windows", columns, "file_number")
        numbered = number_shards(batches, keep, config.corpus.shard_size)
        tables.create("sequences", numbered)
    if not tables.is_finished("sequences"):
        tables.finish("corpus_files")
        tables.finish("sequences")
    tables.drop("windows")
    return _counts(tables)


def _cut_files(config: RunConfig, tables: Tables, progress: Progress) -> None:
    """Fills `windows` and `corpus_files` from the input files that are left."""
    files = list_files(config.corpus)
    finished = check_same_files(tables, files)
    work = [
        {"file_number": number, "file": file, "quota": quota}
        for number, (file, quota) in enumerate(zip(files, quotas(config.corpus.num_sequences, len(files)), strict=True))
        if quota and number not in finished
    ]
    if not work:
        return
    throughput = Throughput(config.name, "corpus", len(finished), len(finished) + len(work))
    throughput.report(progress)
    tables.create_empty("windows")
    results = map_units(FileCutter, (config, tables), work, config.resources.corpus)
    rows: list[dict[str, Any]] = []
    last_append = time.monotonic()
    for result in tables.stream_commit("windows", results, compact=False):
        # After its windows: this row marks the file as finished.
        rows.append(json.loads(result["row"]))
        if time.monotonic() - last_append > COMMIT_SECONDS:
            tables.append("corpus_files", rows)
            rows, last_append = [], time.monotonic()
        throughput.add(1, result["num_tokens"])
        throughput.report(progress)
    tables.append("corpus_files", rows)


def check_same_files(tables: Tables, files: list[str]) -> set[int]:
    """Numbers of the files that are finished.

    Raises:
        UserError: the list of input files has changed since: numbers would mean other files.
    """
    finished = {row["file_number"]: row["file"] for row in tables.read("corpus_files").to_pylist()}
    for number, file in finished.items():
        if number >= len(files) or files[number] != file:
            now = files[number] if number < len(files) else "not there"
            raise UserError(
                f"corpus.dataset has changed since this run began to cut it: input file {number} was {file} and is "
                f"{now}; put the files back, or give another run_dir"
            )
    return set(finished)


def _counts(tables: Tables) -> dict[str, int]:
    """Sequences, damaged places and what else was dropped, for people."""
    files = tables.read("corpus_files", ["num_sequences", "dropped"]).to_pylist()
    dropped = sum((Counter(json.loads(file["dropped"])) for file in files), Counter())
    num_sequences = tables.count("sequences")
    if num_sequences:
        dropped["duplicate"] += sum(file["num_sequences"] for file in files) - num_sequences
    return {"sequences": num_sequences, **+dropped}


def damaged(tables: Tables) -> list[str]:
    """The places of the corpus that could not be read, by name."""
    return [name for file in tables.read("corpus_files", ["damaged"]).to_pylist() for name in file["damaged"]]
