"""The explain stage's own cost: thousands of searches whose LLM and simulator do nothing but wait.

Every answer takes a drawn time in one of a stated number of slots, so what the stage would take if nothing else took
any time is known exactly. In the environment, NUM_FEATURES makes a shorter or a longer run, and ANSWER_SCALE multiplies
the answers' times: with 0 what is left is the stage itself, how many features it gets through and what grows meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import ray

from rayinterp.config import RunConfig, load_config
from rayinterp.explain.actor import Services
from rayinterp.explain.client import LLMReply, LLMRequest
from rayinterp.explain.runner import run_explain
from rayinterp.explanation import Rule
from rayinterp.feature_id import FeatureId
from rayinterp.planted import FEATURES, RULES, SAE, VOCABULARY, documents, fires
from rayinterp.simulate.simulator import RuleRequest
from rayinterp.tables import SCHEMAS, Committer, Tables
from tests.benchmarks.measure import Row

NAME = "control_plane"
NUM_FEATURES = int(os.environ.get("NUM_FEATURES", "2000"))
ANSWER_SCALE = float(os.environ.get("ANSWER_SCALE", "1"))
NUM_TOKENS, POOL, PER_SOURCE = 32, 1000, 10
NUM_ACTORS, SEARCHES_PER_ACTOR = 2, 32
LLM_SLOTS, SIMULATOR_SLOTS = 16, 8
SECONDS = (0.05, 0.5)
"""An answer's time: lognormal around 0.2, cut off at these."""
MAX_OVERHEAD, MAX_GROWTH = 1.15, 1.25
TREE = "{method: tree, llm: knows, simulator: oracle, num_llm_roots: 3, width: 2, branching_factor: 2, depth: 2}"
PLANTED = [feature for feature in FEATURES if feature.truth][:3]
"""What features take turns in meaning."""
SAID = [rule for rule in RULES if rule != "any word at all"]


class Call(NamedTuple):
    """One answer, as its fake remembers it."""

    who: str
    feature: str
    round: int
    seconds: float
    """As drawn, before any wait for a slot."""


