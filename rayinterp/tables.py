"""The Lance tables of a run: their schemas, and the only code that reads or writes them.

    sequences -> activations, features -> embeddings -> records -> candidates, explanations -> scores

One folder `<table>.lance` per table under the run directory. Two ways in:

- `append` writes rows and commits at once, and leaves out rows whose key is already there (the first write wins);
- `write_fragments` (in a worker) and `commit` split the two, so that a thousand shards written by a hundred actors are
  a handful of commits; `stream_commit` drives them over a Ray Dataset, with one `FragmentCommitter` actor.

What is finished is always read from the tables themselves. This module knows nothing of models or prompts.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import lance
import pyarrow as pa
import pyarrow.compute as pc
import ray

from rayinterp.errors import UserError
from rayinterp.pools import beside_driver

if TYPE_CHECKING:
    import ray.data

COMMITS_BETWEEN_COMPACTIONS = 100
"""A committer compacts a table after so many commits."""
PROBES, REFINE = 100, 16
"""Partitions of a vector index that a query looks into; candidates re-ranked by their stored vectors, times k."""
KEPT_FOR_WRITERS = timedelta(minutes=10)
"""Versions younger than this stay while workers write: one of them may be about to read it."""
COMMIT_SECONDS = 2.0
"""Fragments are committed in groups this far apart: a commit per shard makes a manifest per shard."""


def _field(name: str, type_: pa.DataType, sentence: str) -> pa.Field:
    return pa.field(name, type_, metadata={"description": sentence})


_FEATURE = [
    _field("feature_key", pa.string(), "Printed feature id, e.g. layer_12/4711."),
    _field("sae", pa.string(), "Name of the SAE in the config."),
    _field("feature", pa.int32(), "Index of the latent within its SAE."),
]
_INT32S, _INT64S, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.float32())
_SEQUENCE = [
    _field("sequence_id", pa.int64(), "Stable id: input file, document and window packed into one number."),
    _field("document_id", pa.int64(), "Hash of the document's text, so copies of a document share a split."),
    _field("subset", pa.string(), "Part of the corpus, e.g. the Pile's pile_set_name."),
    _field("split", pa.string(), "train, valid or test, drawn by document."),
    _field("token_ids", _INT32S, "Text tokens, without BOS; all positions in other tables index this list."),
    _field("text", pa.string(), "The window's text."),
]

SCHEMAS: dict[str, pa.Schema] = {
    "corpus_files": pa.schema(
        [
            _field("file_number", pa.int32(), "Place of the input file; its row marks it as finished."),
            _field("file", pa.string(), "Where it is."),
            _field("quota", pa.int64(), "Sequences asked for."),
            _field("num_sequences", pa.int64(), "Sequences cut, before duplicates across files are dropped."),
            _field("dropped", pa.string(), "What was left out, by reason, as JSON."),
            _field("damaged", pa.list_(pa.string()), "The first places that could not be read, by name."),
        ]
    ),
    "windows": pa.schema(
        [
            _field("file_number", pa.int32(), "Input file; the table is dropped once `sequences` is written."),
            *_SEQUENCE,
            _field("digest", pa.binary(16), "Hash of the text, white space aside, to find duplicates across files."),
        ]
    ),
    "sequences": pa.schema(
        [
            *_SEQUENCE[:4],
            _field("shard", pa.int32(), "Unit of work of the harvest and index stages."),
            _field("row", pa.int32(), "Place within the shard."),
            *_SEQUENCE[4:],
        ]
    ),
    "activations": pa.schema(
        [
            *_FEATURE,
            _field("shard", pa.int32(), "Shard of the sequences; feature = -1 marks the shard as finished."),
            _field("rows", _INT32S, "Rows of the shard in which the feature is active, ascending."),
            _field("max_activations", _FLOATS, "Largest activation in each of those rows."),
            _field("offsets", _INT32S, "CSR offsets into positions and values, one more than rows."),
            _field("positions", pa.list_(pa.uint16()), "Token positions of the non-zero activations."),
            _field("values", _FLOATS, "The non-zero activations, in the SAE's own units."),
            _field("sum", pa.float64(), "Sum of the non-zero activations."),
            _field("histogram_buckets", pa.list_(pa.int16()), "Buckets of the values, ascending (see `sketch`)."),
            _field("histogram_counts", _INT32S, "Values in each of those buckets."),
            _field("num_sequences", pa.int64(), "On the marker row: sequences in the shard."),
            _field("num_tokens", pa.int64(), "On the marker row: tokens in the shard."),
            _field("notes", pa.string(), "On the marker row: by SAE, its check and its outlier tokens, as JSON."),
        ]
    ),
    "saes": pa.schema(
        [
            _field("sae", pa.string(), "Name of the SAE in the config."),
            _field("num_features", pa.int32(), "Features harvested."),
            _field("variance_unexplained", pa.float64(), "Share missed on the first batch; null for some transcoders."),
            _field("median_norm", pa.float64(), "Median length of what it reads, on the first batch."),
            _field("num_outlier_tokens", pa.int64(), "Tokens whose input is OUTLIER_NORM times as long or longer."),
            _field("outlier_token_ids", _INT32S, "The most frequent of them."),
            _field("outlier_counts", _INT64S, "How often each."),
        ]
    ),
    "features": pa.schema(
        [
            *_FEATURE,
            _field("num_sequences", pa.int64(), "Sequences in which the feature is active, all splits."),
            _field("num_tokens", pa.int64(), "Tokens at which the feature is active, all splits."),
            _field("density", pa.float64(), "Share of all tokens at which the feature is active."),
            _field("max_activation", pa.float32(), "Largest activation over train documents: the scale of scores."),
            _field("mean_activation", pa.float32(), "Mean of the non-zero activations."),
            _field(
                "quantiles",
                _FLOATS,
                "0, 25, 50, 75, 90, 99 and 100 % quantiles of the non-zero activations, within 1 %.",
            ),
            _field("top_sequence_ids", _INT64S, "Sequences with the highest maximum, best first."),
            _field("top_activations", _FLOATS, "Their maxima."),
            _field("status", pa.string(), "live, dead, too_few (train sequences) or dense."),
        ]
    ),
    "embeddings": pa.schema(
        [
            _field("sequence_id", pa.int64(), "The sequence."),
            _field("split", pa.string(), "Its split, for prefilters."),
            _field("shard", pa.int32(), "Its shard: what is finished is read from here."),
            _field("vector", pa.list_(pa.float16()), "L2-normalised sentence embedding (fixed size on disk)."),
        ]
    ),
    "records": pa.schema(
        [
            *_FEATURE,
            _field("split", pa.string(), "train, valid or test."),
            _field("source", pa.string(), "Why it was chosen: positive, random_negative, similar_negative, ..."),
            _field("rank", pa.int32(), "Place within the source."),
            _field("sequence_id", pa.int64(), "The sequence."),
            _field("document_id", pa.int64(), "Its document: what the bootstrap resamples."),
            _field("token_ids", _INT32S, "Its tokens in the subject model's vocabulary."),
            _field("tokens", pa.list_(pa.string()), "Its tokens as text."),
            _field("activations", _FLOATS, "The feature's activation at each token, in the SAE's units."),
            _field(
                "similarity",
                pa.float32(),
                "Mean cosine to the train positives, as projected for the source; neighbour: of decoders; else null.",
            ),
        ]
    ),
    "record_counts": pa.schema(
        [
            *_FEATURE,
            _field("split", pa.string(), "train, valid or test."),
            _field("source", pa.string(), "The source of the records counted."),
            _field("requested", pa.int32(), "Records that the config asks for."),
            _field("found", pa.int32(), "Records that there are."),
            _field("status", pa.string(), "ok, short, or the feature's own status where no records were drawn."),
        ]
    ),
    "holistic": pa.schema(
        [
            _field("feature_key", pa.string(), "Printed feature id."),
            _field("sequence_id", pa.int64(), "The sequence."),
            _field("values", _FLOATS, "Fall of the mean activation when each token is dropped, in the SAE's units."),
            _field("chunk", pa.int32(), "Unit of work that computed it."),
        ]
    ),
    "candidates": pa.schema(
        [
            _field("feature_key", pa.string(), "Printed feature id."),
            _field("explainer", pa.string(), "Explainer arm, name@hash."),
            _field("simulator", pa.string(), "Simulator that scored the node, name@hash."),
            _field("node", pa.int32(), "Number of the node within the search."),
            _field("parent", pa.int32(), "Its parent; null for a root."),
            _field("depth", pa.int32(), "0 for roots."),
            _field("kind", pa.string(), "llm, lexical or revision."),
            _field("explanation", pa.string(), "The explanation as JSON; null where none could be parsed."),
            _field("status", pa.string(), "ok, duplicate, pruned, parse_error, llm_error, or why it has no score."),
            _field("cascade_score", pa.float32(), "Train correlation of the last cheap look, where there are looks."),
            _field("train_score", pa.float32(), "Correlation on train records when it was scored first."),
            _field("valid_score", pa.float32(), "Correlation on valid records."),
            _field("thought", pa.string(), "Raw answer of the LLM, kept also where it did not parse."),
            _field("feedback", pa.string(), "What the explainer was told about the parent."),
            _field("prompt_tokens", pa.int64(), "Tokens read by the LLM for this node."),
            _field("completion_tokens", pa.int64(), "Tokens written by the LLM for this node."),
            _field("cost_usd", pa.float64(), "Price of the node's calls; null without a price."),
        ]
    ),
    "explanations": pa.schema(
        [
            *_FEATURE,
            _field("explainer", pa.string(), "Explainer arm, name@hash."),
            _field("simulator", pa.string(), "Simulator that guided the search, name@hash."),
            _field("explanation", pa.string(), "The winner as JSON; null where there is none."),
            _field("train_score", pa.float32(), "Correlation on train, as the falsifier left it."),
            _field(
                "valid_score",
                pa.float32(),
                "What the winner was chosen by: on valid, as the falsifier left it.",
            ),
            _field("num_candidates", pa.int32(), "Nodes of the search."),
            _field("num_falsifiers", pa.int32(), "Silent sequences that joined its train set."),
            _field("finalists", _INT32S, "Nodes that were attacked on valid before the winner was chosen."),
            _field("final_scores", _FLOATS, "Their correlations on valid with what sounds like any of them."),
            _field(
                "status",
                pa.string(),
                "ok, no_records, no_positives, no_explanation, llm_error, no_budget, or budget (cut short).",
            ),
            _field("cost_usd", pa.float64(), "Price of the search; null without a price."),
        ]
    ),
    "simulations": pa.schema(
        [
            _field("simulator", pa.string(), "The LLM, name@hash of what its answers depend on; arms may share it."),
            _field("rule_hash", pa.string(), "Hash of the rule's words."),
            _field("sequence_id", pa.int64(), "The sequence."),
            _field(
                "log_probs",
                pa.list_(pa.float16()),
                "Six raw log-probabilities (digits 0-5) per token, one token after another.",
            ),
        ]
    ),
    "llm_calls": pa.schema(
        [
            _field("request_hash", pa.string(), "Hash of the whole request: model, messages, sampling, seed."),
            _field("feature_key", pa.string(), "The feature it was made for, for the bill."),
            _field("model", pa.string(), "Model that answered."),
            _field("request", pa.string(), "The request as JSON, without secrets."),
            _field("response", pa.string(), "The answer's text."),
            _field("finish_reason", pa.string(), "stop, or length where the answer was cut off."),
            _field("prompt_tokens", pa.int64(), "Tokens read."),
            _field("completion_tokens", pa.int64(), "Tokens written."),
            _field("cost_usd", pa.float64(), "Price by the config's table; null without one."),
            _field("seconds", pa.float64(), "Wall time of the call."),
            _field("stage", pa.string(), "explain or score; null, in tables of before, is explain."),
        ]
    ),
    "test_records": pa.schema(
        [
            *_FEATURE,
            _field("explainer", pa.string(), "The first arm whose explanation called for it."),
            _field("similarity", pa.float32(), "Cosine to the nearest rule of that explanation."),
            _field("rank", pa.int32(), "Place among those that this arm called for, nearest first."),
            _field("sequence_id", pa.int64(), "The sequence."),
            _field("document_id", pa.int64(), "Its document."),
            _field("token_ids", _INT32S, "Its tokens."),
            _field("tokens", pa.list_(pa.string()), "Its tokens as text."),
            _field("activations", _FLOATS, "The feature's activation at each token (all zero)."),
        ]
    ),
    "scores": pa.schema(
        [
            *_FEATURE,
            _field("explainer", pa.string(), "Explainer arm, name@hash."),
            _field("control", pa.string(), "Empty for the explanation itself; else null, shuffled or token_lookup."),
            _field("simulator", pa.string(), "Simulator arm, name@hash; of a further scorer its own arm."),
            _field(
                "scorer",
                pa.string(),
                "correlation, r2, r2_uncentered, abs_dev_explained, auroc; detection, fuzzing, intruder, surprisal, "
                "embedding.",
            ),
            _field("source", pa.string(), "Complementary source of the records."),
            _field("split", pa.string(), "Split of the records."),
            _field("value", pa.float64(), "The score; null where undefined."),
            _field("ci_low", pa.float64(), "Lower end of the 95 % bootstrap interval over documents."),
            _field("ci_high", pa.float64(), "Upper end."),
            _field("num_records", pa.int32(), "Records scored."),
            _field("false_positives_per_sequence", pa.float64(), "Silent tokens predicted above 1, per silent record."),
            _field("false_negatives_per_sequence", pa.float64(), "Tokens above 1 predicted at most 1, per positive."),
            _field("status", pa.string(), "ok, wide (few records), or why there is no value."),
            _field("settings", pa.string(), "What else it depends on; where that has changed it is made again."),
            _field(
                "num_unparsed",
                pa.int32(),
                "Records left out since no answer about them parsed, retries included; null where nothing is parsed.",
            ),
        ]
    ),
    "experiments": pa.schema(
        [
            _field("experiment", pa.string(), "Name of the experiment."),
            _field("simulator", pa.string(), "Simulator arm whose scores are read, name@hash."),
            _field("panel", pa.string(), "Title of the plot."),
            _field("quantity", pa.string(), "What is averaged."),
            _field("series", pa.string(), "Line of the plot."),
            _field("x", pa.string(), "Place on the line: an SAE, a rule cap, an explainer."),
            _field("value", pa.float64(), "Mean over features; null where none has a value."),
            _field("ci_low", pa.float64(), "Lower end of the 95 % bootstrap interval over features."),
            _field("ci_high", pa.float64(), "Upper end."),
            _field("num_features", pa.int32(), "Features averaged."),
            _field("num_undefined", pa.int32(), "Features without a value."),
        ]
    ),
    "complexity": pa.schema(
        [
            *_FEATURE,
            _field("explainer", pa.string(), "Explainer arm, name@hash."),
            _field("simulator", pa.string(), "Simulator arm that it depends on, name@hash; empty where on none."),
            _field("measure", pa.string(), "num_rules, num_words, num_rules_95, rule_removal, rule_overlap, rating."),
            _field("value", pa.float64(), "The measure; null where undefined."),
            _field("status", pa.string(), "ok, or why there is no value."),
        ]
    ),
    "predictions": pa.schema(
        [
            _field("feature_key", pa.string(), "Printed feature id."),
            _field("explainer", pa.string(), "Explainer arm, name@hash."),
            _field("simulator", pa.string(), "Simulator arm, name@hash."),
            _field("split", pa.string(), "Split of the record."),
            _field("source", pa.string(), "Source of the record."),
            _field("sequence_id", pa.int64(), "The sequence."),
            _field("values", _FLOATS, "Simulated activation at each token, 0-5."),
        ]
    ),
}

KEYS: dict[str, list[str]] = {
    "corpus_files": ["file_number"],
    "windows": ["sequence_id"],
    "sequences": ["sequence_id"],
    "saes": ["sae"],
    "activations": ["feature_key", "shard"],
    "features": ["feature_key"],
    "embeddings": ["sequence_id"],
    "records": ["feature_key", "split", "source", "rank"],
    "record_counts": ["feature_key", "split", "source"],
    "holistic": ["feature_key", "sequence_id"],
    "candidates": ["feature_key", "explainer", "simulator", "node"],
    "explanations": ["feature_key", "explainer", "simulator"],
    "simulations": ["simulator", "rule_hash", "sequence_id"],
    "llm_calls": ["request_hash"],
    "test_records": ["feature_key", "sequence_id"],
    "scores": ["feature_key", "explainer", "control", "simulator", "scorer", "source", "split"],
    "experiments": ["experiment", "simulator", "panel", "series", "x"],
    "complexity": ["feature_key", "explainer", "simulator", "measure"],
    "predictions": ["feature_key", "explainer", "simulator", "split", "source", "sequence_id"],
}

VOLATILE: dict[str, list[str]] = {"llm_calls": ["seconds"]}
"""Columns that may differ between two runs of the same work."""

_UNIT: dict[str, tuple[str, str | None]] = {
    "windows": ("file_number", None),
    "activations": ("shard", "feature = -1"),
    "embeddings": ("shard", None),
    "holistic": ("chunk", None),
}
"""Tables that workers write unit by unit: the unit's column, and which rows mark a unit as finished."""

