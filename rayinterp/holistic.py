"""Holistic activations: how far a sequence's mean activation falls as each of its tokens is dropped. Writes `holistic`.

    records -> chunks of sequences -> HolisticHarvester (actor pool) -> fragments -> one committer

Only the sequences that a feature has records of are computed, each once for all of its features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from rayinterp.config import RunConfig
from rayinterp.errors import UserError
from rayinterp.feature_id import FeatureId
from rayinterp.harvest import batch_size, load_subject
from rayinterp.pools import map_units, torch_threads
from rayinterp.progress import Progress, Throughput, silent
from rayinterp.saes import SaeSource
from rayinterp.tables import SCHEMAS, Tables, sql_in

CHUNK = 32
"""Sequences computed together: the unit of work and of resumption."""


def wanted_pairs(config: RunConfig, tables: Tables) -> dict[int, tuple[list[int], list[FeatureId]]]:
    """By sequence, in ascending order: its tokens, and the features that it is a record of."""
    where = sql_in("split", config.records.holistic_splits)
    if config.records.holistic == "positive":
        where += " and source = 'positive'"
    pairs: dict[int, tuple[list[int], list[FeatureId]]] = {}
    for row in tables.read("records", ["feature_key", "sequence_id", "token_ids"], where).to_pylist():
        features = pairs.setdefault(row["sequence_id"], (row["token_ids"], []))[1]
        feature = FeatureId.parse(row["feature_key"])
        if feature not in features:
            features.append(feature)
    return {sequence_id: (pairs[sequence_id][0], sorted(pairs[sequence_id][1])) for sequence_id in sorted(pairs)}


def chunks(pairs: dict[int, tuple[list[int], list[FeatureId]]]) -> Iterator[dict[str, Any]]:
    """Units of work; a function of the records alone, so that a resumed run cuts them the same way."""
    ids = list(pairs)
    for number, start in enumerate(range(0, len(ids), CHUNK)):
        part = ids[start : start + CHUNK]
        yield {
            "chunk": number,
            "sequence_ids": part,
            "token_ids": [pairs[i][0] for i in part],
            "features": json.dumps([[str(feature) for feature in pairs[i][1]] for i in part]),
        }


class HolisticHarvester:
    """What the actor pool runs: a chunk of sequences in, fragments of `holistic` out."""

    def __init__(
        self, config: RunConfig, tables: Tables, sources: list[SaeSource], features: dict[str, list[int]]
    ) -> None:
        torch.set_num_threads(torch_threads(config.resources.harvest.most_actors))
        self._tables, self._token_budget = tables, config.harvest.token_budget
        self._refusal: UserError | None = None
        try:
            self._subject = load_subject(config, sources, features)
        except UserError as error:
            self._refusal = error
        self._columns = {sae: {feature: i for i, feature in enumerate(all_)} for sae, all_ in features.items()}

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if self._refusal is not None:
            raise self._refusal
        token_ids = torch.tensor([list(ids) for ids in item["token_ids"]])
        parts = [self._subject.holistic(part) for part in token_ids.split(batch_size(token_ids, self._token_budget))]
        holistic = {sae: torch.cat([part[sae] for part in parts]) for sae in parts[0]}
        rows = [
            {
                "feature_key": key,
                "sequence_id": int(sequence_id),
                "values": holistic[feature.sae][row, :, self._columns[feature.sae][feature.index]].numpy(),
                "chunk": int(item["chunk"]),
            }
            for row, (sequence_id, keys) in enumerate(
                zip(item["sequence_ids"], json.loads(item["features"]), strict=True)
            )
            for key in keys
            for feature in [FeatureId.parse(key)]
        ]
        table = pa.Table.from_pylist(rows, SCHEMAS["holistic"])
        return {
            "unit": int(item["chunk"]),
            "fragments": self._tables.write_fragments("holistic", table),
            "num_tokens": token_ids.numel(),
        }


def run_holistic(
    config: RunConfig,
    tables: Tables,
    sources: list[SaeSource],
    features: dict[str, list[int]],
    progress: Progress = silent,
) -> dict[str, int]:
    """Computes the chunks that are left; returns the number of (feature, sequence) pairs."""
    if config.records.holistic == "none":
        return {}
    all_chunks = list(chunks(wanted_pairs(config, tables)))
    finished = tables.finished_units("holistic")
    left = [chunk for chunk in all_chunks if chunk["chunk"] not in finished]
    if left:
        tables.create_empty("holistic")
        results = map_units(HolisticHarvester, (config, tables, sources, features), left, config.resources.harvest)
        throughput = Throughput(config.name, "holistic", len(all_chunks) - len(left), len(all_chunks))
        throughput.report(progress)
        for result in tables.stream_commit("holistic", results):
            throughput.add(1, result["num_tokens"])
            throughput.report(progress)
    if all_chunks and not tables.is_finished("holistic"):
        tables.finish("holistic")
    return {"holistic": tables.count("holistic")}
