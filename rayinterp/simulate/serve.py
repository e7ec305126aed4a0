"""Simulators as Ray Serve replicas.

    clients --answer(what the memo lacks of a candidate)--> queue --merged by tokens--> engine thread --> answers

- A request is a whole candidate: all its rules on all its records. A Serve call costs milliseconds.
- While the engine computes, requests of other features wait and are then merged into its next call.
- The engine runs in a thread of its own; the event loop stays free for health checks, `stats` and new requests.
- A replica holds a model and nothing else: any of them answers any request, and one that dies takes nothing along.

No port is opened: what is deployed is reached through handles, from within the cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.util.metrics import Counter, Gauge, Histogram

from rayinterp.config import LLMSimulatorConfig, load_config
from rayinterp.errors import EngineError, UserError
from rayinterp.pools import torch_threads
from rayinterp.simulate import load_simulator

if TYPE_CHECKING:
    import numpy as np
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from rayinterp.config import ServiceResources, SimulatorConfig
    from rayinterp.simulate.simulator import LogProbEngine, LogProbs, Prediction, RuleRequest
    from rayinterp.simulate.transformers import TransformersSimulator

MAX_ONGOING_REQUESTS = 64
"""Candidates that one replica takes at a time; Serve's default of a few would leave nothing to merge."""
MERGED_TOKENS = 4096
"""Tokens of records that one call of the engine takes, or one candidate: more would keep the last of them waiting for
no gain, since the engine cuts its work into passes anyway."""
MAX_FAILURES = 3
"""Calls of the engine that fail one after the other before Serve is told to replace the replica."""
HEALTH_SECONDS = 2.0
"""Between Serve's looks at a replica, which it replaces after three that find it ill: one that fails at once has the
shortest queue, and gets the next request."""
DRAIN_SECONDS = 600.0
"""How long a replica that is to go may take to answer what it has."""


class SimulatorStats(TypedDict):
    """What one replica has done since it started."""

    num_requests: int
    """Candidates answered."""
    num_engine_calls: int
    """Calls they were merged into."""
    num_pairs: int
    """(rule, sequence) pairs computed, those of null explanations included."""


class _Waiting(NamedTuple):
    """A candidate in the queue, and where its answer goes."""

    requests: list[RuleRequest]
    compute: Callable[[list[RuleRequest]], list[list[Any]]]
    """What the engine is asked for: only requests for the same are merged."""
    answer: asyncio.Future[Any]
    since: float

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.tokens) for request in self.requests for sequence in request.sequences)


