import json
import subprocess
import sys

import pytest

from tests.conftest import CONFIGS


def rayinterp(*arguments):
    command = [sys.executable, "-c", "from rayinterp.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", ["run", "corpus", "harvest", "index", "records", "explain", "score", "report"])
def test_a_users_mistake_is_one_message_without_a_traceback(stage, tmp_path):
    result = rayinterp(stage, str(CONFIGS / "planted.yaml"), f"run_dir={tmp_path}", "corpus.shard_sise=1")
    assert result.returncode == 2
    assert "did you mean 'shard_size'" in result.stderr
    assert "Traceback" not in result.stderr


def test_show_prints_a_feature_and_names_the_nearest_of_an_unknown_one(planted_run):
    arguments = ["show", str(CONFIGS / "planted.yaml"), f"run_dir={planted_run.config.run_dir}", "--feature"]
    shown = rayinterp(*arguments, "planted/0")
    assert shown.returncode == 0, shown.stderr
    assert "words about ships and the sea" in shown.stdout
    unknown = rayinterp(*arguments, "planted/7")
    assert unknown.returncode == 2
    assert "planted/5" in unknown.stderr


@pytest.mark.parametrize("job", ["run", "corpus", "harvest", "index", "records", "explain", "score", "report"])
def test_jobs_refuse_to_start_without_a_config(job):
    script = CONFIGS.parent / "jobs" / f"{job}.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "configs/demo.yaml" in result.stderr


def test_plan_starts_nothing_and_leaves_nothing(tmp_path):
    arguments = ["plan", str(CONFIGS / "planted.yaml"), f"run_dir={tmp_path / 'run'}"]
    table = rayinterp(*arguments, "corpus.num_sequences=6000")
    assert table.returncode == 0, table.stderr
    for word in ("harvest", "holistic", "total", "GPU-hours", "Assumed"):
        assert word in table.stdout
    numbers = rayinterp(*arguments, "--json")
    content = json.loads(numbers.stdout)
    harvest = next(stage for stage in content["stages"] if stage["stage"] == "harvest")
    assert harvest["num_tokens"] == 3000 * 17
    assert not (tmp_path / "run").exists()
    wrong = rayinterp(*arguments, "--params", "subject.model=9e9")
    assert wrong.returncode == 2
    assert "index.embedder" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("command", [("rayinterp", "experiment"), ("jobs/experiment.py",)])
def test_an_experiment_says_its_price_and_what_it_does_not_know(command, tmp_path):
    arguments = ["layer_sweep", str(CONFIGS / "experiments" / "planted.yaml"), f"run_dir={tmp_path / 'run'}", "--plan"]

    def run(*given):
        if command[0] == "rayinterp":
            return rayinterp("experiment", *given)
        script = [sys.executable, str(CONFIGS.parent / command[0]), *given]
        return subprocess.run(script, capture_output=True, text=True, timeout=120)

    priced = run(*arguments)
    assert priced.returncode == 0, priced.stderr
    assert "planted language" in priced.stdout and "total" in priced.stdout
    assert not (tmp_path / "run").exists()
    unknown = run("figure_6", *arguments[1:])
    assert unknown.returncode == 2
    assert "explainer_comparison" in unknown.stderr and "Traceback" not in unknown.stderr
