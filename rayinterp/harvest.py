"""Harvest: feature activations of every sequence, as an inverted index. Writes `activations` and `features`.

    shards left to do -> Harvester (actor pool) -> fragments -> one committer (the driver)

A shard is the unit of work: an actor reads it, runs the subject on it and writes one posting list per active feature.
Batches never cross a shard, so the numbers do not depend on how many actors there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from rayinterp import embedded, planted
from rayinterp.config import FeatureRange, HarvestConfig, RunConfig
from rayinterp.errors import UserError
from rayinterp.subject import FeatureId, LanguageModelSubject, SaeSource, Subject
from rayinterp.tables import SCHEMAS, Tables, sql_in

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

MARKER = -1
"""The `feature` of the row that says a shard is finished."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


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
    if subject.model == "planted":
        return planted.PlantedSubject(features)
    return LanguageModelSubject(
        str(embedded.model_path(subject.model)) if embedded.is_embedded(subject.model) else subject.model,
        sources,
        features,
        revision=subject.revision,
        device=subject.device,
        dtype=subject.dtype,
        prepend_bos=subject.prepend_bos,
    )


class Postings(NamedTuple):
    """One feature's non-zero activations in one shard, in CSR form."""

    rows: np.ndarray
    """int32 [r], ascending."""
    max_activations: np.ndarray
    """float32 [r]."""
    offsets: np.ndarray
    """int32 [r + 1]."""
    positions: np.ndarray
    """uint16 [n]."""
    values: np.ndarray
    """float32 [n]."""


def to_postings(activations: Float[np.ndarray, "rows seq"]) -> Postings | None:
    """Sparse form of one feature's activations; None where it never fires."""
    rows, positions = np.nonzero(activations)
    if len(rows) == 0:
        return None
    unique, starts = np.unique(rows, return_index=True)
    values = activations[rows, positions].astype(np.float32)
    return Postings(
        rows=unique.astype(np.int32),
        max_activations=np.maximum.reduceat(values, starts),
        offsets=np.append(starts, len(rows)).astype(np.int32),
        positions=positions.astype(np.uint16),
        values=values,
    )


class Harvester:
    """What the actor pool runs: one shard in, fragments of `activations` out."""

    def __init__(
        self, config: RunConfig, tables: Tables, sources: list[SaeSource], features: dict[str, list[int]]
    ) -> None:
        torch.set_num_threads(torch_threads(config.resources.harvest.num_actors))
        self._config, self._tables = config, tables
        self._subject = load_subject(config, sources, features)
        self._checked = False

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shard = int(item["shard"])
        sequences = self._tables.read("sequences", ["row", "token_ids"], f"shard = {shard}").sort_by("row")
        token_ids = torch.tensor(sequences["token_ids"].to_pylist())
        rows = self._shard_rows(shard, token_ids)
        return {
            "shard": shard,
            "fragments": self._tables.write_fragments("activations", pa.Table.from_pylist(rows, _ACTIVATIONS)),
            "num_tokens": token_ids.numel(),
        }

    def _shard_rows(self, shard: int, token_ids: Int[torch.Tensor, "rows seq"]) -> list[dict[str, Any]]:
        batches = token_ids.split(self._config.harvest.batch_size)
        if not self._checked:
            check_reconstruction(self._subject.variance_unexplained(batches[0]), self._config)
            self._checked = True
        parts = [{sae: a.cpu() for sae, a in self._subject.activations(batch).items()} for batch in batches]
        rows: list[dict[str, Any]] = []
        for sae, features in self._subject.features.items():
            activations = torch.cat([part[sae] for part in parts]).numpy()
            for column, feature in enumerate(features):
                postings = to_postings(activations[:, :, column])
                if postings is not None:
                    key = str(FeatureId(sae, feature))
                    rows.append(
                        {"feature_key": key, "sae": sae, "feature": feature, "shard": shard, **postings._asdict()}
                    )
        num_sequences, num_tokens = len(token_ids), token_ids.numel()
        marker = {"feature_key": "", "sae": "", "feature": MARKER, "shard": shard}
        return [*rows, {**marker, "num_sequences": num_sequences, "num_tokens": num_tokens}]


_ACTIVATIONS = SCHEMAS["activations"]


def check_reconstruction(unexplained: dict[str, float], config: RunConfig) -> None:
    """Stops a harvest that reads the wrong tensor.

    Raises:
        UserError: an SAE's reconstruction misses more than `subject.max_variance_unexplained`.
    """
    limit = config.subject.max_variance_unexplained
    for sae, share in unexplained.items():
        if not share <= limit:
            raise UserError(
                f"SAE {sae} leaves {share:.0%} of the variance of its input unexplained (limit {limit:.0%}): most "
                "likely the wrong hook point, subject.model or normalisation, or BOS where the SAE saw none; check "
                "subject.saes, or raise subject.max_variance_unexplained if this SAE is known to be that loose"
            )


