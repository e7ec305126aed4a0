"""Records: per feature, the sequences that explainers and scores see. Writes `records` and `record_counts`.

    blocks of features (tasks): posting lists -> sources -> rows of records -> the driver appends

What each source means stands in `sources`. A block is a function of the features alone, so a run that was killed goes
on with the blocks that are left and ends with the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from rayinterp import planted
from rayinterp.config import RecordsConfig, RunConfig
from rayinterp.corpus import Tokenizer, load_tokenizer
from rayinterp.explanation import MAX_STRENGTH
from rayinterp.feature_id import FeatureId
from rayinterp.index import TableVectors
from rayinterp.progress import Progress, silent
from rayinterp.simulate.simulator import TokenSequence
from rayinterp.sources import SPLITS, Activity, Choices, Corpus, Neighbour, choose_block, nearest_directions
from rayinterp.tables import Tables, sql_in

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from rayinterp.saes import SaeSource

BLOCK = 256
"""Features per Ray task: a block's posting lists are read once, and its queries share one pass over the vectors, of
which converting them from float16 is the largest part."""
NUM_NEIGHBOURS = 10
"""Features tried, closest first, for the source `neighbour`."""


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
    """The corpus without its text."""
    sequences = tables.read("sequences", ["sequence_id", "document_id", "split", "shard", "row"]).sort_by("sequence_id")
    codes = {split: code for code, split in enumerate(SPLITS)}
    return Corpus(
        sequences["sequence_id"].to_numpy(),
        sequences["document_id"].to_numpy(),
        np.array([codes[split] for split in sequences["split"].to_pylist()], dtype=np.int8),
        np.stack([sequences["shard"].to_numpy(), sequences["row"].to_numpy()], axis=1),
    )


def read_sequences(tables: Tables, sequence_ids: Iterable[int], tokenizer: Tokenizer) -> dict[int, dict[str, Any]]:
    """What a record says of its sequence, by sequence id."""
    columns = ["sequence_id", "document_id", "token_ids"]
    rows = tables.read("sequences", columns, sql_in("sequence_id", sorted(sequence_ids))).to_pylist()
    return {row["sequence_id"]: {**row, "tokens": [tokenizer.decode([i]) for i in row["token_ids"]]} for row in rows}


def record_rows(
    feature: FeatureId, chosen: Choices, activity: Activity, corpus: Corpus, sequences: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of `records`."""
    by_place = {place: i for i, place in enumerate(activity.places.tolist())}
    rows = []
    for (split, source), choice in chosen.items():
        for rank, place in enumerate(choice.places.tolist()):
            sequence = sequences[int(corpus.sequence_ids[place])]
            activations = np.zeros(len(sequence["token_ids"]), dtype=np.float32)
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
                    **sequence,
                    "activations": activations,
                    "similarity": None if choice.similarity is None else float(choice.similarity[rank]),
                }
            )
    return rows


def count_rows(feature: FeatureId, status: str, chosen: Choices, config: RecordsConfig) -> list[dict[str, Any]]:
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


def read_holistic(tables: Tables, feature: FeatureId) -> dict[int, Float[np.ndarray, "seq"]]:
    """A feature's holistic activations by sequence, one value a token, in the SAE's own units."""
    rows = tables.read("holistic", ["sequence_id", "values"], f"feature_key = '{feature}'").to_pylist()
    return {row["sequence_id"]: np.asarray(row["values"], dtype=np.float32) for row in rows}


def displayed(activations: Float[np.ndarray, "seq"]) -> list[int]:
    """What an LLM is shown: 0 for an exact zero, else 1-5, so that a weak activation is never hidden."""
    return [0 if a == 0 else min(max(round(a), 1), MAX_STRENGTH) for a in activations.tolist()]


def shard_order(corpus: Corpus) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "shards"]]:
    """Postings name (shard, row), the corpus is in sequence_id order: order[starts[shard] + row] is the place."""
    order = np.lexsort((corpus.shard_rows[:, 1], corpus.shard_rows[:, 0]))
    shards = corpus.shard_rows[order, 0]
    return order, np.searchsorted(shards, np.arange(shards[-1] + 1))


def read_activities(tables: Tables, features: Sequence[FeatureId], corpus: Corpus) -> dict[FeatureId, Activity]:
    """Where each of some features is active; features that never are have no entry."""
    postings = tables.read("activations", where=sql_in("feature_key", map(str, features)))
    by_key = np.asarray(postings["feature_key"].to_pylist())
    order, starts = shard_order(corpus)
    return {
        feature: read_activity(postings.filter(pa.array(by_key == str(feature))), starts, order)
        for feature in features
        if (by_key == str(feature)).any()
    }


