"""Harvest: feature activations of every sequence, as an inverted index. Writes `activations`, `features` and `saes`.

    shards left to do -> Harvester (actor pool) -> fragments -> one committer -> statistics (tasks) -> features

A shard is the unit of work: an actor reads it, runs the subject on it and writes one posting list per active feature.
Batches never cross a shard, so the numbers do not depend on how many actors there are.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import torch

from rayinterp import embedded, planted
from rayinterp.config import PLANTED, FeatureRange, RunConfig
from rayinterp.errors import UserError
from rayinterp.planted_subject import PlantedSubject
from rayinterp.pools import map_units, torch_threads
from rayinterp.postings import (
    MARKER,
    STATISTICS,
    Place,
    feature_statistics,
    join_batches,
    places,
    to_postings,
)
from rayinterp.progress import Progress, Throughput, silent
from rayinterp.saes import SaeSource
from rayinterp.subject import LanguageModelSubject, SparseActivations, Subject, SubjectCheck
from rayinterp.tables import SCHEMAS, Tables, sql_in

if TYPE_CHECKING:
    from jaxtyping import Int

NUM_CHECKED = 16
"""Sequences on which an actor looks at its SAEs before it begins: the first ones of the corpus, so that all agree."""
OUTLIER_NORM = 10.0
"""What an SAE reads is an outlier from so many times the median length on: an attention sink, most likely."""
NUM_OUTLIERS_NAMED = 50
"""Kinds of outlier tokens kept per shard."""
LISTS_PER_TASK = 20_000
"""Posting lists whose statistics one task merges."""


def sae_sources(config: RunConfig, num_layers: int) -> list[SaeSource]:
    """The SAEs that the config names, in layer order."""
    saes = config.subject.saes
    chosen = {
        "all": range(num_layers),
        "even": range(0, num_layers, 2),
        "odd": range(1, num_layers, 2),
    }
    layers = chosen[saes.layers] if isinstance(saes.layers, str) else sorted(set(saes.layers))
    sources = []
    for layer in layers:
        sae_id = saes.sae_id.format(layer=layer)
        if saes.release is None and embedded.is_embedded(sae_id):
            sae_id = str(embedded.sae_path(sae_id))
        sources.append(SaeSource(saes.name.format(layer=layer), saes.release, sae_id))
    return sources


def choose_features(config: RunConfig, sae: str, width: int) -> list[int]:
    """Requested features of one SAE, ascending; a number draws a sample seeded by (seed, SAE).

    Raises:
        UserError: a feature beyond the SAE's width.
    """
    wanted = config.subject.features
    if wanted == "all":
        return list(range(width))
    if isinstance(wanted, int):
        if wanted > width:
            raise UserError(f"subject.features is {wanted}, but SAE {sae} has {width} features; ask for fewer, or all")
        generator = np.random.default_rng([config.seed, *sae.encode()])
        return sorted(generator.choice(width, wanted, replace=False).tolist())
    features = list(range(wanted.start, wanted.stop)) if isinstance(wanted, FeatureRange) else sorted(set(wanted))
    beyond = [feature for feature in features if not 0 <= feature < width]
    if beyond:
        raise UserError(f"subject.features names {beyond[0]}, but SAE {sae} has features 0 to {width - 1}")
    return features


def load_subject(config: RunConfig, sources: list[SaeSource], features: dict[str, list[int]]) -> Subject:
    """The subject that the config names, ready to run."""
    subject = config.subject
    if subject.model in PLANTED:
        return PlantedSubject(planted.WORLDS[subject.model], features)
    return LanguageModelSubject(
        embedded.resolve(subject.model),
        sources,
        features,
        revision=subject.revision,
        device=subject.device,
        dtype=subject.dtype,
        sae_dtype=subject.sae_dtype,
        attn_implementation=subject.attn_implementation,
        device_map=subject.device_map,
        quantization=subject.quantization,
        compile_layers=subject.compile,
        prepend_bos=subject.prepend_bos,
    )


def check_reconstruction(checks: dict[str, SubjectCheck], limit: float) -> None:
    """Stops a harvest that reads the wrong tensor.

    Raises:
        UserError: an SAE's reconstruction misses more than `limit`, `subject.max_variance_unexplained`.
    """
    for sae, check in checks.items():
        share = check.variance_unexplained
        if share is not None and not share <= limit:
            raise UserError(
                f"SAE {sae} leaves {share:.0%} of the variance of its input unexplained (limit {limit:.0%}): most "
                "likely the wrong hook point, subject.model or normalisation, or BOS where the SAE saw none; check "
                "subject.saes, or raise subject.max_variance_unexplained if this SAE is known to be that loose"
            )


def read_token_ids(tables: Tables, where: str) -> Int[torch.Tensor, "rows seq"]:
    """Sequences of one shard, in row order."""
    sequences = tables.read("sequences", ["row", "token_ids"], where).sort_by("row")
    flat = sequences["token_ids"].combine_chunks().flatten().to_numpy()
    return torch.from_numpy(flat.astype(np.int64)).reshape(sequences.num_rows, -1)


class Harvester:
    """What the actor pool runs: one shard in, fragments of `activations` out.

    Two shards are in hand at a time: while one runs through the model, the posting lists of the other are built and
    written.
    """

    SHARDS_IN_HAND = 2

    def __init__(
        self, config: RunConfig, tables: Tables, sources: list[SaeSource], features: dict[str, list[int]]
    ) -> None:
        self._config, self._tables, self._features = config, tables, features
        self._threads = torch_threads(config.resources.harvest.most_actors)
        self._model_is_free = threading.Lock()
        self._refusal: UserError | None = None
        torch.set_num_threads(self._threads)
        try:
            self._subject = load_subject(config, sources, features)
            self._checks = self._subject.check(read_token_ids(tables, f"shard = 0 and row < {NUM_CHECKED}"))
            check_reconstruction(self._checks, config.subject.max_variance_unexplained)
            check_same_dtype(tables, self._subject.dtype)
        except UserError as error:
            # Raised with the first shard: an actor that fails to start is only reported as dead.
            self._refusal = error

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if self._refusal is not None:
            raise self._refusal
        shard = int(item["shard"])
        token_ids = read_token_ids(self._tables, f"shard = {shard}")
        with self._model_is_free:
            torch.set_num_threads(self._threads)  # torch counts them per calling thread
            size = batch_size(token_ids, self._config.harvest.token_budget)
            batches = list(self._subject.stream(token_ids.split(size)))
        by_sae = {sae: join_batches([batch[sae] for batch in batches]) for sae in self._features}
        del batches
        check_finite(by_sae, shard)
        parts = [to_postings(by_sae[sae], sae, features, shard) for sae, features in self._features.items()]
        table = pa.concat_tables([*parts, self._marker(shard, token_ids, by_sae)])
        return {
            "unit": shard,
            "fragments": self._tables.write_fragments("activations", table),
            "num_tokens": token_ids.numel(),
            "dtype": self._subject.dtype,
        }

    def _marker(self, shard: int, token_ids: torch.Tensor, by_sae: dict[str, SparseActivations]) -> pa.Table:
        """The row that marks the shard as finished, with its counts."""
        notes = {
            sae: {
                **self._checks[sae]._asdict(),
                "dtype": self._subject.dtype,
                **count_outliers(activations, token_ids, OUTLIER_NORM * self._checks[sae].median_norm),
            }
            for sae, activations in by_sae.items()
        }
        row = {"feature_key": "", "sae": "", "feature": MARKER, "shard": shard, "notes": json.dumps(notes)}
        counts = {"num_sequences": len(token_ids), "num_tokens": token_ids.numel()}
        return pa.Table.from_pylist([{**row, **counts}], SCHEMAS["activations"])


def batch_size(token_ids: Int[torch.Tensor, "rows seq"], token_budget: int) -> int:
    """Sequences per forward pass."""
    return max(1, token_budget // token_ids.shape[1])


def count_outliers(
    activations: SparseActivations, token_ids: Int[torch.Tensor, "rows seq"], limit: float
) -> dict[str, Any]:
    """Tokens at which an SAE reads something of length `limit` or more: how many, and the most frequent ones."""
    outliers = token_ids.numpy()[activations.norms >= limit]
    named = dict(Counter(outliers.tolist()).most_common(NUM_OUTLIERS_NAMED))
    return {"num_outlier_tokens": len(outliers), "outliers": named}


def check_finite(activations: dict[str, SparseActivations], shard: int) -> None:
    """Refuses infinite and undefined numbers, of which statistics would be nonsense.

    Raises:
        UserError: names the SAE.
    """
    for sae, sparse in activations.items():
        if not np.isfinite(sparse.values).all():
            raise UserError(
                f"SAE {sae} has activations that are no finite numbers in shard {shard}: most likely the model "
                "overflows in this precision; set subject.dtype=float32 or bfloat16"
            )


def check_same_dtype(tables: Tables, dtype: str) -> None:
    """Refuses to go on with a harvest in another precision than it was begun in: shards would not go together.

    Raises:
        UserError: names both.
    """
    notes = tables.read("activations", ["notes"], f"feature = {MARKER}")["notes"].to_pylist()
    before = {note["dtype"] for text in notes[:1] for note in json.loads(text).values()}
    if before - {dtype}:
        raise UserError(_two_dtypes(before.pop(), dtype))


class SameDtype:
    """Refuses the first shard from an actor whose precision is not that of the shards before it: with `auto`, machines
    of a cluster may differ, and each actor knows its own alone."""

    def __init__(self) -> None:
        self._dtype = ""

    def __call__(self, result: dict[str, Any]) -> None:
        """
        Raises:
            UserError: names both.
        """
        self._dtype = self._dtype or result["dtype"]
        if result["dtype"] != self._dtype:
            raise UserError(_two_dtypes(self._dtype, result["dtype"]))


def _two_dtypes(before: str, now: str) -> str:
    return (
        f"this harvest was begun in {before}, and subject.dtype and subject.device give {now} on a machine that goes "
        "on with it; take hardware of the same kind, or name subject.dtype in another run_dir"
    )


def run_harvest(
    config: RunConfig,
    tables: Tables,
    sources: list[SaeSource],
    features: dict[str, list[int]],
    progress: Progress = silent,
) -> dict[str, int]:
    """Harvests the shards that are left, then the features' statistics; returns counts by status."""
    all_shards = tables.distinct("sequences", "shard")
    left = sorted(all_shards - tables.finished_units("activations"))
    if left:
        _harvest_shards(config, tables, sources, features, left, len(all_shards), progress)
        missing = all_shards - tables.finished_units("activations")
        assert not missing, f"shards {sorted(missing)[:5]} were neither committed nor reported as failed"
    if not tables.is_finished("activations"):
        tables.finish("activations")
    if not tables.exists("features"):
        tables.create("saes", _sae_rows(tables, features))
        statistics = _all_statistics(config, tables, features, len(all_shards))
        tables.create("features", statistics)
    statuses = Counter(tables.read("features", ["status"])["status"].to_pylist())
    outliers = sum(tables.read("saes", ["num_outlier_tokens"])["num_outlier_tokens"].to_pylist())
    return {**dict(sorted(statuses.items())), "outlier_tokens": outliers}


