"""Every fault that a cluster is known for, struck once in the middle of a stage: whether the stage goes on by itself or
ends and is started again, its tables are those of the undisturbed run. `make test-faults`; docs/faults.md has what
came of each."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayinterp.run import STAGES
from rayinterp.tables import Tables
from tests.conftest import copy_upstream
from tests.explain.faulty_endpoint import faulty_endpoint
from tests.faults.disturbed import FAULTS
from tests.s3_server import s3_server
from tests.tables_equal import assert_tables_equal

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

HARVESTED = ("activations", "saes", "features", "records", "record_counts", "holistic")
"""What is made again where the harvest is struck; what it reads, and the embeddings, are copied."""
FOUND = ("candidates", "explanations", "llm_calls", "test_records", "scores", "predictions", "complexity")
ENDS = {
    "driver in harvest": "signal 9",
    "driver in explain": "signal 9",
    "raylet of the head": "",
    "committer of rows": "stage explain lost a process that it cannot go on without",
}
"""Faults that end the run, and a part of how it says so; the others it outlives. The head takes its driver along, whose
last words are Ray's."""
MAX_RUNS = 4
PAGE, PAGES_LEFT = 4096, 30
"""Bytes that a file system in memory gives at a time, and how many of them are left: some commits' worth."""
OUR_ERROR, OUR_LINES = "rayinterp.errors.UserError", ("struck", "Spilled")
"""Among what Ray writes to the same places."""
RESULTS = Path("build") / "faults.json"


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, dict[str, object]]]:
    """What came of each fault, for the docs."""
    found: dict[str, dict[str, object]] = {}
    yield found
    RESULTS.parent.mkdir(exist_ok=True)
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(earlier | found, indent=2))


