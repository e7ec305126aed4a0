"""Records: per feature, the sequences that explainers and scores see. Writes `records` and `record_counts`.

    positive           the feature is active: highest maxima, spread over the quantiles, or half and half
    random             any sequence that is not one of the positive records
    random_negative    the feature is silent
    similar            nearest to the train positives by sentence embedding, not one of the positive records
    similar_negative   nearest among the silent: what falsifies an explanation that is too broad

Every source is drawn within its split. A short source is a short count, never refilled from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from rayinterp.config import RecordsConfig, RunConfig
from rayinterp.corpus import Tokenizer, load_tokenizer
from rayinterp.explanation import MAX_STRENGTH
from rayinterp.index import nearest, to_matrix
from rayinterp.progress import Progress, silent
from rayinterp.simulate.simulator import TokenSequence
from rayinterp.subject import FeatureId
from rayinterp.tables import Tables, sql_in

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SPLITS = ("train", "valid", "test")
BLOCK = 32
"""Features per Ray task: a block's posting lists are read once."""


class Corpus(NamedTuple):
    """The columns of the corpus that choosing records needs, in sequence_id order; shared by all tasks."""

    sequence_ids: Int[np.ndarray, "n"]
    document_ids: Int[np.ndarray, "n"]
    splits: np.ndarray
    shard_rows: Int[np.ndarray, "n 2"]
    vectors: Float[np.ndarray, "n d"]


class Activity(NamedTuple):
    """Where one feature is active."""

    places: Int[np.ndarray, "m"]
    """Places in the corpus, ascending."""
    maxima: Float[np.ndarray, "m"]
    """Largest activation of each."""
    positions: list[np.ndarray]
    """Token positions of each."""
    values: list[np.ndarray]
    """Activations at those positions."""


class Choice(NamedTuple):
    """Sequences chosen for one (split, source), best first."""

    places: Int[np.ndarray, "k"]
    similarity: Float[np.ndarray, "n"] | None
    """Cosine of every sequence to the query, where the source used it."""