_SCALAR_INDICES: dict[str, dict[str, Literal["BTREE", "BITMAP"]]] = {
    "sequences": {"sequence_id": "BTREE", "shard": "BTREE"},
    "activations": {"feature_key": "BTREE"},
    "embeddings": {"sequence_id": "BTREE", "split": "BITMAP"},
    "records": {"feature_key": "BTREE"},
    "holistic": {"feature_key": "BTREE"},
    "llm_calls": {"feature_key": "BTREE"},
    "simulations": {"rule_hash": "BTREE", "sequence_id": "BTREE"},
}


@dataclass(frozen=True)
class Tables:
    """The tables under one run directory (a local path, `s3://...` or `gs://...`)."""

    root: str
    storage_options: dict[str, str] | None = None

    def uri(self, table: str) -> str:
        """Where a table lies.

        Raises:
            KeyError: there is no table of that name.
        """
        if table not in SCHEMAS:
            raise KeyError(f"no table {table!r}; the tables are {', '.join(SCHEMAS)}")
        return f"{self.root.rstrip('/')}/{table}.lance"

    def open(self, table: str) -> lance.LanceDataset | None:
        """The table's newest version, or None where it has not been created yet."""
        try:
            return lance.dataset(self.uri(table), storage_options=self.storage_options)
        except (ValueError, FileNotFoundError) as error:
            if "not found" in str(error).lower():
                return None
            raise

    def version(self, table: str) -> int | None:
        """Number of the newest version; None where there is no table yet."""
        dataset = self.open(table)
        return None if dataset is None else dataset.version

    def exists(self, table: str) -> bool:
        """Whether anything was ever written to it."""
        return self.open(table) is not None

    def read(self, table: str, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """Rows that pass the SQL filter `where`; an empty table where nothing has been written yet.

        Columns that the table was written without, by an earlier version of this package, are null.
        """
        dataset = self.open(table)
        if dataset is None:
            empty = SCHEMAS[table].empty_table()
            return empty if columns is None else empty.select(list(columns))
        wanted = dataset.schema.names + _lacking(table, dataset).names if columns is None else list(columns)
        there = [name for name in wanted if name in dataset.schema.names]
        rows = dataset.to_table(columns=there or KEYS[table], filter=where)
        for name in wanted:
            if name not in there:
                rows = rows.append_column(
                    SCHEMAS[table].field(name), pa.nulls(len(rows), SCHEMAS[table].field(name).type)
                )
        return rows.select(wanted)

    def ray_dataset(
        self, table: str, columns: Sequence[str] | None = None, where: str | None = None
    ) -> ray.data.Dataset:
        """The same rows as a Ray Dataset, read by the cluster's workers."""
        import lance_ray  # two seconds, which every worker of a run would pay

        return lance_ray.read_lance(
            self.uri(table),
            columns=None if columns is None else list(columns),
            filter=where,
            storage_options=self.storage_options,
        )

    def count(self, table: str, where: str | None = None) -> int:
        """Rows that fit an SQL condition; 0 of a table that is not there."""
        dataset = self.open(table)
        return 0 if dataset is None else dataset.count_rows(where)

    def distinct(self, table: str, column: str, where: str | None = None) -> set[Any]:
        """Values of one column; what is left to do is what there is, less these."""
        return set(pc.unique(self.read(table, [column], where)[column]).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]

    def append(self, table: str, rows: pa.Table | list[dict[str, Any]]) -> None:
        """Adds rows in one commit; a row whose key is already there is left out."""
        data = first_of_each_key(table, to_arrow(table, rows))
        if data.num_rows == 0:
            return
        dataset = self.open(table)
        if dataset is None:
            lance.write_dataset(data, self.uri(table), storage_options=self.storage_options)
        else:
            lacking = _lacking(table, dataset)
            if lacking.names:
                dataset.add_columns(lacking)  # nulls in the rows of before, which no file is rewritten for
                dataset = self.open(table)
                assert dataset is not None
            dataset.merge_insert(KEYS[table]).when_not_matched_insert_all().execute(data)

    def add(self, table: str, rows: pa.Table | list[dict[str, Any]]) -> None:
        """Adds rows in one commit without looking for their keys, of which the caller knows that they are not there.

        `append` reads the keys of the whole table: seconds, where it has millions of rows.
        """
        dataset = self.open(table)
        if dataset is None or _lacking(table, dataset).names:
            self.append(table, rows)
        else:
            self.commit(table, self.write_fragments(table, rows))

    def create(self, table: str, rows: pa.Table | list[dict[str, Any]] | Iterator[pa.RecordBatch]) -> None:
        """Writes a whole table in one commit, in place of what is there: for a stage that finishes at once."""
        with _readable(table, rows) as data:
            lance.write_dataset(data, self.uri(table), mode="overwrite", storage_options=self.storage_options)

    def delete(self, table: str, where: str) -> None:
        """Removes rows that pass the SQL filter: scores that a larger set of records has overtaken."""
        dataset = self.open(table)
        if dataset is not None:
            dataset.delete(where)

    def drop(self, table: str) -> None:
        """Removes a table, if there is one."""
        dataset = self.open(table)
        if dataset is not None:
            lance.LanceDataset.drop(self.uri(table), storage_options=self.storage_options or {})

    def sorted_batches(self, table: str, columns: Sequence[str], column: str) -> Iterator[pa.RecordBatch]:
        """Streams a table whose fragments hold one value of `column` each, in the order of those values."""
        dataset = self.open(table)
        fragments = [] if dataset is None else dataset.get_fragments()
        first = {f.fragment_id: next(f.to_batches(columns=[column], limit=1))[column][0].as_py() for f in fragments}
        for fragment in sorted(fragments, key=lambda f: (first[f.fragment_id], f.fragment_id)):
            yield from fragment.to_batches(columns=list(columns))

    def create_empty(self, table: str, schema: pa.Schema | None = None) -> None:
        """Makes the table if there is none, so that workers can write fragments into it."""
        if not self.exists(table):
            empty = (schema or SCHEMAS[table]).empty_table()
            try:
                lance.write_dataset(empty, self.uri(table), storage_options=self.storage_options)
            except OSError:
                if not self.exists(table):  # or another worker was quicker
                    raise

    def write_fragments(self, table: str, rows: pa.Table | Iterator[pa.RecordBatch]) -> list[str]:
        """Writes data files that no reader sees yet; returns their metadata as JSON for `commit`.

        Raises:
            UserError: the table, made before, is not there: this node does not see the folder that the driver sees.
        """
        if not self.exists(table):  # Lance would make one, on a disk that nobody else reads
            raise UserError(
                f"run_dir {self.root!r} holds no table {table} on node {socket.gethostname()}, and does where the "
                "driver runs: give a run_dir that all nodes see as the same, s3://..., gs://... or a shared folder"
            )
        with _readable(table, rows) as data:
            fragments = lance.fragment.write_fragments(
                data, self.uri(table), schema=data.schema, mode="append", storage_options=self.storage_options
            )
        return [json.dumps(fragment.to_json()) for fragment in fragments]

    def commit(self, table: str, fragments: Iterable[str]) -> None:
        """Makes written fragments visible, all of them in one commit."""
        metadata = [lance.FragmentMetadata.from_json(fragment) for fragment in fragments]
        dataset = self.open(table)
        assert dataset is not None, f"commit to {table} before create_empty"
        if metadata:
            lance.LanceDataset.commit(
                self.uri(table),
                lance.LanceOperation.Append(metadata),
                read_version=dataset.version,
                storage_options=self.storage_options,
            )

    def finished_units(self, table: str) -> set[int]:
        """Shards, files or chunks of the table that are committed."""
        column, where = _UNIT[table]
        return self.distinct(table, column, where)

    def stream_commit(
        self,
        table: str,
        results: ray.data.Dataset,
        compact: bool = True,
        check: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> Iterator[dict[str, Any]]:
        """Runs a Ray Dataset whose rows carry `unit` and `fragments` (JSON strings) and commits them in groups.

        Yields each row once its fragments are visible, so a caller that counts them counts what a crash cannot undo.
        Without `compact`, every fragment keeps to one unit. What `check` raises for a row keeps it from being
        committed.
        """
        committer: Any = (
            ray.remote(FragmentCommitter)
            .options(  # pyright: ignore[reportCallIssue]
                num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside_driver(soft=True)
            )
            .remote(self, table, compact)
        )
        waiting: dict[int, dict[str, Any]] = {}
        for row in results.iter_rows():
            check(row)
            waiting[int(row["unit"])] = row
            for unit in ray.get(committer.add.remote(int(row["unit"]), list(row["fragments"]))):
                yield waiting.pop(unit)
        # Handed over again, in case the actor was lost with what it held: a unit is committed once.
        ray.get(committer.flush.remote({unit: list(row["fragments"]) for unit, row in waiting.items()}))
        yield from waiting.values()
        ray.kill(committer)

    def finish(self, table: str, in_use: bool = False) -> None:
        """Compacts small files, indexes the key columns, drops old versions and files that no version names.

        Only while nobody else writes or reads the table, unless it is `in_use`: then what is young stays, since
        somebody may be about to read it.
        """
        dataset = self.open(table)
        if dataset is None:
            return
        dataset.optimize.compact_files()
        for column, kind in _SCALAR_INDICES.get(table, {}).items():
            dataset.create_scalar_index(column, kind, replace=True)
        if in_use:
            dataset.cleanup_old_versions(older_than=KEPT_FOR_WRITERS)
        else:
            dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)

    def create_vector_index(self, table: str, kind: str, num_partitions: int, num_workers: int) -> None:
        """Builds the index on `vector` with Ray tasks, once `finish`, which moves rows, is done."""
        import lance_ray

        lance_ray.create_index(
            self.uri(table),
            "vector",
            kind,
            metric="cosine",
            num_partitions=num_partitions,
            num_workers=num_workers,
            storage_options=self.storage_options,
        )
        dataset = self.open(table)
        assert dataset is not None
        dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)

    def has_vector_index(self, table: str) -> bool:
        dataset = self.open(table)
        return dataset is not None and any("vector" in index.field_names for index in dataset.describe_indices())

    def vector_index(self, table: str) -> VectorIndex:
        """The index on `vector`, opened for many queries.

        Raises:
            UserError: there is none.
        """
        if not self.has_vector_index(table):
            raise UserError(
                f"{self.root!r} holds no vector index of {table}, which index.search asks for at this size; run the "
                "index stage, or set index.search=exact in another run_dir"
            )
        return VectorIndex(self, table)

    def is_finished(self, table: str) -> bool:
        """Whether `finish` came to its end on the table as it is: indexed, and old versions dropped."""
        dataset = self.open(table)
        if dataset is None:
            return False
        indexed = {field for index in dataset.describe_indices() for field in index.field_names}
        return indexed >= set(_SCALAR_INDICES.get(table, {})) and len(dataset.versions()) == 1

    def compact(self, table: str) -> None:
        """Merges small files and drops old versions, while workers go on writing files for later commits."""
        dataset = self.open(table)
        if dataset is not None:
            dataset.optimize.compact_files()
            dataset.cleanup_old_versions(older_than=KEPT_FOR_WRITERS)


