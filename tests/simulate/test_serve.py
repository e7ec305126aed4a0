"""The deployed simulator: merged calls, and a memo that outlives the replica."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray import serve

from rayinterp.config import LateInteractionConfig, StageResources, TransformersSimulatorConfig
from rayinterp.errors import UserError
from rayinterp.simulate.serve import SimulatorReplica, deploy_simulator, memo_id, read_simulations
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, RuleRequest, TokenSequence
from rayinterp.tables import Committer, Tables
from tests.simulate.tiny_simulators import save_model

SEQUENCES = (
    TokenSequence(1, (" three", " years", " ago", ",")),
    TokenSequence(2, (" the", " navy", " of", " Spain", ".")),
)
CANDIDATE = [RuleRequest("the word 'ago'", SEQUENCES), RuleRequest("ships", SEQUENCES)]
NUM_PAIRS = len(SEQUENCES) * (2 + len(NULL_EXPLANATIONS))


def tiny_config(folder, **changes) -> TransformersSimulatorConfig:
    return TransformersSimulatorConfig(model=save_model(folder), dtype="float32", num_few_shots=1, **changes)


def assert_same(one: list[list[np.ndarray]], two: list[list[np.ndarray]]) -> None:
    for x, y in zip((a for answer in one for a in answer), (a for answer in two for a in answer), strict=True):
        np.testing.assert_array_equal(x, y)


async def test_a_deployed_simulator_leaves_nothing_to_compute_twice(ray_session, tmp_path):
    config, tables = tiny_config(tmp_path / "model"), Tables(str(tmp_path / "run"))
    committer = ray.remote(Committer).options(num_cpus=0).remote(tables)
    handle = deploy_simulator("tiny", config, StageResources(num_cpus=0.1), tables, committer)
    first, again = await asyncio.gather(*(handle.simulate.remote(CANDIDATE) for _ in range(2)))
    stats = await handle.stats.remote()
    serve.delete("simulator-tiny")
    await committer.flush.remote()
    assert stats["num_requests"] == 2
    assert stats["num_pairs_simulated"] == NUM_PAIRS == tables.count("simulations")
    assert_same(first, again)

    resumed = SimulatorReplica(config, memo_id("tiny", config), tables)
    assert_same(first, await resumed.simulate(CANDIDATE))
    stats = await resumed.stats()
    assert stats["num_pairs_simulated"] == 0
    assert stats["num_pairs_remembered"] == NUM_PAIRS


def local_committer(tables: Tables) -> SimpleNamespace:
    """What a replica needs of a `Committer` actor, in this process."""
    committer = Committer(tables)

    async def add(rows):
        committer.add(rows)
        committer.flush()

    return SimpleNamespace(add=SimpleNamespace(remote=add))


async def test_waiting_candidates_are_merged_and_simulated_once(tmp_path):
    config, tables = tiny_config(tmp_path / "model"), Tables(str(tmp_path / "run"))
    replica = SimulatorReplica(config, memo_id("tiny", config), tables, local_committer(tables))
    answers = await asyncio.gather(*(replica.simulate(CANDIDATE[: 1 + i % 2]) for i in range(6)))
    stats = await replica.stats()
    assert [len(answer) for answer in answers] == [1, 2] * 3
    assert stats["num_requests"] == 6
    assert stats["num_engine_calls"] < 6
    assert stats["num_pairs_simulated"] == NUM_PAIRS == tables.count("simulations")
    for answer in answers:
        assert_same(answer, answers[1][: len(answer)])


async def test_the_event_loop_is_free_while_the_engine_computes(tmp_path, monkeypatch):
    config = LateInteractionConfig(embedder="embedded/minilm-l6")
    replica = SimulatorReplica(config, memo_id("words", config), Tables(str(tmp_path)))
    loop, engine_started, finish = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    simulate = replica._simulator.simulate

    def wait_for_the_test(requests):
        loop.call_soon_threadsafe(engine_started.set)
        asyncio.run_coroutine_threadsafe(finish.wait(), loop).result(timeout=30)
        return simulate(requests)

    monkeypatch.setattr(replica._simulator, "simulate", wait_for_the_test)
    answer = asyncio.ensure_future(replica.simulate(CANDIDATE))
    await asyncio.wait_for(engine_started.wait(), 30)
    assert (await replica.stats())["num_requests"] == 0  # answered although the engine is busy
    finish.set()
    assert int((await answer)[0][0].argmax()) == 2
    assert (await replica.stats())["num_pairs_simulated"] == 4


async def test_a_failing_candidate_fails_alone(tmp_path):
    config = tiny_config(tmp_path / "model")
    replica = SimulatorReplica(config, memo_id("tiny", config), Tables(str(tmp_path)))
    too_long = [RuleRequest("r", (TokenSequence(3, (" word",) * 1000),))]
    good, bad, also_good = await asyncio.gather(
        *(replica.simulate(candidate) for candidate in (CANDIDATE, too_long, CANDIDATE)), return_exceptions=True
    )
    assert isinstance(bad, UserError)
    assert_same(good, also_good)


async def test_calibrations_share_a_memo(tmp_path):
    config, tables = tiny_config(tmp_path / "model"), Tables(str(tmp_path / "run"))
    ratio = config.model_copy(update={"calibration": "ratio", "token_budget": 64, "num_features": 3})
    assert memo_id("tiny", config) == memo_id("tiny", ratio)
    await SimulatorReplica(config, memo_id("tiny", config), tables, local_committer(tables)).simulate(CANDIDATE)
    replica = SimulatorReplica(ratio, memo_id("tiny", ratio), tables)
    await replica.simulate(CANDIDATE)
    assert (await replica.stats())["num_pairs_simulated"] == 0


@pytest.mark.parametrize(
    "change", [{"revision": "a"}, {"dtype": "bfloat16"}, {"quantization": "8bit"}, {"num_few_shots": 2}, {"model": "m"}]
)
def test_a_memo_belongs_to_what_its_values_depend_on(change):
    config = TransformersSimulatorConfig(model="model", num_few_shots=1)
    assert memo_id("tiny", config) != memo_id("tiny", config.model_copy(update=change))
    assert memo_id("tiny", config).startswith("tiny@")


def test_simulations_read_back_as_they_were_written(tmp_path):
    tables = Tables(str(tmp_path))
    values = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float16)
    rows = [{"simulator": "s@1", "rule_hash": "r", "sequence_id": i, "log_probs": v} for i, v in enumerate(values)]
    tables.append("simulations", [*rows, {**rows[0], "simulator": "other@1", "log_probs": values[1][:6]}])
    read = dict(read_simulations(tables, "s@1"))
    assert [(key.rule_hash, key.sequence_id) for key in read] == [("r", 0), ("r", 1)]
    for key, log_probs in read.items():
        np.testing.assert_array_equal(log_probs, values[key.sequence_id])
    assert not list(read_simulations(tables, "absent@1"))