def pool() -> list[list[str]]:
    """Sequences that all features share."""
    words = [word for document in documents(0, num_documents=POOL // 3) for word in document["text"].split()]
    return [words[start : start + NUM_TOKENS] for start in range(0, NUM_TOKENS * POOL, NUM_TOKENS)]


def write_tables(tables: Tables, num_features: int) -> None:
    """`features` and `records`, as the stages before would have left them."""
    sequences = pool()
    strengths = {f: np.array([fires(f.truth, words) for words in sequences], np.float32) for f in PLANTED}
    features = [
        {"feature_key": str(FeatureId(SAE, i)), "sae": SAE, "feature": i, "max_activation": 5.0, "status": "live"}
        for i in range(num_features)
    ]
    tables.create("features", features)

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, num_features, 100):
            rows = []
            for i in range(first, min(first + 100, num_features)):
                rows += record_rows(i, sequences, strengths[PLANTED[i % len(PLANTED)]])
            yield from pa.Table.from_pylist(rows, schema=SCHEMAS["records"]).to_batches()

    tables.create("records", batches())
    tables.finish("records")


def record_rows(index: int, sequences: list[list[str]], strengths: np.ndarray) -> list[dict[str, Any]]:
    rng = np.random.default_rng(index)
    active = strengths.any(1)
    rows = []
    for source, places in (("positive", np.flatnonzero(active)), ("random_negative", np.flatnonzero(~active))):
        for number, place in enumerate(rng.choice(places, 2 * PER_SOURCE, replace=False)):
            noise = rng.uniform(0.5, 1, NUM_TOKENS)  # or a rule that is right would end the search
            rows.append(
                {
                    "feature_key": str(FeatureId(SAE, index)),
                    "sae": SAE,
                    "feature": index,
                    "split": "train" if number % 2 else "valid",
                    "source": source,
                    "rank": number // 2,
                    "sequence_id": index * POOL + place,
                    "document_id": index * POOL + place,
                    "token_ids": [VOCABULARY.index(word) for word in sequences[place]],
                    "tokens": [f" {word}" for word in sequences[place]],
                    "activations": strengths[place] * noise,
                }
            )
    return rows


def drawn(seed: str) -> tuple[float, random.Random]:
    """Seconds that an answer takes, and chance for what it says."""
    rng = random.Random(seed)
    return ANSWER_SCALE * min(max(rng.lognormvariate(np.log(0.2), 0.6), SECONDS[0]), SECONDS[1]), rng


class Waiting:
    """Picklable: services that answer after a while, each in one of its slots, and write down how long that was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, config: RunConfig, tables: Tables, *others: Any) -> Services:
        slots = {
            "llm": asyncio.Semaphore(LLM_SLOTS // NUM_ACTORS),
            "sim": asyncio.Semaphore(SIMULATOR_SLOTS // NUM_ACTORS),
        }
        account = (self.folder / f"calls-{os.getpid()}").open("a", buffering=1)
        sequences = pool()
        predicted = {rule: np.array([fires((Rule(rule),), words) for words in sequences], np.float32) for rule in RULES}

        async def wait(call: Call) -> None:
            async with slots[call.who]:
                await asyncio.sleep(call.seconds)
            account.write(json.dumps(call) + "\n")

        async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
            seconds, rng = drawn(request.hash)
            await wait(Call("llm", feature_key, len(request.messages), seconds))
            rules = [
                {"activates_on": rule, "strength": rng.randint(1, 5)} for rule in rng.sample(SAID, rng.randint(1, 3))
            ]
            return LLMReply(json.dumps(rules), "stop", 1000, 50)

        def of_one_feature() -> Any:
            asked = iter(range(1_000_000))

            async def simulate(requests: list[RuleRequest]) -> list[list[np.ndarray]]:
                feature, number = requests[0].sequences[0].sequence_id // POOL, next(asked)
                await wait(Call("sim", str(FeatureId(SAE, feature)), number, drawn(f"{feature}/{number}")[0]))
                silent = np.zeros((POOL, NUM_TOKENS), np.float32)  # for a rule that nobody planted: the lexical root's
                return [[predicted.get(r.rule, silent)[s.sequence_id % POOL] for s in r.sequences] for r in requests]

            return simulate

        return Services({"oracle": of_one_feature}, dict.fromkeys(config.llms, generate), None)


class TimedCommitter(Committer):
    """The run's committer, which writes down how long each of its commits took."""

    def __init__(self, tables: Tables, folder: Path) -> None:
        super().__init__(tables)
        self._account = (folder / "commits").open("a", buffering=1)

    def _write(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        begun = time.monotonic()
        super()._write(rows)
        self._account.write(f"{time.monotonic() - begun}\n")


class Memory:
    """Samples resident sizes of this process and of the stage's actors, a second apart, from the first answer on."""

    WATCHED = ("SearchActor", "TimedCommitter")

    def __init__(self, folder: Path) -> None:
        self.sizes: dict[str, list[float]] = defaultdict(list)
        self.first_answer: float | None = None
        self._folder = folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def growth(self, kind: str) -> tuple[float, float]:
        """Medians of the first and the last quarter of the samples, in MB."""
        return quarters(self.sizes[kind])

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            if self.first_answer is None:
                if not any(file.stat().st_size for file in self._folder.glob("calls-*")):
                    continue
                self.first_answer = time.monotonic()
            seen: dict[str, float] = defaultdict(float)
            for process in [psutil.Process(), *psutil.process_iter(["cmdline"])]:
                try:
                    line = " ".join(process.cmdline())
                    kind = next((kind for kind in self.WATCHED if line.startswith(f"ray::{kind}")), None)
                    kind = "driver" if process.pid == os.getpid() else kind
                    if kind:
                        seen[kind] = max(seen[kind], process.memory_info().rss / 1e6)
                except psutil.Error:  # it ended meanwhile
                    continue
            for kind, size in seen.items():
                self.sizes[kind].append(size)


def quarters(samples: list[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter."""
    quarter = max(len(samples) // 4, 1)
    return statistics.median(samples[:quarter]), statistics.median(samples[-quarter:])


def ideal_seconds(calls: list[Call]) -> float:
    """If all slots were busy to the end, or the longest search alone where that is longer."""
    totals: dict[str, float] = defaultdict(float)
    slowest: dict[tuple[str, str, int], float] = defaultdict(float)
    for call in calls:
        totals[call.who] += call.seconds
        step = (call.feature, call.who, call.round)
        slowest[step] = max(slowest[step], call.seconds)
    searches: dict[str, float] = defaultdict(float)
    for (feature, *_), seconds in slowest.items():
        searches[feature] += seconds
    return max(totals["llm"] / LLM_SLOTS, totals["sim"] / SIMULATOR_SLOTS, max(searches.values()))


def measure(folder: Path, num_features: int, connect: Any = None) -> list[Row]:
    tables = Tables(str(folder))
    write_tables(tables, num_features)
    overrides = [
        f"run_dir={folder}",
        f"explainers={{tree: {TREE}}}",
        f"resources.search={{num_actors: {NUM_ACTORS}, num_cpus: 0.1}}",
        f"resources.searches_per_actor={SEARCHES_PER_ACTOR}",
    ]
    config = load_config("configs/planted.yaml", overrides)
    committer: Any = ray.remote(TimedCommitter).options(num_cpus=0).remote(tables, folder)
    ray.get(committer.add.remote({}))
    begun = time.monotonic()
    with Memory(folder) as memory:
        run_explain(config, tables, committer, connect=connect or Waiting(folder))
        seconds = time.monotonic() - begun
    ray.kill(committer)
    calls = [Call(*json.loads(line)) for file in folder.glob("calls-*") for line in file.open()]
    answers = sum(call.who == "llm" for call in calls)
    assert tables.count("explanations") == num_features, "features without a row"
    assert tables.count("llm_calls") == answers, f"{answers} answers, {tables.count('llm_calls')} in the ledger"
    ideal = ideal_seconds(calls)
    name = f"explain stage, {num_features:,} tree searches, {answers:,} LLM answers"
    if ANSWER_SCALE:
        met = seconds <= MAX_OVERHEAD * ideal
        rows = [Row(f"{name}, against no overhead", seconds, ideal, ideal / seconds, "s", 1 / MAX_OVERHEAD, met)]
    else:
        rows = [Row(f"{name} that take no time", seconds, None, None, "s", None, None)]
    starting = (memory.first_answer or begun) - begun
    rows.append(Row("of it, until the search actors have been started", starting, None, None, "s", None, None))
    rows.append(Row("from then on", num_features / (seconds - starting), None, None, "features/s", None, None))
    first, last = quarters([float(line) for line in (folder / "commits").open()])
    rows.append(Row("a commit, last quarter against the first", last, first, first / last, "s", None, None))
    for kind in ("driver", *memory.WATCHED):
        first, last = memory.growth(kind)
        rows.append(
            Row(f"memory of the {kind}, last quarter of the stage against the first", last, first, first / last, "MB",
                1 / MAX_GROWTH, last <= MAX_GROWTH * first)
        )  # fmt: skip
    return rows


def run() -> list[Row]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as name:
            return measure(Path(name), NUM_FEATURES)
    finally:
        ray.shutdown()