class VectorIndex:
    """A vector index held open: to open it costs as much as many queries."""

    def __init__(self, tables: Tables, table: str) -> None:
        import lancedb  # three seconds, which every worker of a run would pay

        self._opened = lancedb.connect(tables.root, storage_options=tables.storage_options).open_table(table)

    def nearest(self, query: Sequence[float], k: int, where: str) -> pa.Table:
        """The `k` rows that the index finds nearest among those that pass the filter: sequence_id and vector."""
        search: Any = self._opened.search(list(query), vector_column_name="vector")
        return (
            search.distance_type("cosine")
            .where(where, prefilter=True)
            .nprobes(PROBES)
            .refine_factor(REFINE)
            .limit(k)
            .select(["sequence_id", "vector"])
            .to_arrow()
        )


def _lacking(table: str, dataset: lance.LanceDataset) -> pa.Schema:
    """Columns that have joined the schema since the table was written."""
    return pa.schema([field for field in SCHEMAS[table] if field.name not in dataset.schema.names])


@contextmanager
def _readable(
    table: str, rows: pa.Table | list[dict[str, Any]] | Iterator[pa.RecordBatch]
) -> Iterator[pa.Table | pa.RecordBatchReader]:
    """Rows as Lance takes them. What goes wrong while batches are made is raised as it was: on its way through Arrow
    it would become an OSError."""
    if isinstance(rows, pa.Table | list):
        yield to_arrow(table, rows)
        return
    failed: list[Exception] = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from rows
        except Exception as error:
            failed.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(SCHEMAS[table], batches())
    except OSError:
        if failed:
            raise failed[0] from None
        raise


