import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rayinterp.cli import app
from rayinterp.errors import UserError
from rayinterp.tables import Tables
from rayinterp.tune import SPACE, objective, space, tuning_config
from tests.conftest import CONFIGS, planted_config

OTHERS = "subject.features=[0, 3]"


def test_the_run_s_own_features_are_not_tuned_on(tmp_path):
    config = tuning_config(planted_config(tmp_path / "run", OTHERS))
    assert config.subject.features == [1, 2, 4, 5]
    assert Path(config.run_dir) == tmp_path / "run-tune"
    with pytest.raises(UserError, match=r"subject\.features is 'all'"):
        tuning_config(planted_config(tmp_path / "run"))


def test_the_objective_is_score_by_cost():
    assert objective([0.5, None, 1.0], 0.03, 10**6) == pytest.approx(50)
    assert objective([0.5, None, 1.0], None, 3000) == pytest.approx(0.5)
    assert objective([None], 0.0, 0) == 0


def test_an_arm_with_a_cascade_keeps_it(tmp_path):
    arm = planted_config(tmp_path, "explainers.tree.cascade={simulator: oracle, keep: 2}").explainers["tree"]
    assert space(arm)["strategy"] == ["beam", "best_first"]


@pytest.mark.slow
def test_settings_are_tried_and_what_is_paid_for_is_not_paid_for_again(ray_session, tmp_path):
    arguments = [str(CONFIGS / "planted.yaml"), f"run_dir={tmp_path / 'run'}", OTHERS, "corpus.num_sequences=1500"]

    def tune():
        result = CliRunner().invoke(app, ["tune", *arguments, "--num-samples", "3", "--features", "2"])
        assert result.exit_code == 0, result.output
        return result.output, json.loads((tmp_path / "run-tune" / "tune.json").read_text())

    output, found = tune()
    assert found["metric"] == "valid score per 1,000 LLM tokens"
    assert set(found["features"]) == {"planted/1", "planted/2"}
    trials = found["trials"]
    assert len(trials) == 3 and trials[0]["finished"]
    assert all(trial["settings"][name] in values for trial in trials for name, values in SPACE.items())
    assert all(trial["valid_score"] > 0.95 and trial["objective"] > 0 for trial in trials)  # this LLM knows
    best = yaml.safe_load(output[output.index("explainers:") : output.index("All of it")])
    planted_config(tmp_path / "run", f"explainers.tree={best['explainers']['tree'] | BASE}")

    tables = Tables(str(tmp_path / "run-tune"))
    paid = sorted(tables.read("llm_calls")["request_hash"].to_pylist())
    searched = tables.count("explanations")
    _, again = tune()
    assert again == found
    assert sorted(tables.read("llm_calls")["request_hash"].to_pylist()) == paid
    assert tables.count("explanations") == searched


BASE = {"method": "tree", "llm": "knows", "simulator": "oracle"}


def test_an_arm_that_is_no_tree_is_refused(ray_session, tmp_path):
    arguments = [str(CONFIGS / "planted.yaml"), f"run_dir={tmp_path / 'run'}", OTHERS, "--arm", "right"]
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert isinstance(result.exception, UserError) and "there are: tree" in str(result.exception)