def torch_threads(num_actors: int) -> int:
    """Torch threads for one of `num_actors` on this machine: Ray would give each actor a single one."""
    return max(1, (os.cpu_count() or 1) // num_actors)


class Place(NamedTuple):
    """Where the sequences of the corpus lie, by shard and row."""

    sequence_ids: np.ndarray
    """int64 [sequences], in (shard, row) order."""
    is_train: np.ndarray
    """bool [sequences]."""
    shard_starts: np.ndarray
    """int64 [shards + 1]."""


def places(tables: Tables) -> Place:
    sequences = tables.read("sequences", ["sequence_id", "split", "shard", "row"])
    sequences = sequences.sort_by([("shard", "ascending"), ("row", "ascending")])
    shard = sequences["shard"].to_numpy()
    return Place(
        sequences["sequence_id"].to_numpy(),
        np.asarray(sequences["split"].to_pylist()) == "train",
        np.searchsorted(shard, np.arange(shard[-1] + 2)),
    )


def feature_statistics(
    feature: FeatureId, postings: pa.Table, place: Place, num_tokens: int, config: HarvestConfig
) -> dict[str, Any]:
    """One row of `features` from a feature's posting lists."""
    row: dict[str, Any] = {"feature_key": str(feature), "sae": feature.sae, "feature": feature.index}
    if postings.num_rows == 0:
        zeros = {"num_sequences": 0, "num_tokens": 0, "density": 0.0, "max_activation": 0.0}
        return {**row, **zeros, "quantiles": [], "top_sequence_ids": [], "top_activations": [], "status": "dead"}
    postings = postings.sort_by("shard")
    where = np.concatenate(
        [place.shard_starts[s] + np.asarray(r) for s, r in zip(*_lists(postings, "shard", "rows"), strict=True)]
    )
    maxima = np.concatenate([np.asarray(m, dtype=np.float32) for m in postings["max_activations"].to_pylist()])
    values = np.concatenate([np.asarray(v, dtype=np.float32) for v in postings["values"].to_pylist()])
    train = place.is_train[where]
    # Ties go to the smaller sequence id, so that the order is a function of the corpus.
    order = np.lexsort((place.sequence_ids[where], -maxima))[: config.num_top]
    density = len(values) / num_tokens
    few = int(train.sum()) < config.min_sequences
    return {
        **row,
        "num_sequences": len(where),
        "num_tokens": len(values),
        "density": density,
        "max_activation": float(maxima[train].max()) if train.any() else 0.0,
        "mean_activation": float(values.mean()),
        "quantiles": np.quantile(values, QUANTILES).astype(np.float32),
        "top_sequence_ids": place.sequence_ids[where][order],
        "top_activations": maxima[order],
        "status": "dense" if density > config.max_density else "too_few" if few else "live",
    }


def _lists(table: pa.Table, *columns: str) -> list[list[Any]]:
    return [table[column].to_pylist() for column in columns]


def run_harvest(
    config: RunConfig,
    tables: Tables,
    sources: list[SaeSource],
    features: dict[str, list[int]],
    progress: Progress = lambda done, total: None,
) -> dict[str, int]:
    """Harvests the shards that are left, then the features' statistics; returns counts by status."""
    all_shards = tables.distinct("sequences", "shard")
    left = sorted(all_shards - tables.distinct("activations", "shard", f"feature = {MARKER}"))
    if left:
        _harvest_shards(config, tables, sources, features, left, len(all_shards), progress)
    if left or not tables.exists("features"):
        tables.finish("activations")
        tables.create("features", _all_statistics(config, tables, features))
    statuses = tables.read("features", ["status"])["status"].to_pylist()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def _harvest_shards(
    config: RunConfig,
    tables: Tables,
    sources: list[SaeSource],
    features: dict[str, list[int]],
    left: list[int],
    total: int,
    progress: Progress,
) -> None:
    resources = config.resources.harvest
    tables.create_empty("activations")
    results = ray.data.from_items([{"shard": shard} for shard in left], override_num_blocks=len(left)).map(
        Harvester,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(config, tables, sources, features),
        compute=ray.data.ActorPoolStrategy(size=resources.num_actors),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
    )
    done = total - len(left)
    progress(done, total)
    for _ in tables.stream_commit("activations", results):
        done += 1
        progress(done, total)


def _all_statistics(config: RunConfig, tables: Tables, features: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Statistics of every requested feature, in Ray tasks over blocks of features."""
    ids = [FeatureId(sae, feature) for sae, indices in features.items() for feature in indices]
    markers = tables.read("activations", ["num_tokens"], f"feature = {MARKER}")
    num_tokens = sum(markers["num_tokens"].to_pylist())
    place = ray.put(places(tables))

    @ray.remote
    def block(block_ids: list[FeatureId], place: Place) -> list[dict[str, Any]]:
        columns = ["feature_key", "shard", "rows", "max_activations", "values"]
        postings = tables.read("activations", columns, sql_in("feature_key", map(str, block_ids)))
        keys = np.asarray(postings["feature_key"].to_pylist())
        return [
            feature_statistics(i, postings.filter(pa.array(keys == str(i))), place, num_tokens, config.harvest)
            for i in block_ids
        ]

    size = 64
    blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [row for rows in ray.get([block.remote(ids, place) for ids in blocks]) for row in rows]
