"""Which sequences become records, and why: one definition per source. Pure functions of the corpus and of activity.

    positive            the feature is active: highest maxima, spread over the quantiles, or half and half
    random              any sequence that is not one of the positive records
    random_negative     any sequence on which the feature is silent
    similar             nearest to the train positives by sentence embedding, not one of the positive records
    similar_negative    nearest to them among the silent: what falsifies an explanation that is too broad
    similar_projected   of a wide pool of `similar`, those nearest after a projection learned for the feature
    similar_projected_negative  the same of `similar_negative`
    neighbour           silent, and among the strongest of the harvested feature with the closest decoder direction
                        (then of the next closest)

Every source is drawn within its split, and silent means no activation above 0 at any token. A short source is a short
count, never refilled from another. Chance comes from (seed, feature, purpose) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np

from rayinterp.config import RecordsConfig
from rayinterp.feature_id import FeatureId
from rayinterp.nearest import Hits
from rayinterp.projection import learn_projection, projected_similarity

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Ranked = TypeVar("Ranked")

SPLITS = ("train", "valid", "test")
WIDE = 10
"""A pool that is re-ranked has so many times the records asked for."""
NUM_SILENT_SHOWN = 400
"""Silent train sequences that a projection is learned against."""


class Corpus(NamedTuple):
    """The columns of the corpus that choosing records needs, in sequence_id order."""

    sequence_ids: Int[np.ndarray, "n"]
    document_ids: Int[np.ndarray, "n"]
    splits: Int[np.ndarray, "n"]
    """Places in SPLITS."""
    shard_rows: Int[np.ndarray, "n 2"]


class Vectors(Protocol):
    """The sentence embeddings of the corpus, by place, L2-normalised."""

    def gather(self, places: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k d"]: ...

    def search(
        self, queries: Float[np.ndarray, "q d"], excluded: Sequence[Int[np.ndarray, "_"]], k: int
    ) -> list[list[Hits]]:
        """The `k` places nearest to each query in each split, without those excluded: `[query][split]`."""
        ...


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


class Neighbour(NamedTuple):
    """A harvested feature with a decoder direction like another's."""

    feature: FeatureId
    cosine: float


class Choice(NamedTuple):
    """Sequences chosen for one (split, source), best first."""

    places: Int[np.ndarray, "k"]
    similarity: Float[np.ndarray, "k"] | None
    """To the positives (or of the decoder directions), where the source used it."""


Choices = dict[tuple[str, str], Choice]
"""By (split, source)."""


def generator_for(seed: int, feature: FeatureId, *purpose: str) -> np.random.Generator:
    """Chance that belongs to the feature: the same on one worker or a hundred."""
    return np.random.default_rng([seed, *"/".join((str(feature), *purpose)).encode()])