def read_places(
    tables: Tables,
    features: Sequence[FeatureId],
    order: Int[np.ndarray, "n"],
    starts: Int[np.ndarray, "shards"],
) -> dict[FeatureId, Int[np.ndarray, "m"]]:
    """Places in the corpus at which each of some features is active, ascending: all that silence asks for.

    Args:
        order, starts: From `shard_order`.
    """
    rows = tables.read("activations", ["feature_key", "shard", "rows"], sql_in("feature_key", map(str, features)))
    places: dict[FeatureId, list[np.ndarray]] = {feature: [] for feature in features}
    for row in rows.to_pylist():
        places[FeatureId.parse(row["feature_key"])].append(order[starts[row["shard"]] + np.asarray(row["rows"])])
    nowhere = np.array([], dtype=np.int64)
    return {feature: np.sort(np.concatenate([nowhere, *of_feature])) for feature, of_feature in places.items()}


def block_records(
    block: list[tuple[FeatureId, str]],
    corpus: Corpus,
    neighbours: dict[FeatureId, list[Neighbour]],
    tables: Tables,
    config: RunConfig,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `records` and `record_counts` for a block of (feature, status)."""
    live = [feature for feature, status in block if status == "live"]
    activities = read_activities(tables, live, corpus)
    close = sorted({n.feature for feature in live for n in neighbours.get(feature, ())} - set(live))
    others = {**activities, **read_activities(tables, close, corpus)} if neighbours else {}
    vectors = TableVectors(tables, corpus, config.index)
    choices = choose_block(activities, corpus, vectors, config.records, config.seed, neighbours, others)
    wanted = {int(i) for chosen in choices.values() for c in chosen.values() for i in corpus.sequence_ids[c.places]}
    sequences = read_sequences(tables, wanted, load_tokenizer(config))
    records, counts = [], []
    for feature, status in block:
        chosen = choices.get(feature, {})
        if chosen:
            records += record_rows(feature, chosen, activities[feature], corpus, sequences)
        counts += count_rows(feature, status, chosen, config.records)
    return records, counts


def decoder_neighbours(
    model: str, sources: list[SaeSource], features: dict[str, list[int]]
) -> dict[FeatureId, list[Neighbour]]:
    """The harvested features with the closest decoder directions, by feature.

    Args:
        model: The subject, whose SAEs need not be loaded where it is a planted one.
    """
    from rayinterp.saes import decoder_directions  # torch takes seconds, which every reader of records would pay

    if not sources:  # planted
        world = planted.WORLDS[model]
        directions = {sae: planted.decoder_directions(world, sae, of) for sae, of in features.items()}
    else:
        directions = {source.name: decoder_directions(source, features[source.name]) for source in sources}
    return nearest_directions(directions, features, NUM_NEIGHBOURS)


def run_records(
    config: RunConfig,
    tables: Tables,
    sources: list[SaeSource],
    features: dict[str, list[int]],
    progress: Progress = silent,
) -> dict[str, int]:
    """Chooses records for the blocks of features that are left, in Ray tasks; returns counts by status."""
    harvested = tables.read("features", ["feature_key", "status"]).to_pylist()
    ids = [(FeatureId.parse(row["feature_key"]), row["status"]) for row in harvested]
    finished = tables.distinct("record_counts", "feature_key")
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]
    left = [block for block in blocks if not finished.issuperset(str(feature) for feature, _ in block)]
    if left:
        # By a run that ended between the two tables; what nobody has begun need not be looked for on each commit.
        begun = tables.distinct("records", "feature_key") | finished
        corpus, neighbours = ray.put(load_corpus(tables)), ray.put({})
        if "neighbour" in config.records.complementary:
            neighbours = ray.remote(decoder_neighbours).remote(config.subject.model, sources, features)
        done = len(ids) - sum(map(len, left))
        progress(done, len(ids))
        task = ray.remote(block_records)
        in_flight = max(2, int(ray.cluster_resources().get("CPU", 1)))
        waiting: dict[Any, list[tuple[FeatureId, str]]] = {}
        while left or waiting:
            while left and len(waiting) < in_flight:
                block = left.pop(0)
                waiting[task.remote(block, corpus, neighbours, tables, config)] = block
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            block = waiting.pop(ready)
            records, counts = ray.get(ready)
            write = tables.add if begun.isdisjoint(str(feature) for feature, _ in block) else tables.append
            # The counts go last: they mark the features as finished.
            write("records", records)
            write("record_counts", counts)
            done += len(block)
            progress(done, len(ids))
    if tables.exists("records") and not tables.is_finished("records"):
        tables.finish("records")
        tables.finish("record_counts")
    statuses = tables.read("record_counts", ["status"])["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}
