"""The deployed simulator: merged calls, a memo that outlives replicas, and what becomes of requests that are lost."""

import asyncio
import os
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from rayinterp.config import (
    LateInteractionConfig,
    ServiceResources,
    TransformersSimulatorConfig,
    VllmSimulatorConfig,
    service_name,
)
from rayinterp.errors import EngineError, UserError
from rayinterp.explanation import Rule
from rayinterp.run import Run, deploy, stop_services
from rayinterp.simulate import client
from rayinterp.simulate.client import SimulatorClient, memo_id, read_simulations
from rayinterp.simulate.serve import (
    MERGED_TOKENS,
    SimulatorReplica,
    build_simulator,
    deploy_simulator,
    replica_options,
)
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, RuleRequest, TokenSequence
from rayinterp.tables import Committer, Tables
from tests.conftest import CONFIGS, planted_config
from tests.simulate.tiny_simulators import save_model

SEQUENCES = (
    TokenSequence(1, (" three", " years", " ago", ",")),
    TokenSequence(2, (" the", " navy", " of", " Spain", ".")),
)
CANDIDATE = [RuleRequest("the word 'ago'", SEQUENCES), RuleRequest("ships", SEQUENCES)]
NUM_PAIRS = len(SEQUENCES) * (2 + len(NULL_EXPLANATIONS))
RESOURCES = ServiceResources(num_cpus=0.1)


def tiny_config(folder, **changes) -> TransformersSimulatorConfig:
    return TransformersSimulatorConfig(model=save_model(folder), dtype="float32", num_few_shots=1, **changes)


def tiny_client(run_dir, arm, handle, committer) -> SimulatorClient:
    config = planted_config(run_dir).model_copy(update={"simulators": {"tiny": arm}})
    return SimulatorClient("tiny", config, Tables(str(run_dir)), committer, handle)


def assert_same(one: list[list[np.ndarray]], two: list[list[np.ndarray]]) -> None:
    for x, y in zip((a for answer in one for a in answer), (a for answer in two for a in answer), strict=True):
        np.testing.assert_array_equal(x, y)


def local_committer(tables: Tables) -> SimpleNamespace:
    """What a client needs of a `Committer` actor, in this process."""
    committer = Committer(tables)

    async def add(rows):
        committer.add(rows)
        committer.flush()

    return SimpleNamespace(add=SimpleNamespace(remote=add))


def local_handle(replica: SimulatorReplica) -> SimpleNamespace:
    return SimpleNamespace(answer=SimpleNamespace(remote=replica.answer))


async def test_what_a_deployed_simulator_has_answered_is_never_asked_again(ray_session, tmp_path):
    arm, tables = tiny_config(tmp_path / "model"), Tables(str(tmp_path / "run"))
    committer = ray.remote(Committer).options(num_cpus=0).remote(tables)
    handle = deploy_simulator("tiny", arm, RESOURCES, "simulator-tiny")
    assert deploy_simulator("tiny", arm, RESOURCES, "simulator-tiny") is not None  # it runs already, and is kept
    simulate = tiny_client(tmp_path / "run", arm, handle, committer).remembering()
    first, again = await simulate(CANDIDATE), await simulate(CANDIDATE[:1])
    ratings = await tiny_client(tmp_path / "run", arm, handle, committer).rate(["ships", "a hope"])
    assert [rating.shape for rating in ratings] == [(6,), (6,)]
    stats = await handle.stats.remote()
    assert serve.status().proxies == {}  # no port is opened
    await committer.flush.remote()
    assert stats["num_pairs"] == NUM_PAIRS == tables.count("simulations")
    assert_same(first[:1], again)

    resumed = tiny_client(tmp_path / "run", arm, handle, committer).remembering()
    assert_same(first, await resumed(CANDIDATE))
    assert (await handle.stats.remote())["num_pairs"] == NUM_PAIRS
    serve.delete("simulator-tiny")


