"""How searches and grading ask a simulator: what has been simulated before is not asked again.

    candidate --> memo of the feature's sequences --what it lacks--> a replica --> `simulations` --> calibrated

Six raw log-probabilities per token are remembered, so a change of calibration or strength costs nothing. What a feature
asks for is looked up in `simulations`, and its memo is forgotten when work on it ends; only the table grows.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter

from rayinterp.config import LLMSimulatorConfig, RunConfig, service_name
from rayinterp.errors import EngineError, UserError
from rayinterp.prompts import simulator_messages
from rayinterp.simulate.simulator import (
    Memo,
    MemoKey,
    RuleRequest,
    SimulateAsync,
    calibrated,
    is_usable,
    memo_keys,
    with_nulls,
)
from rayinterp.tables import Tables, sql_in

if TYPE_CHECKING:
    from jaxtyping import Float16

MAX_ATTEMPTS = 8
"""Times that a request is sent: a replica may die with it, and another be started in its place."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled for every further one."""
LOST = (
    *(RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError),
    *(BackPressureError, DeploymentUnavailableError),
)
"""What says that a request was not answered, or its answer lost, and nothing about the request itself."""
MAX_ENGINE_ATTEMPTS = 3
"""Of a request on which an engine failed: its device may be at fault, and another replica well."""
ENGINE_PAUSE = 5.0
"""Seconds before the second of these; doubled for the third. Serve takes some six to find a replica that fails ill."""


class SimulatorClient:
    """One simulator arm, as a search actor or a grading task sees it.

    Args:
        committer: Actor form of `tables.Committer`, which makes new simulations durable.
        handle: Of the arm's Serve app; found by its name where left out.
    """

    def __init__(self, name: str, config: RunConfig, tables: Tables, committer: Any, handle: Any = None) -> None:
        arm = config.simulators[name]
        self._llm = arm if isinstance(arm, LLMSimulatorConfig) else None
        self._timeout = config.resources.simulator.timeout_seconds
        self._tables, self._committer = tables, committer
        self._handle: Any = handle or serve.get_app_handle(service_name("simulator", name, config))
        self._pairs = Counter(
            "rayinterp_simulator_pairs", "(rule, sequence) pairs asked for.", ("simulator", "remembered")
        ).set_default_tags({"simulator": name})

    def remembering(self) -> SimulateAsync:
        """What simulates rules on the sequences of one feature, and pays for no pair twice."""
        if self._llm is None:
            return self._ask
        method, memo, memo_name = self._llm.calibration, Memo(), memo_id(self._llm)

        async def simulate(requests: list[RuleRequest]) -> list[list[np.ndarray]]:
            wanted = with_nulls(requests, method)
            if missing := memo.missing(wanted):
                for key, log_probs in await asyncio.to_thread(read_simulations, self._tables, memo_name, missing):
                    if is_usable(log_probs):
                        memo.remember(key, log_probs)
            missing = memo.missing(wanted)
            if missing:
                await self._write(memo_name, memo.add(missing, await self._ask(missing)))
            num_asked, num_missing = (sum(len(r.sequences) for r in group) for group in (wanted, missing))
            for remembered, count in (("no", num_missing), ("yes", num_asked - num_missing)):
                if count:
                    self._pairs.inc(count, {"remembered": remembered})
            return calibrated(requests, memo.log_probs(wanted), method)

        return simulate

    async def token_losses(self, requests: list[RuleRequest]) -> list[list[np.ndarray]]:
        """Negative log-likelihoods of texts behind descriptions, as `TransformersSimulator.token_losses`."""
        return await self._ask(requests, "token_losses")

    async def _write(self, memo_name: str, new: dict[MemoKey, Float16[np.ndarray, "seq 6"]]) -> None:
        """Hands new simulations over before anyone sees a score made from them; what is no number is left to another
        replica, which may do better when it is asked again."""
        rows = [
            {"simulator": memo_name, **key._asdict(), "log_probs": log_probs.ravel()}
            for key, log_probs in new.items()
            if is_usable(log_probs)
        ]
        await self._committer.add.remote({"simulations": rows})

    async def rate(self, texts: list[str]) -> list[np.ndarray]:
        """Six log-probabilities for each text: how abstract it is, by an arm whose engine is transformers."""
        return await self._ask(texts, "rate")

    async def _ask(self, requests: Sequence[Any], method: str = "answer") -> list[Any]:
        """A replica's answer; from another one where the first is lost on the way.

        Raises:
            UserError: no replica answered in time, or any of several.
            EngineError: the engine failed on the request, on several replicas.
        """
        pause = FIRST_PAUSE
        for attempt in range(1, MAX_ATTEMPTS + 1):
            response = getattr(self._handle, method).remote(requests)
            try:
                return await asyncio.wait_for(_result(response), self._timeout)
            except EngineError:
                if attempt >= MAX_ENGINE_ATTEMPTS:
                    raise
                pause = max(pause, ENGINE_PAUSE)
            except LOST as error:
                if attempt == MAX_ATTEMPTS:
                    raise UserError(
                        f"no replica of the simulator answered in {MAX_ATTEMPTS} attempts ({error}); what is finished "
                        "is kept: see the dashboard for why they die, and run the same command again"
                    ) from error
            except TimeoutError:
                response.cancel()
                raise UserError(
                    f"a simulator took longer than resources.simulator.timeout_seconds ({self._timeout:g}) for one "
                    "candidate; raise it, or give the simulator more replicas"
                ) from None
            except asyncio.CancelledError:
                response.cancel()  # the search has given up: what has not begun need not be computed
                raise
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")


def memo_id(config: LLMSimulatorConfig) -> str:
    """`model@hash` of what log-probabilities depend on: arms that differ in calibration find each other's.

    A dtype of `auto` counts as such: machines that resolve it differently share a memo.
    """
    weights = [getattr(config, field) for field in ("engine", "model", "revision", "dtype", "quantization")]
    content = json.dumps([weights, simulator_messages("", config.num_few_shots)])
    return f"{PurePosixPath(config.model).name}@{hashlib.sha256(content.encode()).hexdigest()[:8]}"


async def _result(response: Any) -> list[Any]:
    return await response


def read_simulations(
    tables: Tables, memo: str, requests: list[RuleRequest]
) -> list[tuple[MemoKey, Float16[np.ndarray, "values"]]]:
    """What a simulator computed before for some rules and sequences, in this run or an interrupted one.

    Both are asked for: a sequence is shared by hundreds of features, whose rules are nothing to this one.
    """
    columns = ["rule_hash", "sequence_id", "log_probs"]
    keys = {key for request in requests for key in memo_keys(request)}
    rules, sequences = (sorted(set(ids)) for ids in zip(*keys, strict=True))
    where = f"simulator = '{memo}' and {sql_in('rule_hash', rules)} and {sql_in('sequence_id', sequences)}"
    found: list[tuple[MemoKey, np.ndarray]] = []
    for batch in tables.read("simulations", columns, where).to_batches():
        rule_hashes, ids = (batch[name].to_pylist() for name in columns[:2])
        values = batch["log_probs"].flatten().to_numpy(zero_copy_only=False)
        edges = np.cumsum([0, *batch["log_probs"].value_lengths().to_pylist()])
        keys = map(MemoKey, rule_hashes, ids)
        found += [(key, values[edges[row] : edges[row + 1]]) for row, key in enumerate(keys)]
    return found
