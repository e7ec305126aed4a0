"""From one value for each record to rows of `scores`: what all further scorers share.

    test records, a value for each (None: its answer did not parse) -> per complementary source -> value, interval, row

A record counts as activating where the feature fires anywhere in it, whatever its source. Each is asked about once,
though two sources may have drawn it. Functions of arrays, which know nothing of prompts, models or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayinterp.config import IntruderConfig, RunConfig, ScorerConfig
from rayinterp.feature_id import FeatureId
from rayinterp.grade_plan import graded_sources, score_row
from rayinterp.records import ActivationRecord
from rayinterp.score import WIDE_BELOW, Score, score_all, share_interval
from rayinterp.sources import generator_for

if TYPE_CHECKING:
    from jaxtyping import Bool

METHODS = ("detection", "fuzzing", "intruder", "surprisal", "embedding")
"""As they stand in the column `scorer`."""


class Graded(NamedTuple):
    """Whose text was graded: an explanation's, or a control's."""

    explainer: str
    """Empty for null texts, and where there is no explanation."""
    control: str
    """Empty, shuffled or null."""


class Answers(NamedTuple):
    """What came of one text on a feature's records."""

    values: tuple[float | None, ...]
    """One for each record; None where the answer about it did not parse."""
    status: str = "ok"
    """Else why there is no value at all: llm_error."""


def chance_level(scorer: ScorerConfig) -> float:
    """What answers that have nothing to do with the records give in the mean."""
    return 1 / scorer.num_shown if isinstance(scorer, IntruderConfig) else 0.5


def each_once(records: Sequence[ActivationRecord]) -> list[ActivationRecord]:
    """The first record of every sequence."""
    return list({record.sequence.sequence_id: record for record in reversed(records)}.values())[::-1]


def fires(record: ActivationRecord) -> bool:
    return bool(record.activations.any())


def rows_of(
    feature: FeatureId,
    arm: str,
    method: str,
    records: Sequence[ActivationRecord],
    answers: Mapping[Graded, Answers],
    config: RunConfig,
) -> list[dict[str, Any]]:
    """Rows of `scores`, one for each text and source.

    Args:
        arm: The scorer's name in the tables.
        records: Test records of all sources, as they were drawn.
        answers: On `each_once(records)`.
    """
    place = {record.sequence.sequence_id: index for index, record in enumerate(each_once(records))}
    active = np.array([fires(record) for record in each_once(records)], dtype=bool)
    documents = np.array([record.document_id for record in each_once(records)])
    rows = []
    for source in graded_sources(config):
        drawn = [place[r.sequence.sequence_id] for r in records if r.source in ("positive", source)]
        places = np.array(sorted(set(drawn)), dtype=int)
        if method == "intruder":
            places = places[~active[places]]
        of_source = any(record.source == source for record in records)
        gradable = of_source and len(places) and (method == "intruder" or len(set(active[places])) == 2)
        for graded, answer in answers.items():
            row = score_row(feature, graded.explainer, graded.control, arm, method, source, num_records=0)
            if not gradable or answer.status != "ok":
                rows.append({**row, "status": answer.status if gradable else "no_records"})
                continue
            values = [answer.values[i] for i in places]
            generator = generator_for(config.seed, feature, "bootstrap", *graded, arm, source)
            result = value_of(method, active[places], values, documents[places], generator, config.score.num_bootstrap)
            rows.append({**row, **result})
    return rows


def value_of(
    method: str,
    active: Bool[np.ndarray, "n"],
    values: Sequence[float | None],
    documents: np.ndarray,
    generator: np.random.Generator,
    num_bootstrap: int,
) -> dict[str, Any]:
    """The columns of a row that depend on the answers.

    Intervals are those of `score_all`, over documents; of the share of intruders found it is Wilson's.
    """
    read = np.array([value is not None for value in values], dtype=bool)
    parses = method not in ("surprisal", "embedding")
    counted = {"num_records": int(read.sum()), "num_unparsed": int((~read).sum()) if parses else None}
    kinds = active[read]
    few = len(kinds) if method == "intruder" else min(kinds.sum(), (~kinds).sum())
    if few == 0:
        return {**counted, "status": "parse_error"}
    known = np.array([value for value in values if value is not None], dtype=float)
    if method == "intruder":
        share = share_interval(known)
        score = Score(share.value, share.low, share.high, "wide" if few < WIDE_BELOW else "ok")
    else:
        # Records as texts of one token. Of verdicts, which are 0 or 1, the AUROC is the balanced accuracy.
        true, answered = [np.array([kind], dtype=float) for kind in kinds], [np.array([value]) for value in known]
        drawn = ["activating" if kind else "silent" for kind in kinds]
        wide = bool(few < WIDE_BELOW)
        score = score_all(true, answered, documents[read].tolist(), generator, num_bootstrap, wide, drawn)["auroc"]
    return {**counted, "value": score.value, "ci_low": score.low, "ci_high": score.high, "status": score.status}