def spread(ranked: Sequence[Ranked], count: int | None) -> list[Ranked]:
    """`count` of them at even distances from first to last, each in the middle of its stretch; all of them for None."""
    n = len(ranked)
    if count is None or count >= n:
        return list(ranked)
    return [ranked[(2 * i + 1) * n // (2 * count)] for i in range(count)]


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


def query_places(activity: Activity, corpus: Corpus, num_query: int) -> Int[np.ndarray, "q"]:
    """The strongest train positives, whose mean embedding is the query of the similar sources."""
    train = corpus.splits[activity.places] == SPLITS.index("train")
    order = np.argsort(-activity.maxima[train], kind="stable")[:num_query]
    return activity.places[train][order]


def choose_block(
    activities: Mapping[FeatureId, Activity],
    corpus: Corpus,
    vectors: Vectors,
    config: RecordsConfig,
    seed: int,
    neighbours: Mapping[FeatureId, Sequence[Neighbour]] | None = None,
    others: Mapping[FeatureId, Activity] | None = None,
) -> dict[FeatureId, Choices]:
    """The records of a block of features.

    Args:
        neighbours: By feature, closest first; needed for the source `neighbour`.
        others: Activity of those neighbours.
    """
    chosen: dict[FeatureId, Choices] = {
        feature: _positives(feature, activity, corpus, config, seed) for feature, activity in activities.items()
    }
    queries = {f: query_places(a, corpus, config.num_query_positives) for f, a in activities.items()}
    pools = _similar_pools(activities, chosen, queries, corpus, vectors, config)
    projected = any("projected" in source for source in config.complementary)
    for feature, activity in activities.items():
        silent = _silent(activity, corpus)
        projection = _project(feature, queries[feature], silent, corpus, vectors, seed) if projected else None
        positives = {split: chosen[feature][split, "positive"].places for split in SPLITS}
        for source in config.complementary:
            if source.startswith("similar"):
                hits = pools[source.endswith("_negative")][feature]
                found = _similar(hits, projection if "projected" in source else None, corpus, vectors, config)
            elif source == "neighbour":
                assert neighbours is not None and others is not None, "source neighbour without decoder directions"
                found = _neighbour(neighbours.get(feature, ()), others, silent, corpus, config)
            else:
                found = _random(source, feature, silent, positives, corpus, config, seed)
            chosen[feature].update({(split, source): choice for split, choice in found.items()})
    return chosen


def _positives(feature: FeatureId, activity: Activity, corpus: Corpus, config: RecordsConfig, seed: int) -> Choices:
    choices: Choices = {}
    for code, split in enumerate(SPLITS):
        own = np.flatnonzero(corpus.splits[activity.places] == code)
        generator = generator_for(seed, feature, split, "positive")
        count = getattr(config, split).positive
        picked = own[choose_positives(activity.maxima[own], count, config.positive, generator)]
        choices[split, "positive"] = Choice(activity.places[picked], None)
    return choices


def _silent(activity: Activity, corpus: Corpus) -> np.ndarray:
    silent = np.ones(len(corpus.sequence_ids), dtype=bool)
    silent[activity.places] = False
    return silent


def _random(
    source: str,
    feature: FeatureId,
    silent: np.ndarray,
    positives: dict[str, np.ndarray],
    corpus: Corpus,
    config: RecordsConfig,
    seed: int,
) -> dict[str, Choice]:
    found = {}
    for code, split in enumerate(SPLITS):
        allowed = corpus.splits == code
        if source == "random_negative":
            allowed &= silent
        else:
            allowed[positives[split]] = False
        generator = generator_for(seed, feature, split, source)
        places = generator.permutation(np.flatnonzero(allowed))[: getattr(config, split).complementary]
        found[split] = Choice(places, None)
    return found


def _similar_pools(
    activities: Mapping[FeatureId, Activity],
    chosen: Mapping[FeatureId, Choices],
    queries: Mapping[FeatureId, np.ndarray],
    corpus: Corpus,
    vectors: Vectors,
    config: RecordsConfig,
) -> dict[bool, dict[FeatureId, list[Hits]]]:
    """Nearest sequences of each split by feature: of those that are no positive record, and of the silent (True)."""
    wanted = {source for source in config.complementary if source.startswith("similar")}
    if not wanted or not activities:
        return {}
    k = max(getattr(config, split).complementary for split in SPLITS)
    if any("projected" in source for source in wanted):
        k *= WIDE
    # The mean cosine to a set of normalised vectors is the dot product with their mean.
    means = np.stack([vectors.gather(queries[feature]).mean(0) for feature in activities])
    pools: dict[bool, dict[FeatureId, list[Hits]]] = {}
    for negative in {source.endswith("_negative") for source in wanted}:
        excluded = [
            activity.places if negative else np.concatenate([chosen[feature][s, "positive"].places for s in SPLITS])
            for feature, activity in activities.items()
        ]
        hits = vectors.search(means, excluded, max(k, 1))
        pools[negative] = dict(zip(activities, hits, strict=True))
    return pools


class Projection(NamedTuple):
    """A feature's learned projection, and the positives that similarity is measured to."""

    weight: Float[np.ndarray, "d k"]
    positives: Float[np.ndarray, "p d"]


def _project(
    feature: FeatureId, query: np.ndarray, silent: np.ndarray, corpus: Corpus, vectors: Vectors, seed: int
) -> Projection | None:
    """Learns the projection; None where there is too little to learn from, and plain similarity is kept."""
    generator = generator_for(seed, feature, "projection")
    train = np.flatnonzero(silent & (corpus.splits == SPLITS.index("train")))
    shown = generator.permutation(train)[:NUM_SILENT_SHOWN]
    positives = vectors.gather(query)
    weight = learn_projection(positives, vectors.gather(np.sort(shown)), generator)
    return None if weight is None else Projection(weight, positives)


def _similar(
    hits: list[Hits], projection: Projection | None, corpus: Corpus, vectors: Vectors, config: RecordsConfig
) -> dict[str, Choice]:
    found = {}
    for split, (places, similarity) in zip(SPLITS, hits, strict=True):
        count = getattr(config, split).complementary
        if projection is not None and len(places):
            pool = places[: count * WIDE]
            similarity = projected_similarity(vectors.gather(pool), projection.positives, projection.weight)
            order = np.lexsort((corpus.sequence_ids[pool], -similarity))
            places, similarity = pool[order], similarity[order]
        found[split] = Choice(places[:count], similarity[:count])
    return found


def _neighbour(
    neighbours: Sequence[Neighbour],
    others: Mapping[FeatureId, Activity],
    silent: np.ndarray,
    corpus: Corpus,
    config: RecordsConfig,
) -> dict[str, Choice]:
    found = {}
    for code, split in enumerate(SPLITS):
        count = getattr(config, split).complementary
        places: list[int] = []
        cosines: list[float] = []
        for neighbour in neighbours:
            activity = others.get(neighbour.feature)
            if activity is None:
                continue
            strongest = activity.places[np.argsort(-activity.maxima, kind="stable")]
            allowed = strongest[silent[strongest] & (corpus.splits[strongest] == code)]
            fresh = [place for place in allowed.tolist() if place not in places][: count - len(places)]
            places += fresh
            cosines += [neighbour.cosine] * len(fresh)
        found[split] = Choice(np.array(places, dtype=np.int64), np.array(cosines))
    return found


def nearest_directions(
    directions: Mapping[str, Float[np.ndarray, "k d"]], features: Mapping[str, Sequence[int]], count: int
) -> dict[FeatureId, list[Neighbour]]:
    """For every harvested feature the `count` others of its SAE with the largest decoder cosine above 0."""
    found: dict[FeatureId, list[Neighbour]] = {}
    for sae, rows in directions.items():
        norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        unit = (rows / norms).astype(np.float64)
        for start in range(0, len(unit), 1024):
            cosines = unit[start : start + 1024] @ unit.T
            for offset, row in enumerate(cosines):
                own = start + offset
                row[own] = -np.inf
                order = np.argsort(-row, kind="stable")[:count]
                found[FeatureId(sae, features[sae][own])] = [
                    Neighbour(FeatureId(sae, features[sae][other]), float(row[other]))
                    for other in order.tolist()
                    if row[other] > 0
                ]
    return found
