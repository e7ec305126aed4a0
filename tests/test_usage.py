import errno
import json
import subprocess
import sys
import threading

import pytest

import rayinterp.usage
from rayinterp.config import BudgetConfig, PoolResources, arm_id, differing_fields, load_config, parse_config
from rayinterp.errors import UserError
from rayinterp.explain.runner import dollars_spent
from rayinterp.run import absolute, freeze, open_run, run_stage, service_gpus
from rayinterp.tables import FragmentCommitter, Tables
from rayinterp.usage import LOCK, Meter, Spent, exceeded, read_manifest, update_manifest, usage_of
from tests.conftest import CONFIGS, planted_config


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def spent_by(folder, stage):
    return usage_of(read_manifest(str(folder)))[stage]


def test_seconds_and_gpu_hours_add_up_over_resumptions(tmp_path):
    config, clock, serving = planted_config(tmp_path), Clock(), [0.0]
    for _ in range(2):
        with Meter(config, "harvest", lambda: serving[0], clock) as meter:
            clock.now += 1800
            with meter.holds(PoolResources(num_actors=2, max_actors=4, num_gpus=0.5)):
                clock.now += 3600
            clock.now += 1800
    assert spent_by(tmp_path, "harvest") == Spent(2 * 7200, 2 * 2.0)
    serving[0] = 3.0
    with Meter(config, "score", lambda: serving[0], clock) as meter:
        clock.now += 720
        assert meter.spent() == Spent(2 * 7200 + 720, pytest.approx(4.6))
    assert spent_by(tmp_path, "score") == Spent(720, 0.6)
    assert spent_by(tmp_path, "harvest") == Spent(2 * 7200, 4.0)


def test_services_that_do_not_answer_count_as_they_last_did(tmp_path):
    clock, answers = Clock(), [2.0, None]
    meter = Meter(planted_config(tmp_path), "explain", lambda: answers.pop(0), clock)
    for _ in range(2):
        clock.now += 1800
        meter.save()
    assert spent_by(tmp_path, "explain") == Spent(3600, 2.0)


def test_a_kill_loses_little(tmp_path, monkeypatch):
    monkeypatch.setattr(rayinterp.usage, "SAVE_SECONDS", 0.01)
    saved, clock = threading.Event(), Clock()

    def gpus() -> float:
        clock.now += 60
        return 0.0

    def update(*args) -> None:
        update_manifest(*args)
        saved.set()

    monkeypatch.setattr(rayinterp.usage, "update_manifest", update)
    meter = Meter(planted_config(tmp_path), "explain", gpus, clock)
    with meter:
        assert saved.wait(10)
        assert spent_by(tmp_path, "explain").seconds >= 60  # with the stage still running


def test_a_store_that_does_not_answer_does_not_end_the_account(tmp_path, monkeypatch):
    """Whatever its client raises, which with S3 is no OSError."""
    monkeypatch.setattr(rayinterp.usage, "SAVE_SECONDS", 0.01)
    answers, saved = [RuntimeError("no endpoint")] * 3, threading.Event()

    def update(*args) -> None:
        if answers:
            raise answers.pop()
        saved.set()

    monkeypatch.setattr(rayinterp.usage, "update_manifest", update)
    with Meter(planted_config(tmp_path), "explain", clock=Clock()):
        assert saved.wait(10)


def test_two_drivers_lose_nothing_of_each_others_account(tmp_path):
    code = (
        "import sys, time; from rayinterp.usage import update_manifest\n"
        "for number in range(40):\n"
        "    update_manifest(sys.argv[1], lambda m: m.setdefault(sys.argv[2], []).append(number) or time.sleep(0.002))"
    )
    drivers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("harvest", "index")]
    assert [driver.wait(timeout=60) for driver in drivers] == [0, 0]
    assert read_manifest(str(tmp_path)) == {"harvest": list(range(40)), "index": list(range(40))}


def test_an_error_is_counted_too(tmp_path):
    clock = Clock()
    with pytest.raises(ZeroDivisionError), Meter(planted_config(tmp_path), "index", clock=clock):
        clock.now += 5
        raise ZeroDivisionError
    assert spent_by(tmp_path, "index").seconds == 5


def test_the_manifest_is_replaced_whole(tmp_path):
    update_manifest(str(tmp_path), lambda manifest: manifest.update(a=1))
    update_manifest(str(tmp_path), lambda manifest: manifest.update(b=2))
    assert read_manifest(str(tmp_path)) == {"a": 1, "b": 2}
    with pytest.raises(TypeError):
        update_manifest(str(tmp_path), lambda manifest: manifest.update(c=object()))
    assert read_manifest(str(tmp_path)) == {"a": 1, "b": 2}
    assert {path.name for path in tmp_path.iterdir()} - {LOCK} == {"manifest.json"}


@pytest.mark.parametrize(
    ("budget", "usd", "says"),
    [
        ({}, 1e9, None),
        ({"max_usd": 5}, 4.99, None),
        ({"max_usd": 5}, 5.0, "budget.max_usd is 5, and 5 dollars"),
        ({"max_usd": 5, "usd_per_gpu_hour": 2}, 1.5, "budget.max_usd is 5, and 5.5 dollars"),
        ({"max_gpu_hours": 2}, 0, "budget.max_gpu_hours is 2, and 2 GPU-hours"),
        ({"max_hours": 1.5}, 0, None),
        ({"max_hours": 0.5}, 0, "budget.max_hours is 0.5, and 1 hours"),
        ({"max_hours": 0}, 0, "raise budget.max_hours and run the same command again"),
    ],
)
def test_the_first_limit_that_is_reached_is_named(budget, usd, says):
    reason = exceeded(BudgetConfig(**budget), Spent(3600, 2.0), usd)
    assert (reason is None) if says is None else (says in reason and "nothing that is computed is lost" in reason)