def _harvest_shards(
    config: RunConfig,
    tables: Tables,
    sources: list[SaeSource],
    features: dict[str, list[int]],
    left: list[int],
    total: int,
    progress: Progress,
) -> None:
    tables.create_empty("activations")
    results = map_units(
        Harvester,
        (config, tables, sources, features),
        [{"shard": shard} for shard in left],
        config.resources.harvest,
        Harvester.SHARDS_IN_HAND,
    )
    throughput = Throughput(config.name, "harvest", total - len(left), total)
    throughput.report(progress)
    for result in tables.stream_commit("activations", results, check=SameDtype()):
        throughput.add(1, result["num_tokens"])
        throughput.report(progress)


def _sae_rows(tables: Tables, features: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Rows of `saes`, from the notes that every shard left."""
    markers = tables.read("activations", ["shard", "notes"], f"feature = {MARKER}").sort_by("shard")
    notes = [json.loads(note) for note in markers["notes"].to_pylist()]
    rows = []
    for sae, indices in features.items():
        outliers = sum((Counter(note[sae]["outliers"]) for note in notes), Counter()).most_common(NUM_OUTLIERS_NAMED)
        rows.append(
            {
                "sae": sae,
                "num_features": len(indices),
                "variance_unexplained": notes[0][sae]["variance_unexplained"],
                "median_norm": notes[0][sae]["median_norm"],
                "num_outlier_tokens": sum(note[sae]["num_outlier_tokens"] for note in notes),
                "outlier_token_ids": [int(token) for token, _ in outliers],
                "outlier_counts": [count for _, count in outliers],
            }
        )
    return rows


def _all_statistics(
    config: RunConfig, tables: Tables, features: dict[str, list[int]], num_shards: int
) -> Iterator[pa.RecordBatch]:
    """Statistics of every requested feature in order, from Ray tasks over blocks of features."""
    markers = tables.read("activations", ["num_tokens"], f"feature = {MARKER}")
    num_tokens = sum(markers["num_tokens"].to_pylist())
    place = ray.put(places(tables))

    @ray.remote
    def block(sae: str, indices: list[int], place: Place) -> pa.Table:
        keys = sql_in("feature_key", [f"{sae}/{index}" for index in indices])
        postings = tables.read("activations", STATISTICS, keys)
        return feature_statistics(sae, indices, postings, place, num_tokens, config.harvest)

    size = max(1, LISTS_PER_TASK // num_shards)
    blocks = [(sae, all_[i : i + size]) for sae, all_ in features.items() for i in range(0, len(all_), size)]
    ahead = max(2, int(ray.cluster_resources().get("CPU", 1)))
    """Tasks in flight: results wait in order, so more of them would only fill memory."""
    waiting = [block.remote(*arguments, place) for arguments in blocks[:ahead]]
    for number in range(len(blocks)):
        yield from ray.get(waiting.pop(0)).to_batches()
        if number + ahead < len(blocks):
            waiting.append(block.remote(*blocks[number + ahead], place))
