"""SIGKILL in the middle of searches: tables as if nothing had been, and no call paid twice that was remembered."""

import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from rayinterp.tables import Tables
from tests.conftest import copy_upstream
from tests.explain.kill_explain import COMPARED, explain
from tests.tables_equal import assert_tables_equal


class Kill(NamedTuple):
    num_answers: int
    """Answered and billed by then."""
    durable: set[str]
    """What the ledger held."""


def bill(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def ledger(folder: Path) -> set[str]:
    return set(Tables(str(folder)).read("llm_calls", ["request_hash"])["request_hash"].to_pylist())


def wait_for(log: Path, num_answers: int, alive=lambda: True) -> None:
    deadline = time.monotonic() + 300
    while len(bill(log)) < num_answers:
        assert alive() and time.monotonic() < deadline, f"{len(bill(log))} answers, waited for {num_answers}"
        time.sleep(0.02)


def search_actor(driver: psutil.Process) -> psutil.Process:
    """Of this driver: tests beside it have actors of the same name."""
    for process in driver.children(recursive=True):
        with suppress(psutil.Error):  # it may have ended meanwhile
            if " ".join(process.cmdline()).startswith("ray::SearchActor"):
                return process
    raise LookupError("no search actor")


def paid_again(log: Path, kills: list[Kill]) -> int:
    """Calls billed twice; each must have been answered before a kill at which the ledger did not hold it."""
    billed = defaultdict(list)
    for place, request in enumerate(bill(log)):
        billed[request].append(place)
    for request, places in billed.items():
        for first, second in pairwise(places):
            assert any(first < kill.num_answers <= second and request not in kill.durable for kill in kills), (
                f"{request} was answered at {first} and again at {second}, kills {[k.num_answers for k in kills]}"
            )
    return sum(len(places) - 1 for places in billed.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five drivers are started
def test_killed_ten_times_driver_and_search_actors_in_turn(planted_run, tmp_path):
    depth = 12  # an actor takes seconds to die and be replaced, and the searches go on: there must be enough for ten
    undisturbed = explain(copy_upstream(planted_run, tmp_path / "undisturbed"), tmp_path / "undisturbed.log", depth)
    folder, log, rng = copy_upstream(planted_run, tmp_path / "run"), tmp_path / "run.log", random.Random(0)
    # A cluster of its own for each driver: the session's must outlive it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.explain.kill_explain", str(folder), str(log), str(depth)]
    kills: list[Kill] = []
    while True:
        driver = psutil.Popen(command, env=environment, start_new_session=True)
        try:
            while len(kills) < 10:
                wait_for(log, len(bill(log)) + rng.randint(3, 6), lambda driver=driver: driver.poll() is None)
                time.sleep(rng.uniform(0, 0.5))
                of_actor = len(kills) % 2 == 1
                if of_actor:
                    search_actor(driver).send_signal(signal.SIGKILL)
                else:
                    its_cluster = driver.children(recursive=True)
                    os.killpg(driver.pid, signal.SIGKILL)
                    driver.wait()
                    _, alive = psutil.wait_procs(its_cluster, timeout=60)
                    assert not alive, "the cluster outlived its driver"
                kills.append(Kill(len(bill(log)), ledger(folder)))
                if not of_actor:
                    break
            else:
                assert driver.wait(timeout=300) == 0
                break
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
    assert_tables_equal(undisturbed, Tables(str(folder)), COMPARED)
    answers = undisturbed.count("llm_calls")
    assert len(bill(log)) == answers + paid_again(log, kills)
    assert paid_again(log, kills) < answers, "more was lost than kept"


def test_a_search_actor_that_is_killed_is_started_anew_and_pays_for_nothing_twice(planted_run, tmp_path):
    undisturbed = explain(copy_upstream(planted_run, tmp_path / "undisturbed"), tmp_path / "undisturbed.log")
    folder, log, kills = copy_upstream(planted_run, tmp_path / "run"), tmp_path / "run.log", []

    def kill() -> None:
        wait_for(log, 12)
        search_actor(psutil.Process()).send_signal(signal.SIGKILL)
        kills.append(Kill(len(bill(log)), ledger(folder)))

    killer = threading.Thread(target=kill)
    killer.start()
    tables = explain(folder, log)
    killer.join()
    assert len(kills) == 1
    assert paid_again(log, kills) <= 6, "more than what was on its way when the kill came: two proposals a feature"
    assert_tables_equal(undisturbed, tables, COMPARED)
    assert len(bill(log)) == tables.count("llm_calls") + paid_again(log, kills)