async def test_calibrations_share_a_memo(tmp_path):
    arm, tables = tiny_config(tmp_path / "model"), Tables(str(tmp_path / "run"))
    ratio = arm.model_copy(update={"calibration": "ratio", "token_budget": 64, "num_features": 3})
    assert memo_id(arm) == memo_id(ratio)
    replica = SimulatorReplica("tiny", arm)
    for one in (arm, ratio):
        a_client = tiny_client(tmp_path / "run", one, local_handle(replica), local_committer(tables))
        await a_client.remembering()(CANDIDATE)
    assert (await replica.stats())["num_pairs"] == NUM_PAIRS == tables.count("simulations")


async def test_waiting_candidates_are_merged_up_to_a_number_of_tokens(tmp_path):
    replica = SimulatorReplica("words", LateInteractionConfig(embedder="embedded/minilm-l6"))
    answers = await asyncio.gather(*(replica.answer(CANDIDATE[: 1 + i % 2]) for i in range(6)))
    stats = await replica.stats()
    assert [len(answer) for answer in answers] == [1, 2] * 3
    assert stats["num_requests"] == 6 and stats["num_engine_calls"] < 6
    for answer in answers:
        for one, expected in zip(answer, answers[1], strict=False):
            for x, y in zip(one, expected, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5)

    large = [RuleRequest("ships", (TokenSequence(3, (" ship",) * (MERGED_TOKENS // 3)),))]
    before = stats["num_engine_calls"]
    await asyncio.gather(*(replica.answer(large) for _ in range(6)))
    assert (await replica.stats())["num_engine_calls"] == before + 2


async def test_a_candidate_that_nobody_waits_for_is_not_computed(tmp_path, monkeypatch):
    replica = SimulatorReplica("words", LateInteractionConfig(embedder="embedded/minilm-l6"))
    loop, engine_started, finish = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    compute = replica._compute

    def wait_for_the_test(requests):
        loop.call_soon_threadsafe(engine_started.set)
        asyncio.run_coroutine_threadsafe(finish.wait(), loop).result(timeout=30)
        return compute(requests)

    monkeypatch.setattr(replica, "_compute", wait_for_the_test)
    first = asyncio.ensure_future(replica.answer(CANDIDATE))
    await asyncio.wait_for(engine_started.wait(), 30)
    assert (await replica.stats())["num_requests"] == 0  # answered although the engine is busy
    second, third = (asyncio.ensure_future(replica.answer(CANDIDATE)) for _ in range(2))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    finish.set()
    assert int((await first)[0][0].argmax()) == 2
    await third
    assert second.cancelled()
    assert (await replica.stats())["num_pairs"] == 2 * 4


async def test_a_failing_candidate_fails_alone_and_an_engine_that_always_fails_is_replaced(tmp_path, monkeypatch):
    replica = SimulatorReplica("tiny", tiny_config(tmp_path / "model"))
    too_long = [RuleRequest("r", (TokenSequence(3, (" word",) * 1000),))]
    good, bad, also_good = await asyncio.gather(
        *(replica.answer(candidate) for candidate in (CANDIDATE, too_long, CANDIDATE)), return_exceptions=True
    )
    assert isinstance(bad, UserError)
    for one, two in zip(good, also_good, strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)
    replica.check_health()

    def lost_device(requests):
        raise RuntimeError("device lost")

    monkeypatch.setattr(replica, "_compute", lost_device)
    for _ in range(3):
        with pytest.raises(EngineError, match="RuntimeError: device lost"):
            await replica.answer(CANDIDATE)
    with pytest.raises(RuntimeError, match="failed 3 times"):
        replica.check_health()


class Flaky:
    """A handle whose first calls are lost."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls, self.answer = list(errors), 0, SimpleNamespace(remote=self._answer)

    async def _answer(self, requests):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return [[np.zeros((len(s.tokens), 6), np.float32) for s in r.sequences] for r in requests]


class Ill(Flaky):
    """A handle whose first answers hold no numbers."""

    async def _answer(self, requests):
        answers = await super()._answer(requests)
        return [[values + np.nan for values in answer] for answer in answers] if self.calls == 1 else answers


async def test_what_is_no_number_is_not_remembered(tmp_path):
    arm, tables = TransformersSimulatorConfig(model="m"), Tables(str(tmp_path / "run"))
    ill, committer = Ill(), local_committer(tables)
    simulate = tiny_client(tmp_path / "run", arm, ill, committer).remembering()
    for _ in range(2):  # one search is told the same throughout
        assert np.isnan(np.concatenate([values for answer in await simulate(CANDIDATE) for values in answer])).all()
    assert ill.calls == 1 and tables.count("simulations") == 0
    again = await tiny_client(tmp_path / "run", arm, ill, committer).remembering()(CANDIDATE)
    assert np.isfinite(np.concatenate([values for answer in again for values in answer])).all()
    assert ill.calls == 2 and tables.count("simulations") == NUM_PAIRS


async def test_what_is_no_number_in_the_table_is_asked_again(tmp_path):
    arm, tables = TransformersSimulatorConfig(model="m"), Tables(str(tmp_path / "run"))
    damaged = {"rule_hash": Rule("ships").hash, "sequence_id": 1, "log_probs": [float("nan")] * 24}
    tables.append("simulations", [{"simulator": memo_id(arm), **damaged}])
    answers = await tiny_client(tmp_path / "run", arm, Flaky(), local_committer(tables)).remembering()(CANDIDATE)
    assert np.isfinite(np.concatenate([values for answer in answers for values in answer])).all()


async def test_a_lost_request_is_sent_again_and_a_wrong_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(client, "ENGINE_PAUSE", 0.001)
    arm = TransformersSimulatorConfig(model="m")
    committer = local_committer(Tables(str(tmp_path)))

    async def ask(handle):
        return await tiny_client(tmp_path / "run", arm, handle, committer).remembering()(CANDIDATE)

    lost = ActorDiedError(), BackPressureError(0, 0), NodeDiedError(""), ObjectLostError("", None, "")
    flaky = Flaky(*lost, OutOfMemoryError("killed by the memory monitor"))
    assert len(await ask(flaky)) == 2 and flaky.calls == 6
    ill = Flaky(EngineError("device lost"))
    assert len(await ask(ill)) == 2 and ill.calls == 2
    worse = Flaky(*[EngineError("device lost")] * 9)
    with pytest.raises(EngineError, match="device lost"):
        await ask(worse)
    assert worse.calls == client.MAX_ENGINE_ATTEMPTS
    dead = Flaky(*[ActorDiedError()] * 99)
    with pytest.raises(UserError, match=f"{client.MAX_ATTEMPTS} attempts"):
        await ask(dead)
    wrong = Flaky(ValueError("no such rule"))
    with pytest.raises(ValueError, match="no such rule"):
        await ask(wrong)
    assert wrong.calls == 1


@pytest.mark.parametrize("num_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
async def test_replicas_that_are_killed_under_load_lose_no_request_and_change_no_answer(
    ray_session, tmp_path, num_kills
):
    """Whichever replica is there, while searches keep asking."""
    arm, app = LateInteractionConfig(embedder="embedded/minilm-l6"), "simulator-killed"
    handle = deploy_simulator("words", arm, ServiceResources(num_cpus=0.1, num_actors=2), app)
    a_client = tiny_client(tmp_path / "run", arm, handle, local_committer(Tables(str(tmp_path))))
    simulate = a_client.remembering()
    quiet = await simulate(CANDIDATE)
    done = asyncio.Event()
    answers: list[list[list[np.ndarray]]] = []

    async def search():
        while not done.is_set():
            answers.append(await simulate(CANDIDATE))

    searches = [asyncio.create_task(search()) for _ in range(8)]
    for _ in range(num_kills):
        before, pids = len(answers), []
        while not pids:
            await asyncio.sleep(0.05)
            titles = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
            pids = [pid for pid, title in titles.items() if title.startswith("ray::") and app in title]
        os.kill(pids[0], 9)
        while len(answers) < before + 20:
            await asyncio.sleep(0.05)
    done.set()
    await asyncio.gather(*searches)
    serve.delete(app)
    assert len(answers) >= 20 * num_kills
    for answer in answers:
        assert_same(answer, quiet)


def standing_config(run_dir, *overrides):
    """Runs of two directories whose one simulator stands across them."""
    simulator = ["simulators.words={engine: late_interaction, embedder: embedded/minilm-l6}"]
    return planted_config(run_dir, *simulator, "resources.standing=[words]", *overrides)


async def test_a_simulator_of_a_serve_config_is_found_by_every_run_and_outlives_it(ray_session, tmp_path):
    one, two = (standing_config(tmp_path / name) for name in ("one", "two"))
    app = service_name("simulator", "words", one)
    declared = {
        "name": app,
        "route_prefix": None,
        "import_path": "rayinterp.simulate.serve:build_simulator",
        "args": {
            "config": str(CONFIGS / "planted.yaml"),
            "overrides": ["simulators.words={engine: late_interaction, embedder: embedded/minilm-l6}"],
            "simulator": "words",
        },
    }
    serve.start(proxy_location="Disabled")
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [declared]}))
    while serve.status().applications[app].status != "RUNNING":  # the test's own time limit ends this
        assert serve.status().applications[app].status != "DEPLOY_FAILED", serve.status().applications[app].message
        await asyncio.sleep(0.5)
    handle = serve.get_app_handle(app)
    quiet = await handle.answer.remote(CANDIDATE)
    deployed_at = serve.status().applications[app].last_deployed_time_s

    for config in (one, two):
        run = Run(config, Tables(config.run_dir), None)  # type: ignore[arg-type]
        deploy(run, {"words", "oracle"}, set())
        a_client = SimulatorClient("words", config, run.tables, None)
        assert_same(await a_client.remembering()(CANDIDATE), quiet)
        own = service_name("simulator", "oracle", config)
        assert own in serve.status().applications
        stop_services(config)
        assert serve.status().applications[app].last_deployed_time_s == deployed_at
        ended = serve.status().applications.get(own)
        assert ended is None or ended.status == "DELETING"
    serve.delete(app)


def test_a_standing_simulator_needs_all_that_it_is_told_by():
    args = {"config": str(CONFIGS / "planted.yaml"), "simulator": "oracle"}
    assert build_simulator(args)._bound_deployment.ray_actor_options["num_gpus"] == 0
    with pytest.raises(ValueError, match="overides"):
        build_simulator({**args, "overides": []})
    with pytest.raises(UserError, match=r"resources\.standing is 'nobody'"):
        build_simulator({**args, "simulator": "nobody"})


def test_a_service_that_may_grow_is_steered_by_what_it_has_in_hand():
    assert replica_options(ServiceResources(num_actors=2))["num_replicas"] == 2
    grows = replica_options(ServiceResources(num_actors=0, max_actors=4, target_ongoing=3, idle_seconds=9))
    assert "num_replicas" not in grows
    assert grows["autoscaling_config"]["min_replicas"] == 0 and grows["autoscaling_config"]["max_replicas"] == 4
    assert grows["autoscaling_config"]["target_ongoing_requests"] == 3
    with pytest.raises(ValueError, match="nobody would answer"):
        ServiceResources(num_actors=0)


@pytest.mark.parametrize(
    "change", [{"revision": "a"}, {"dtype": "bfloat16"}, {"quantization": "8bit"}, {"num_few_shots": 2}, {"model": "m"}]
)
def test_a_memo_belongs_to_what_its_values_depend_on(change):
    config = TransformersSimulatorConfig(model="model", num_few_shots=1)
    assert memo_id(config) != memo_id(config.model_copy(update=change))
    assert memo_id(config).startswith("model@")
    assert memo_id(config) != memo_id(VllmSimulatorConfig(model="model", num_few_shots=1))
    for how in ({"token_budget": 7}, {"calibration": "none"}, {"attn_implementation": "eager"}, {"max_pairs": 3}):
        assert memo_id(config) == memo_id(config.model_copy(update=how))


def test_simulations_read_back_as_they_were_written(tmp_path):
    tables = Tables(str(tmp_path))
    values = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float16)
    rule = Rule("ships").hash
    rows = [{"simulator": "s@1", "rule_hash": rule, "sequence_id": i, "log_probs": v} for i, v in enumerate(values)]
    others = [{**rows[0], "simulator": "other@1", "log_probs": values[1][:6]}, {**rows[0], "rule_hash": "another rule"}]
    tables.append("simulations", [*rows, *others])
    asked = [RuleRequest("ships", tuple(TokenSequence(i, ("a", "b")) for i in (0, 1, 9)))]
    read = dict(read_simulations(tables, "s@1", asked))
    assert [(key.rule_hash, key.sequence_id) for key in read] == [(rule, 0), (rule, 1)]
    for key, log_probs in read.items():
        np.testing.assert_array_equal(log_probs, values[key.sequence_id])
    assert not list(read_simulations(tables, "absent@1", asked))


@pytest.mark.slow
async def test_a_service_grows_from_nothing_with_demand_and_goes_away_without_it(ray_session):
    app = "simulator-scaling"
    resources = ServiceResources(
        num_cpus=0.1, num_actors=0, max_actors=2, target_ongoing=1, upscale_seconds=0, idle_seconds=4
    )

    def replicas():
        (deployment,) = serve.status().applications[app].deployments.values()
        return deployment.replica_states.get("RUNNING", 0)

    handle = deploy_simulator("words", LateInteractionConfig(embedder="embedded/minilm-l6"), resources, app)
    assert replicas() == 0
    trace = []

    async def watch():
        while True:
            trace.append(replicas())
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    many = [
        RuleRequest(f"words about subject {i}", tuple(s._replace(sequence_id=i) for s in SEQUENCES)) for i in range(400)
    ]
    answers = await asyncio.gather(*(handle.answer.remote([request]) for request in many))
    assert [len(answer[0]) for answer in answers] == [len(SEQUENCES)] * len(many)
    while replicas():
        await asyncio.sleep(0.5)  # the test's own time limit ends this
    watching.cancel()
    assert max(trace) == 2 and trace[0] == 0
    serve.delete(app)


async def test_losses_are_computed_in_turn_with_candidates_and_not_merged_with_them(tmp_path):
    from rayinterp.simulate.transformers import TransformersSimulator

    arm = tiny_config(tmp_path / "model")
    replica = SimulatorReplica("tiny", arm)
    answers = await asyncio.gather(
        replica.answer(CANDIDATE), replica.token_losses(CANDIDATE), replica.token_losses(CANDIDATE[:1])
    )
    assert (await replica.stats())["num_engine_calls"] == 2  # the two for losses are one
    engine = TransformersSimulator(arm.model, dtype="float32", num_few_shots=1)
    for found, expected in zip(
        answers, (engine.log_probs(CANDIDATE), *map(engine.token_losses, (CANDIDATE, CANDIDATE[:1]))), strict=True
    ):
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-3)
    late = SimulatorReplica("late", LateInteractionConfig(embedder="embedded/minilm-l6"))
    with pytest.raises(UserError, match="gives no losses"):
        await late.token_losses(CANDIDATE)


async def test_a_replica_rates_in_the_thread_that_simulates(tmp_path):
    arm = tiny_config(tmp_path / "model")
    replica = SimulatorReplica("tiny", arm)
    handle = SimpleNamespace(answer=SimpleNamespace(remote=replica.answer), rate=SimpleNamespace(remote=replica.rate))
    a_client = tiny_client(tmp_path / "run", arm, handle, local_committer(Tables(str(tmp_path / "run"))))
    texts = ["ships", "the word 'ago'"]
    rated, _ = await asyncio.gather(a_client.rate(texts), a_client.remembering()(CANDIDATE))
    engine = replica._engine
    for one, two in zip(rated, engine.rate(texts), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)

    def fails(texts):
        raise RuntimeError("device lost")

    replica._engine = SimpleNamespace(rate=fails)
    for _ in range(3):
        with pytest.raises(EngineError, match="device lost"):
            await replica.rate(texts)
    with pytest.raises(RuntimeError, match="3 times in a row"):
        replica.check_health()