class SimulatorReplica:
    """One simulator behind a queue; the class that Serve deploys.

    Args:
        name: The arm, for metrics.
        config: The simulator to load.
        num_replicas: Replicas that share a machine's cores.
    """

    def __init__(self, name: str, config: SimulatorConfig, num_replicas: int = 1) -> None:
        engine = load_simulator(config)
        self._engine = engine
        self._is_llm = isinstance(config, LLMSimulatorConfig)
        self._compute = cast("LogProbEngine", engine).log_probs if self._is_llm else engine.simulate
        self._token_losses = getattr(engine, "token_losses", None)
        self._thread = ThreadPoolExecutor(1, "simulator", _use_threads, (config.engine, torch_threads(num_replicas)))
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._num_failures = 0
        self._stats = SimulatorStats(num_requests=0, num_engine_calls=0, num_pairs=0)
        self._metrics = _Metrics(name)

    async def answer(self, requests: list[RuleRequest]) -> list[list[LogProbs]] | list[list[Prediction]]:
        """One array per sequence for each request: log-probabilities from an LLM engine, predictions from others."""
        return await self._queued(requests, self._compute)

    async def token_losses(self, requests: list[RuleRequest]) -> list[list[Any]]:
        """Losses of every sequence's tokens behind a description, from an engine that gives them."""
        if self._token_losses is None:
            raise UserError("this simulator's engine gives no losses of texts; name one whose engine is transformers")
        return await self._queued(requests, self._token_losses)

    async def _queued(
        self, requests: list[RuleRequest], compute: Callable[[list[RuleRequest]], list[list[Any]]]
    ) -> list[list[Any]]:
        waiting = _Waiting(requests, compute, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(waiting)
        self._metrics.queue.set(len(self._waiting))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        # A caller that gives up cancels this, and with it the future: what has not begun is then never computed.
        return await waiting.answer

    async def rate(self, texts: list[str]) -> list[np.ndarray]:
        """Six log-probabilities for each text; in the engine's thread, behind the call that is under way."""
        loop, engine = asyncio.get_running_loop(), cast("TransformersSimulator", self._engine)
        try:
            answer = await loop.run_in_executor(self._thread, engine.rate, texts)
        except Exception as error:
            raise self._failure(error) from error
        self._num_failures = 0
        return answer

    async def _work(self) -> None:
        """One call of the engine after another, each for what waits by then."""
        while batch := self._next_batch():
            await self._answer(batch)

    def _next_batch(self) -> list[_Waiting]:
        self._waiting = [candidate for candidate in self._waiting if not candidate.answer.done()]
        num_tokens = num_taken = 0
        for candidate in self._waiting:
            num_tokens += candidate.num_tokens
            if num_taken and (num_tokens > MERGED_TOKENS or candidate.compute != self._waiting[0].compute):
                break
            num_taken += 1
        batch, self._waiting = self._waiting[:num_taken], self._waiting[num_taken:]
        self._metrics.queue.set(len(self._waiting))
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._compute_merged([candidate.requests for candidate in batch], batch[0].compute)
        except Exception as error:
            if len(batch) > 1:  # whoever caused it must not take the others along
                for candidate in batch:
                    await self._answer([candidate])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(self._failure(error))
            return
        self._num_failures = 0
        for candidate, answer in zip(batch, answers, strict=True):
            self._metrics.candidate_seconds.observe(time.monotonic() - candidate.since)
            if not candidate.answer.done():  # its caller may have given up
                candidate.answer.set_result(answer)

    def _failure(self, error: Exception) -> Exception:
        """What a caller is told: that its request is wrong, or that the engine failed and another may not."""
        if isinstance(error, UserError):
            return error
        self._num_failures += 1
        return EngineError(f"the simulator's engine failed: {type(error).__name__}: {error}")

    async def _compute_merged(
        self, candidates: list[list[RuleRequest]], compute: Callable[[list[RuleRequest]], list[list[Any]]]
    ) -> list[list[Any]]:
        loop, start = asyncio.get_running_loop(), time.monotonic()
        requests = list(chain.from_iterable(candidates))
        answers = iter(await loop.run_in_executor(self._thread, compute, requests))
        num_tokens = sum(len(sequence.tokens) for request in requests for sequence in request.sequences)
        self._stats["num_requests"] += len(candidates)
        self._stats["num_engine_calls"] += 1
        self._stats["num_pairs"] += sum(len(request.sequences) for request in requests)
        self._metrics.batch_tokens.observe(num_tokens)
        self._metrics.tokens.inc(num_tokens)
        self._metrics.tokens_per_second.set(num_tokens / max(time.monotonic() - start, 1e-9))
        return [list(islice(answers, len(candidate))) for candidate in candidates]

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises: an engine does not recover from a lost device."""
        if self._num_failures >= MAX_FAILURES:
            raise RuntimeError(f"the simulator's engine failed {self._num_failures} times in a row")

    async def stats(self) -> SimulatorStats:
        return self._stats


def _use_threads(engine: str, threads: int) -> None:
    """Torch counts threads per calling thread, and Ray's default for a share of a CPU is one."""
    if engine != "oracle":
        import torch  # an engine's package: only the planted simulator goes without

        torch.set_num_threads(threads)


class _Metrics:
    """What a replica publishes, each with the tag `simulator`: `rayinterp_simulator_...`."""

    def __init__(self, simulator: str) -> None:
        tags = {"simulator": simulator}
        keys = tuple(tags)
        self.queue = Gauge("rayinterp_simulator_queue", "Candidates that wait for the engine.", keys)
        self.tokens = Counter("rayinterp_simulator_tokens", "Tokens of records simulated.", keys)
        self.tokens_per_second = Gauge(
            "rayinterp_simulator_tokens_per_second", "Tokens of records per second of the last call.", keys
        )
        self.batch_tokens = Histogram(
            "rayinterp_simulator_batch_tokens", "Tokens of records per call.", [64, 256, 1024, 4096, 16384], keys
        )
        self.candidate_seconds = Histogram(
            "rayinterp_simulator_candidate_seconds", "From request to answer.", [0.01, 0.1, 1, 10, 100, 1000], keys
        )
        for metric in (self.queue, self.tokens, self.tokens_per_second, self.batch_tokens, self.candidate_seconds):
            metric.set_default_tags(tags)


def deploy_simulator(name: str, config: SimulatorConfig, resources: ServiceResources, app: str) -> DeploymentHandle:
    """Starts the replicas of one simulator arm as a Serve app, unless they are there."""
    return run_app(bind_simulator(name, config, resources), app)


def bind_simulator(name: str, config: SimulatorConfig, resources: ServiceResources) -> Application:
    """The replicas of one simulator arm, not yet deployed; the arms without an LLM take no GPU."""
    if not isinstance(config, LLMSimulatorConfig):
        resources = resources.model_copy(update={"num_gpus": 0})
    options = replica_options(resources)
    return serve.deployment(SimulatorReplica).options(**options).bind(name, config, resources.most_actors)


class StandingSimulator(BaseModel):
    """Which simulator a Serve config file asks for: the `args` of `build_simulator`."""

    model_config = ConfigDict(extra="forbid")

    config: str
    """Config file of the runs that share it."""
    overrides: list[str] = []
    """Their `key.path=value` overrides, as far as simulators and resources are concerned."""
    simulator: str
    """Its name in `simulators`."""


def build_simulator(args: dict[str, Any]) -> Application:
    """Serve's app builder for a simulator that stands before any run begins (`import_path` in a Serve config file).

    Runs find the app by `service_name` where their `resources.standing` names the simulator.

    Args:
        args: A `StandingSimulator`, as plain data: Serve makes models of arguments by annotations alone, and those of
            this module are strings.

    Raises:
        UserError: the config is wrong, or has no such simulator.
    """
    asked = StandingSimulator.model_validate(args)
    config = load_config(asked.config, [*asked.overrides, f"resources.standing=[{asked.simulator}]"])
    return bind_simulator(asked.simulator, config.simulators[asked.simulator], config.resources.simulator)


def replica_options(resources: ServiceResources) -> dict[str, Any]:
    """How Serve is to run the replicas of a model: a fixed number, or as many as the requests in hand call for."""
    options: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        "health_check_period_s": HEALTH_SECONDS,
        "ray_actor_options": {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
    }
    if resources.max_actors is None:
        return options | {"num_replicas": resources.num_actors}
    return options | {
        "autoscaling_config": {
            "min_replicas": resources.num_actors,
            "max_replicas": resources.max_actors,
            "target_ongoing_requests": resources.target_ongoing,
            "upscale_delay_s": resources.upscale_seconds,
            "downscale_delay_s": resources.idle_seconds,
        }
    }


def run_app(bound: Any, app: str) -> DeploymentHandle:
    """Deploys an app and waits until it is ready; one that runs already, for another stage, is kept."""
    running = serve.status().applications.get(app)
    if running is not None and running.status == "RUNNING":
        return serve.get_app_handle(app)
    serve.start(proxy_location="Disabled")
    return serve.run(bound, name=app, route_prefix=None)