def start(folder: str, fault: str, stages: list[str], **environment: str) -> subprocess.Popen[str]:
    """A driver with a cluster of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.faults.disturbed", folder, fault, *stages]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=kept | environment, start_new_session=True, text=True, **pipes)


def end(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str, str]:
    """Its code, what it printed, and how it says that it ended; one that hangs is killed with its cluster."""
    try:
        printed, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, said = process.communicate()
        said += "\nhung, and was killed"
    lines = [line for line in said.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(OUR_ERROR)]  # Ray's own log may have the last word
    return process.returncode, printed, (errors or lines or [""])[-1]


def recover(folder: str, fault: str, stages: list[str], **environment: str) -> dict[str, object]:
    """Runs with the fault, then without it until it comes to its end; what happened."""
    began = time.monotonic()
    code, printed, said = end(start(folder, fault, stages, **environment))
    assert fault == "none" or "struck" in printed, said
    outcome: dict[str, object] = {"printed": [one for one in printed.splitlines() if one.startswith(OUR_LINES)]}
    ended = []
    while code != 0:
        ended.append(f"signal {-code}" if code < 0 else said)
        assert len(ended) < MAX_RUNS, ended
        code, _, said = end(start(folder, "none", stages, **environment))
    return outcome | {"ended": ended, "seconds": round(time.monotonic() - began)}


@pytest.mark.parametrize("fault", FAULTS)
def test_tables_are_those_of_the_undisturbed_run(fault, planted_run, tmp_path, outcomes):
    folder = copy_upstream(planted_run, tmp_path / "run")
    tables, begins = Tables(str(folder)), FAULTS[fault][0]
    if begins == "harvest":
        for name in HARVESTED:
            tables.drop(name)
    outcomes[fault] = recover(str(folder), fault, list(STAGES[STAGES.index(begins) :]))
    ended = outcomes[fault]["ended"]
    assert len(ended) == (fault in ENDS) and all(ENDS[fault] in said for said in ended), ended
    compared = [*(HARVESTED if begins == "harvest" else ()), *FOUND]
    assert_tables_equal(planted_run.tables, tables, compared)
    if fault == "object store full":
        assert any("Spilled" in line for line in outcomes[fault]["printed"])


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    """A file system of that size, where this machine lets us make one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("begins", ["harvest", "explain"])
def test_a_full_disk_is_one_sentence_and_more_room_goes_on(begins, planted_run, tmp_path, outcomes):
    copied = copy_upstream(planted_run, tmp_path / "copied")
    if begins == "harvest":
        for name in HARVESTED:
            Tables(str(copied)).drop(name)
    used = sum(-(-path.stat().st_size // PAGE) for path in copied.rglob("*") if path.is_file())
    disk = tmp_path / "disk"
    with small_disk(disk, (used + PAGES_LEFT) * PAGE):
        subprocess.run(["cp", "-r", str(copied), str(disk / "run")], check=True)
        stages = list(STAGES[STAGES.index(begins) :])
        began = time.monotonic()
        code, _, said = end(start(str(disk / "run"), "none", stages))
        assert code != 0 and "no space left" in said.lower(), said
        assert "is kept" in said and "run the same command again" in said
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        code, _, again = end(start(str(disk / "run"), "none", stages))
        assert code == 0, again
        outcomes[f"disk full in {begins}"] = {"ended": [said], "seconds": round(time.monotonic() - began)}
        compared = [*(HARVESTED if begins == "harvest" else ()), *FOUND]
        assert_tables_equal(planted_run.tables, Tables(str(disk / "run")), compared)


def in_bucket(monkeypatch, environment: dict[str, str], folder: Path, bucket: str) -> str:
    """Copies a run directory into a bucket, each test its own: Lance keeps a bucket's endpoint for good."""
    import s3fs

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir(bucket)
    filesystem.put(str(folder), f"{bucket}/run", recursive=True)
    return f"s3://{bucket}/run"


def test_on_s3_stages_run_side_by_side_and_outlive_a_committer(planted_run, tmp_path, outcomes, monkeypatch):
    folder = copy_upstream(planted_run, tmp_path / "run")
    for name in (*HARVESTED, "embeddings"):
        Tables(str(folder)).drop(name)
    with s3_server() as environment:
        url = in_bucket(monkeypatch, environment, folder, "committed")
        beside = start(url, "none", ["index"], **environment)
        outcome = recover(url, "fragment committer", ["harvest"], **environment)
        code, _, said = end(beside)
        assert code == 0, said
        rest = recover(url, "none", list(STAGES[3:]), **environment)
        assert outcome["ended"] == rest["ended"] == []
        outcomes["on S3: fragment committer, index beside harvest"] = outcome
        assert_tables_equal(planted_run.tables, Tables(url), [*HARVESTED, "embeddings", *FOUND])


def test_an_s3_that_refuses_one_request_in_ten(planted_run, tmp_path, outcomes, monkeypatch):
    folder, refused = copy_upstream(planted_run, tmp_path / "run"), []
    for name in HARVESTED:
        Tables(str(folder)).drop(name)
    with s3_server(0.1, refused) as environment:
        url = in_bucket(monkeypatch, environment, folder, "refusing")
        outcome = recover(url, "none", list(STAGES[1:]), **environment)
        assert outcome["ended"] == []
        assert_tables_equal(planted_run.tables, Tables(url), [*HARVESTED, *FOUND])
    assert len(refused) > 50
    outcomes["S3 refuses a tenth of all requests"] = outcome | {"printed": [f"{len(refused)} requests refused"]}


def rule_for(body: dict[str, object]) -> str:
    """The same to the same request."""
    rules = ("citrus fruits", "words about ships and the sea", "bowed string instruments")
    return json.dumps([{"activates_on": rules[len(str(body)) % 3], "strength": 4}])


def test_an_endpoint_that_is_down_for_a_while(planted_run, tmp_path, outcomes):
    """On a clock of twenty times the speed: between two attempts is a second, and five minutes are fifteen seconds."""
    arms = "explainers={tree: {method: tree, llm: remote, simulator: oracle, num_llm_roots: 3, depth: 4}}"
    stages, undisturbed = ["explain", "score"], Tables(str(copy_upstream(planted_run, tmp_path / "undisturbed")))
    disturbed = Tables(str(copy_upstream(planted_run, tmp_path / "run")))
    down, seen = threading.Event(), []
    with faulty_endpoint(0, 0.0, rule_for, seen=seen, down=down) as url:
        llm = f"llms.remote={{provider: openai, model: m, base_url: '{url}', max_retries: 1, api_key_env: A_KEY}}"
        environment = {"RAYINTERP_TEST_OVERRIDES": f"{llm};{arms}", "A_KEY": "sk-1"}
        code, _, said = end(start(undisturbed.root, "none", stages, **environment))
        assert code == 0, said
        seen.clear()
        began, process = time.monotonic(), start(disturbed.root, "none", stages, **environment)
        while len(seen) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        down.set()
        time.sleep(15)
        down.clear()
        code, _, said = end(process)
        assert code == 0, said
    refused = sum(fault == "server_error" for fault, _ in seen)
    assert refused > 5
    printed = [f"{refused} calls refused in 15 s"]
    outcomes["LLM endpoint down"] = {"printed": printed, "ended": [], "seconds": round(time.monotonic() - began)}
    assert_tables_equal(undisturbed, disturbed, ["explanations", "candidates", "llm_calls", "scores"])
