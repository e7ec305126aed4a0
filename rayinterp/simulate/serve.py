"""Simulators as Ray Serve replicas: the only file of `simulate` that imports Ray.

    searches --simulate(candidate)--> waiting requests --one batch at a time--> engine thread --> predictions
                                                                                     |
                                       `simulations` --rows at start--> memo --new rows--> committer

- A request is a whole candidate: all its rules on all its records. A Serve call costs milliseconds.
- While the engine computes, requests of other features wait and are then merged into its next call.
- The engine runs in a thread of its own; the event loop stays free for health checks, `stats` and new requests.
- LLM engines go through the memo: only pairs never seen are computed, and calibration is applied afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import numpy as np
import torch
from ray import serve

from rayinterp.config import TransformersSimulatorConfig, arm_id
from rayinterp.harvest import torch_threads
from rayinterp.prompts import simulator_messages
from rayinterp.simulate import load_simulator
from rayinterp.simulate.simulator import MemoKey, MemoSimulator

if TYPE_CHECKING:
    from jaxtyping import Float16
    from ray.actor import ActorHandle
    from ray.serve.handle import DeploymentHandle

    from rayinterp.config import SimulatorConfig, StageResources
    from rayinterp.simulate.simulator import LogProbEngine, Prediction, RuleRequest, Simulator
    from rayinterp.tables import Tables

MAX_ONGOING_REQUESTS = 64
"""Candidates that one replica takes at a time; Serve's default of a few would leave nothing to merge."""


class SimulatorStats(TypedDict):
    """What one replica has done since it started."""

    num_requests: int
    """Candidates simulated."""
    num_engine_calls: int
    """Calls they were merged into."""
    num_pairs_simulated: int
    """(rule, sequence) pairs computed, those of null explanations included."""
    num_pairs_remembered: int
    """Pairs that the memo answered."""


class _Waiting(NamedTuple):
    """A candidate in the queue, and where its answer goes."""

    requests: list[RuleRequest]
    predictions: asyncio.Future[list[list[Prediction]]]


class SimulatorReplica:
    """One simulator behind a queue; the class that Serve deploys.

    Args:
        config: The simulator to load.
        memo_id: Its name in `simulations`, from `memo_id`.
        tables: Where earlier simulations are.
        committer: Actor form of `tables.Committer` that takes new simulations; without it they live in memory only.
        num_replicas: Replicas that share a machine's cores.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        memo_id: str,
        tables: Tables,
        committer: ActorHandle | None = None,
        num_replicas: int = 1,
    ) -> None:
        engine = load_simulator(config)
        self._memo: MemoSimulator | None = None
        if config.engine == "transformers":
            self._memo = MemoSimulator(cast("LogProbEngine", engine), config.calibration)
            for key, log_probs in read_simulations(tables, memo_id):
                self._memo.remember(key, log_probs)
        self._simulator: Simulator = self._memo or engine
        self._memo_id = memo_id
        self._committer = committer
        # Torch counts threads per calling thread, and Ray's default for a share of a CPU is one.
        threads = torch_threads(num_replicas)
        self._thread = ThreadPoolExecutor(1, "simulator", torch.set_num_threads, (threads,))
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._num_requests = self._num_engine_calls = self._num_pairs = 0

    async def simulate(self, requests: list[RuleRequest]) -> list[list[Prediction]]:
        """Predictions for one candidate, as `Simulator.simulate`."""
        candidate = _Waiting(requests, asyncio.get_running_loop().create_future())
        self._waiting.append(candidate)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await candidate.predictions

    async def _work(self) -> None:
        """One engine call after another, each for all candidates that wait by then."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await self._answer(batch)

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._simulate_merged([candidate.requests for candidate in batch])
        except Exception as error:
            if len(batch) > 1:  # whoever caused it must not take the others along
                for candidate in batch:
                    await self._answer([candidate])
            elif not batch[0].predictions.done():
                batch[0].predictions.set_exception(error)
            return
        for candidate, predictions in zip(batch, answers, strict=True):
            if not candidate.predictions.done():  # its caller may have given up
                candidate.predictions.set_result(predictions)

    async def _simulate_merged(self, candidates: list[list[RuleRequest]]) -> list[list[list[Prediction]]]:
        loop = asyncio.get_running_loop()
        requests = list(chain.from_iterable(candidates))
        predictions = iter(await loop.run_in_executor(self._thread, self._simulator.simulate, requests))
        self._num_requests += len(candidates)
        self._num_engine_calls += 1
        self._num_pairs += sum(len(request.sequences) for request in requests)
        await self._commit_new()
        return [list(islice(predictions, len(candidate))) for candidate in candidates]

    async def _commit_new(self) -> None:
        """Hands new simulations over before anyone sees a score made from them."""
        if self._memo is None or not self._memo.new:
            return
        if self._committer is not None:
            rows = [
                {"simulator": self._memo_id, **key._asdict(), "log_probs": log_probs.ravel()}
                for key, log_probs in self._memo.new.items()
            ]
            added: Any = self._committer.add.remote({"simulations": rows})
            await added
        self._memo.new.clear()

    async def stats(self) -> SimulatorStats:
        return {
            "num_requests": self._num_requests,
            "num_engine_calls": self._num_engine_calls,
            "num_pairs_simulated": self._memo.num_simulated if self._memo else self._num_pairs,
            "num_pairs_remembered": self._memo.num_remembered if self._memo else 0,
        }


def read_simulations(tables: Tables, memo_id: str) -> Iterator[tuple[MemoKey, Float16[np.ndarray, "values"]]]:
    """What a simulator computed before, in this run or an interrupted one."""
    columns = ["rule_hash", "sequence_id", "log_probs"]
    for batch in tables.read("simulations", columns, f"simulator = '{memo_id}'").to_batches():
        rule_hashes, sequence_ids = (batch[name].to_pylist() for name in columns[:2])
        values = batch["log_probs"].flatten().to_numpy(zero_copy_only=False)
        edges = np.cumsum([0, *batch["log_probs"].value_lengths().to_pylist()])
        for row, key in enumerate(map(MemoKey, rule_hashes, sequence_ids)):
            yield key, values[edges[row] : edges[row + 1]]


def memo_id(name: str, config: SimulatorConfig) -> str:
    """`name@hash` of what log-probabilities depend on, so that a change of calibration finds them all again.

    A dtype of `auto` counts as such: machines that resolve it differently share a memo.
    """
    if not isinstance(config, TransformersSimulatorConfig):
        return arm_id(name, config)
    content = [
        [config.model, config.revision, config.dtype, config.quantization],
        simulator_messages("", config.num_few_shots),
    ]
    return f"{name}@{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}"


def deploy_simulator(
    name: str,
    config: SimulatorConfig,
    resources: StageResources,
    tables: Tables,
    committer: ActorHandle | None = None,
    app: str | None = None,
) -> DeploymentHandle:
    """Starts the replicas of one simulator arm as a Serve app (`simulator-<name>` by default), and waits for them."""
    deployment = serve.deployment(SimulatorReplica).options(
        num_replicas=resources.num_actors,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
    )
    bound = deployment.bind(config, memo_id(name, config), tables, committer, resources.num_actors)
    return serve.run(bound, name=app or f"simulator-{name}", route_prefix=None)