def to_arrow(table: str, rows: pa.Table | list[dict[str, Any]]) -> pa.Table:
    """Rows in the table's schema: columns that a row leaves out are null, a column that the table lacks is an error."""
    if isinstance(rows, pa.Table):
        return rows
    schema = SCHEMAS[table]
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise KeyError(f"table {table} has no column {sorted(unknown)}")
    return pa.Table.from_pylist(rows, schema=schema)


def first_of_each_key(table: str, data: pa.Table) -> pa.Table:
    """The rows without later ones of the same key, which a merge would insert side by side."""
    keys = list(zip(*(data[column].to_pylist() for column in KEYS[table]), strict=True))
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    return data if len(first) == len(keys) else data.take(pa.array(sorted(first.values()), pa.int64()))


def embeddings_schema(dim: int, dtype: pa.DataType) -> pa.Schema:
    """The schema of `embeddings` for vectors of one length: an index needs a fixed size."""
    schema = SCHEMAS["embeddings"]
    index = schema.get_field_index("vector")
    return schema.set(index, schema.field(index).with_type(pa.list_(dtype, dim)))


def sql_in(column: str, values: Iterable[Any]) -> str:
    """`column in (...)`, quoted; false for no values."""
    quoted = [str(v) if isinstance(v, int) else "'" + str(v).replace("'", "''") + "'" for v in values]
    return f"{column} in ({', '.join(quoted)})" if quoted else "false"