def choose_positives(
    maxima: Float[np.ndarray, "m"], count: int, how: str, generator: np.random.Generator
) -> Int[np.ndarray, "k"]:
    """Places in `maxima` of the positives: highest first, then the stratified draw."""
    order = np.argsort(-maxima, kind="stable")
    num_top = {"top": count, "quantile": 0, "mix": (count + 1) // 2}[how]
    top, rest = order[:num_top], order[num_top:]
    num_strata = min(count - len(top), len(rest))
    spread = [generator.choice(stratum) for stratum in np.array_split(rest, num_strata)] if num_strata > 0 else []
    return np.concatenate([top, np.array(spread, dtype=top.dtype)])


def similarity_to_positives(activity: Activity, corpus: Corpus, num_query: int) -> Float[np.ndarray, "n"]:
    """Mean cosine of every sequence to the strongest train positives: the dot product with their mean vector."""
    train = corpus.splits[activity.places] == "train"
    order = np.argsort(-activity.maxima[train], kind="stable")[:num_query]
    return corpus.vectors @ corpus.vectors[activity.places[train][order]].mean(0)


def choose(
    feature: FeatureId, activity: Activity, corpus: Corpus, config: RecordsConfig, seed: int
) -> dict[tuple[str, str], Choice]:
    """The records of one feature by (split, source)."""
    chosen: dict[tuple[str, str], Choice] = {}
    active = np.zeros(len(corpus.sequence_ids), dtype=bool)
    active[activity.places] = True
    similarity = similarity_to_positives(activity, corpus, config.num_query_positives)
    for split in SPLITS:
        quota = getattr(config, split)
        in_split = corpus.splits == split
        own = np.flatnonzero(in_split[activity.places])
        generator = generator_for(seed, feature, split, "positive")
        positives = activity.places[
            own[choose_positives(activity.maxima[own], quota.positive, config.positive, generator)]
        ]
        chosen[split, "positive"] = Choice(positives, None)
        not_chosen = in_split.copy()
        not_chosen[positives] = False
        for source in config.complementary:
            allowed = in_split & ~active if source.endswith("_negative") else not_chosen
            if source.startswith("similar"):
                places = nearest(similarity, allowed, corpus.sequence_ids, quota.complementary)
                chosen[split, source] = Choice(places, similarity)
            else:
                generator = generator_for(seed, feature, split, source)
                pool = np.flatnonzero(allowed)
                places = generator.permutation(pool)[: quota.complementary]
                chosen[split, source] = Choice(places, None)
    return chosen


def generator_for(seed: int, feature: FeatureId, *purpose: str) -> np.random.Generator:
    """Chance that belongs to the feature: the same on one worker or a hundred."""
    return np.random.default_rng([seed, *"/".join((str(feature), *purpose)).encode()])


def read_activity(postings: pa.Table, starts: Int[np.ndarray, "shards"], order: Int[np.ndarray, "n"]) -> Activity:
    """Joins a feature's posting lists; `order` takes (shard start + row) to the place in the corpus."""
    places, maxima, positions, values = [], [], [], []
    for row in postings.sort_by("shard").to_pylist():
        places.append(order[starts[row["shard"]] + np.asarray(row["rows"])])
        maxima.append(np.asarray(row["max_activations"], dtype=np.float32))
        cuts = row["offsets"][1:-1]
        positions += np.split(np.asarray(row["positions"]), cuts)
        values += np.split(np.asarray(row["values"], dtype=np.float32), cuts)
    joined = np.concatenate(places)
    by_place = np.argsort(joined)
    return Activity(
        joined[by_place],
        np.concatenate(maxima)[by_place],
        [positions[i] for i in by_place],
        [values[i] for i in by_place],
    )


def load_corpus(tables: Tables) -> Corpus:
    """Sequences joined with their vectors."""
    sequences = tables.read("sequences", ["sequence_id", "document_id", "split", "shard", "row"]).sort_by("sequence_id")
    embeddings = tables.read("embeddings", ["sequence_id", "vector"]).sort_by("sequence_id")
    ids = sequences["sequence_id"].to_numpy()
    assert np.array_equal(ids, embeddings["sequence_id"].to_numpy()), "sequences and embeddings differ"
    return Corpus(
        ids,
        sequences["document_id"].to_numpy(),
        np.asarray(sequences["split"].to_pylist()),
        np.stack([sequences["shard"].to_numpy(), sequences["row"].to_numpy()], axis=1),
        to_matrix(embeddings),
    )


def record_rows(
    feature: FeatureId,
    chosen: dict[tuple[str, str], Choice],
    activity: Activity,
    corpus: Corpus,
    token_ids: dict[int, list[int]],
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """Rows of `records`."""
    by_place = {place: i for i, place in enumerate(activity.places.tolist())}
    rows = []
    for (split, source), choice in chosen.items():
        for rank, place in enumerate(choice.places.tolist()):
            sequence_id = int(corpus.sequence_ids[place])
            ids = token_ids[sequence_id]
            activations = np.zeros(len(ids), dtype=np.float32)
            if place in by_place:
                activations[activity.positions[by_place[place]]] = activity.values[by_place[place]]
            rows.append(
                {
                    "feature_key": str(feature),
                    "sae": feature.sae,
                    "feature": feature.index,
                    "split": split,
                    "source": source,
                    "rank": rank,
                    "sequence_id": sequence_id,
                    "document_id": int(corpus.document_ids[place]),
                    "token_ids": ids,
                    "tokens": [tokenizer.decode([i]) for i in ids],
                    "activations": activations,
                    "similarity": None if choice.similarity is None else float(choice.similarity[place]),
                }
            )
    return rows


def count_rows(
    feature: FeatureId, status: str, chosen: dict[tuple[str, str], Choice], config: RecordsConfig
) -> list[dict[str, Any]]:
    """Rows of `record_counts`: also for a feature that gets no records."""
    rows = []
    for split in SPLITS:
        quota = getattr(config, split)
        for source in ("positive", *config.complementary):
            requested = quota.positive if source == "positive" else quota.complementary
            found = len(chosen[split, source].places) if chosen else 0
            ok = "ok" if found == requested else "short"
            rows.append(
                {
                    "feature_key": str(feature),
                    "sae": feature.sae,
                    "feature": feature.index,
                    "split": split,
                    "source": source,
                    "requested": requested,
                    "found": found,
                    "status": ok if status == "live" else status,
                }
            )
    return rows


class ActivationRecord(NamedTuple):
    """One sequence as seen by one feature."""

    sequence: TokenSequence
    document_id: int
    source: str
    token_ids: tuple[int, ...]
    activations: Float[np.ndarray, "seq"]
    """On the scale of explanations: 5 at the largest activation over train documents; may exceed it off train."""


def load_records(tables: Tables, feature: FeatureId, splits: Sequence[str]) -> dict[str, list[ActivationRecord]]:
    """A feature's records by split, positives first, in rank order."""
    scale = tables.read("features", ["max_activation"], f"feature_key = '{feature}'")["max_activation"][0].as_py()
    where = f"feature_key = '{feature}' and {sql_in('split', splits)}"
    rows = tables.read("records", where=where).to_pylist()
    rows.sort(key=lambda row: (row["source"] != "positive", row["source"], row["rank"]))
    records: dict[str, list[ActivationRecord]] = {split: [] for split in splits}
    for row in rows:
        records[row["split"]].append(
            ActivationRecord(
                TokenSequence(row["sequence_id"], tuple(row["tokens"])),
                row["document_id"],
                row["source"],
                tuple(row["token_ids"]),
                MAX_STRENGTH * np.asarray(row["activations"], dtype=np.float32) / scale,
            )
        )
    return records


def displayed(activations: Float[np.ndarray, "seq"]) -> list[int]:
    """What an LLM is shown: 0 for an exact zero, else 1-5, so that a weak activation is never hidden."""
    return [0 if a == 0 else int(np.clip(round(float(a)), 1, MAX_STRENGTH)) for a in activations]


def block_records(
    block: list[tuple[FeatureId, str]], corpus: Corpus, tables: Tables, config: RunConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `records` and `record_counts` for a block of (feature, status)."""
    live = [str(feature) for feature, status in block if status == "live"]
    postings = tables.read("activations", where=sql_in("feature_key", live))
    by_key = np.asarray(postings["feature_key"].to_pylist())
    # Postings name (shard, row); the corpus is in sequence_id order.
    order = np.lexsort((corpus.shard_rows[:, 1], corpus.shard_rows[:, 0]))
    shards = corpus.shard_rows[order, 0]
    starts = np.searchsorted(shards, np.arange(shards[-1] + 1))
    choices: dict[FeatureId, tuple[Activity, dict[tuple[str, str], Choice]]] = {}
    for feature, status in block:
        if status == "live":
            activity = read_activity(postings.filter(pa.array(by_key == str(feature))), starts, order)
            choices[feature] = activity, choose(feature, activity, corpus, config.records, config.seed)
    wanted = {int(i) for _, chosen in choices.values() for c in chosen.values() for i in corpus.sequence_ids[c.places]}
    found = tables.read("sequences", ["sequence_id", "token_ids"], sql_in("sequence_id", sorted(wanted)))
    token_ids = dict(zip(found["sequence_id"].to_pylist(), found["token_ids"].to_pylist(), strict=True))
    tokenizer = load_tokenizer(config)
    records, counts = [], []
    for feature, status in block:
        activity, chosen = choices.get(feature, (None, {}))
        if activity is not None:
            records += record_rows(feature, chosen, activity, corpus, token_ids, tokenizer)
        counts += count_rows(feature, status, chosen, config.records)
    return records, counts


def run_records(config: RunConfig, tables: Tables, progress: Progress = silent) -> dict[str, int]:
    """Chooses records for the features that are left, in Ray tasks over blocks; returns counts by status."""
    features = tables.read("features", ["feature_key", "status"]).to_pylist()
    finished = tables.distinct("record_counts", "feature_key")
    left = [(FeatureId.parse(f["feature_key"]), f["status"]) for f in features if f["feature_key"] not in finished]
    if left:
        corpus = ray.put(load_corpus(tables))
        task = ray.remote(block_records)
        waiting = [task.remote(left[i : i + BLOCK], corpus, tables, config) for i in range(0, len(left), BLOCK)]
        progress(len(finished), len(features))
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            records, counts = ray.get(ready)
            # The counts go last: they mark the features as finished.
            tables.append("records", records)
            tables.append("record_counts", counts)
            progress(tables.count("record_counts", "split = 'train' and source = 'positive'"), len(features))
        tables.finish("records")
    statuses = tables.read("record_counts", ["status"])["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}