def test_a_stage_stops_when_the_budget_is_spent_and_something_is_left(tmp_path):
    config, clock, seen = planted_config(tmp_path, "budget.max_hours=1"), Clock(), []

    def progress(done, total, note=""):
        seen.append((done, total))

    meter = Meter(config, "harvest", clock=clock)
    told = meter.within_budget(progress, 0.0)
    told(1, 3)
    clock.now += 3600
    with pytest.raises(UserError, match=r"harvest stopped at 2 of 3: budget\.max_hours is 1"):
        told(2, 3)
    told(3, 3)  # what is finished is never in the way of the stages behind it
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for stage in ("explain", "score", "report"):
        Meter(config, stage, clock=clock).within_budget(progress, 0.0)(0, 3)


def test_over_budget_knows_what_the_caller_has_spent_and_earlier_stages(tmp_path):
    config, clock = planted_config(tmp_path, "budget={max_usd: 10, usd_per_gpu_hour: 4}"), Clock()
    with Meter(config, "harvest", clock=clock) as meter, meter.holds(PoolResources(num_gpus=2)):
        clock.now += 3600  # 2 GPU-hours: 8 dollars
    meter = Meter(config, "explain", clock=clock)
    assert meter.over_budget(1.99) is None
    assert "max_usd" in meter.over_budget(2.0)


def test_dollars_without_a_price_are_refused(tmp_path):
    llm = {"provider": "openai", "model": "w"}
    data = load_config(CONFIGS / "planted.yaml").model_dump(mode="json")
    data["llms"]["knows"] = llm
    data["budget"] = {"max_usd": 3}
    with pytest.raises(UserError, match=r"budget\.max_usd is 3, but what llms\.knows costs"):
        parse_config(data)
    data["llms"]["knows"] = {**llm, "usd_per_million_prompt_tokens": 1, "usd_per_million_completion_tokens": 1}
    assert parse_config(data).budget.max_usd == 3


def test_the_budget_is_no_part_of_what_a_run_computes():
    overrides = ["budget={max_usd: 3, max_hours: 1, usd_per_gpu_hour: 2}", "resources.gpu_tflops=990"]
    one, two = (load_config(CONFIGS / "planted.yaml", o) for o in ([], overrides))
    assert differing_fields(one.model_dump(mode="json"), two.model_dump(mode="json")) == []
    assert arm_id("tree", one.explainers["tree"]) == arm_id("tree", two.explainers["tree"])


def test_services_without_gpus_are_not_asked_about():
    assert service_gpus(load_config(CONFIGS / "demo.yaml")) == 0.0


def test_a_run_says_what_it_took_and_what_was_expected(planted_run):
    manifest = read_manifest(planted_run.config.run_dir)
    usage, stages = usage_of(manifest), ("corpus", "harvest", "index", "records", "explain", "score")
    assert [*usage] == [*stages, "report"]
    assert all(spent.seconds > 0 and spent.gpu_hours == 0 for spent in usage.values())
    assert [*manifest["estimate"]] == [*stages]
    assert manifest["estimate"]["explain"]["llm_calls"] > 0
    assert dollars_spent(planted_run.tables) == 0.0
    json.dumps(manifest, allow_nan=False)


def test_a_run_whose_budget_is_spent_stops_and_goes_on_when_it_is_raised(tmp_path, ray_session, monkeypatch):
    spent = planted_config(tmp_path / "run", "corpus.num_sequences=400", "corpus.shard_size=100")
    run_stage(open_run(spent), "corpus")
    stingy = spent.model_copy(update={"budget": BudgetConfig(max_hours=0)})
    assert run_stage(open_run(stingy), "corpus")["sequences"] == 400  # nothing left to do
    with pytest.raises(UserError, match=r"harvest stopped at \d of 4: budget\.max_hours is 0"):
        run_stage(open_run(stingy), "harvest")
    before = spent_by(tmp_path / "run", "harvest")
    tables, looks = Tables(absolute(spent.run_dir)), iter([None, "spent", "spent"])

    class AtOnce(FragmentCommitter):
        def add(self, unit, fragments):
            return self.flush({unit: fragments})

    with monkeypatch.context() as patch:
        patch.setattr("rayinterp.tables.FragmentCommitter", AtOnce)
        patch.setattr(Meter, "over_budget", lambda meter, usd: next(looks))
        with pytest.raises(UserError, match=r"harvest stopped at \d of 4: spent"):
            run_stage(open_run(spent), "harvest")
    kept = tables.finished_units("activations")
    assert 1 <= len(kept) < 4
    run_stage(open_run(spent), "harvest")
    assert (tables.count("features"), len(tables.finished_units("activations"))) == (6, 4)
    assert spent_by(tmp_path / "run", "harvest").seconds > before.seconds


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    update_manifest(str(tmp_path), lambda manifest: manifest.update(stages={"corpus": 1}))

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rayinterp.usage.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            update_manifest(str(tmp_path), lambda manifest: manifest.update(stages={}))
    assert read_manifest(str(tmp_path)) == {"stages": {"corpus": 1}}
    assert {path.name for path in tmp_path.iterdir()} - {LOCK} == {"manifest.json"}


def test_run_yaml_is_left_alone_where_nothing_changed_and_one_that_is_damaged_is_named(tmp_path, monkeypatch):
    freeze(planted_config(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(rayinterp.usage.os, "replace", None)
        freeze(planted_config(tmp_path))
    freeze(planted_config(tmp_path, "name=another"))
    assert "name: another" in (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UserError, match=r"run\.yaml is damaged: it holds no settings"):
        freeze(planted_config(tmp_path))