class FragmentCommitter:
    """Makes the units that workers wrote visible in groups: run as one Ray actor a table.

    A unit that comes again, because a task or a message was repeated, is committed once. Commits that follow each
    other closely are one: a commit per shard would make a manifest per shard.
    """

    def __init__(self, tables: Tables, table: str, compact: bool = True) -> None:
        self._tables, self._table, self._compact = tables, table, compact
        self._done: set[int] = set()
        self._version: int | None = None
        self._see_what_is_done()
        self._waiting: dict[int, list[str]] = {}
        self._num_commits = 0
        self._last_commit = time.monotonic()

    def __repr__(self) -> str:  # on Ray's dashboard and in its logs
        return f"FragmentCommitter({self._table})"

    def add(self, unit: int, fragments: list[str]) -> list[int]:
        """Takes a unit; returns those that this call made visible, or that were so already."""
        if unit in self._done:
            return [unit]
        self._waiting[unit] = fragments
        return self.flush() if time.monotonic() - self._last_commit > COMMIT_SECONDS else []

    def flush(self, more: dict[int, list[str]] | None = None) -> list[int]:
        """Commits what is waiting, and `more`; returns the units that are visible now and were asked for."""
        self._waiting.update(more or {})
        self._see_what_is_done()
        units = list(self._waiting)
        new = [fragments for unit, fragments in self._waiting.items() if unit not in self._done]
        self._tables.commit(self._table, [fragment for fragments in new for fragment in fragments])
        self._done.update(units)
        self._waiting.clear()
        self._num_commits += 1
        if self._compact and self._num_commits % COMMITS_BETWEEN_COMPACTIONS == 0:
            self._tables.compact(self._table)
        self._version = self._tables.version(self._table)
        self._last_commit = time.monotonic()
        return units

    def _see_what_is_done(self) -> None:
        """Reads the finished units, if somebody else has written: the committer of a driver that was killed, say."""
        version = self._tables.version(self._table)
        if version != self._version:
            self._done |= self._tables.finished_units(self._table)
            self._version = version


class Committer:
    """Gathers rows from many actors and appends them in groups: run as one Ray actor a run.

    A small commit costs milliseconds and a manifest; a search produces rows every second for hours. A thread writes,
    so that nobody who hands rows over waits for the disk, unless it cannot keep up.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._num_appends: Counter[str] = Counter()
        self._writer = ThreadPoolExecutor(1)
        self._writing: tuple[Future[None], dict[str, list[dict[str, Any]]]] | None = None
        self._last_flush = time.monotonic()

    def __repr__(self) -> str:  # on Ray's dashboard and in its logs
        return f"Committer({self._tables.root})"

    def add(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        """Takes rows by table; `rows` of one call become visible in the order of its tables."""
        for table, new in rows.items():
            self._rows.setdefault(table, []).extend(new)
        if time.monotonic() - self._last_flush > COMMIT_SECONDS:
            self._begin()

    def tick(self) -> None:
        """Commits what has waited long enough, though nothing more comes."""
        if self._rows and time.monotonic() - self._last_flush > COMMIT_SECONDS:
            self._begin()

    def flush(self) -> None:
        """Commits what is waiting, and returns when it is done."""
        try:
            self._begin()
        except Exception:  # of the commit before, whose rows wait again: its store may have had a bad moment
            self._begin()
        self._wait()

    def _begin(self) -> None:
        self._wait()
        rows, self._rows = self._rows, {}
        self._writing = self._writer.submit(self._write, rows), rows
        self._last_flush = time.monotonic()

    def _wait(self) -> None:
        """For the commit under way; where it fails, its rows wait for the next."""
        if self._writing is None:
            return
        (writing, rows), self._writing = self._writing, None
        try:
            writing.result()
        except Exception:
            for table, old in rows.items():
                self._rows[table] = old + self._rows.get(table, [])
            raise

    def _write(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        """A winner goes after the nodes that led to it: its row marks the feature as finished."""
        for table in sorted(rows, key=_COMMIT_ORDER.index):
            self._tables.append(table, rows[table])
            self._num_appends[table] += 1
            # A commit lists all fragments before it: left alone, a night of small commits costs its square.
            if self._num_appends[table] % COMMITS_BETWEEN_COMPACTIONS == 0:
                self._tables.finish(table, in_use=True)


_COMMIT_ORDER = ["llm_calls", "simulations", "candidates", "predictions", "test_records", "explanations", "scores"]
