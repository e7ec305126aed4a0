"""Which arms an experiment makes of a config, and what it says where it cannot."""

from pathlib import Path

import pytest

from rayinterp.config import OneShotConfig, TreeConfig, load_config
from rayinterp.errors import UserError
from rayinterp.experiments.design import EXPERIMENTS, RULE_CAPS, config_for, template_of
from rayinterp.explain.rows import arm_ids

CONFIG = Path(__file__).parent.parent.parent / "configs" / "experiments" / "planted.yaml"


def planted(*overrides):
    return load_config(CONFIG, list(overrides))


def test_an_arm_of_two_experiments_is_one_arm():
    ids = {}
    for name in EXPERIMENTS:
        config = config_for(name, planted())
        for arm in config.explainers:
            ids.setdefault(arm, set()).add(arm_ids(config, arm))
    assert all(len(found) == 1 for found in ids.values())
    assert {"one_shot", "tree"} <= set(config_for("layer_sweep", planted()).explainers)
    assert len({next(iter(found))[0].partition("@")[2] for found in ids.values()}) == len(ids)


def test_arms_differ_from_the_base_in_what_their_name_says_alone():
    explainers = config_for("explainer_comparison", planted()).explainers
    tree = explainers["tree"].model_dump()
    changed = {
        name: {field for field, value in arm.model_dump().items() if value != tree[field]}
        for name, arm in explainers.items()
        if isinstance(arm, TreeConfig)
    }
    assert changed == {
        "tree": set(),
        "tree_string": {"structured"},
        "tree_holistic": {"holistic"},
        "tree_negatives": {"num_negatives_shown"},
        "tree_falsifier": {"falsifier"},
    }
    for name, arm in explainers.items():
        if type(arm) is OneShotConfig:
            twin = explainers[name.replace("one_shot", "tree")]
            assert all(value == getattr(twin, field) for field, value in arm if field != "method")


def test_rule_caps_have_an_arm_each_and_the_base_is_one_of_them():
    explainers = config_for("polysemanticity", planted("explainers.tree.rule_cap=4")).explainers
    caps = {name: arm.rule_cap for name, arm in explainers.items() if isinstance(arm, TreeConfig)}
    assert sorted(caps.values()) == sorted({*RULE_CAPS, 4}) and caps["tree"] == 4 and caps["tree_cap_1"] == 1


def test_the_template_is_without_what_experiments_switch_on():
    loaded = planted("explainers.tree.structured=false", "explainers.tree.falsifier={num_drawn: 3}")
    arms = config_for("explainer_comparison", loaded).explainers
    assert template_of(loaded).structured and arms["tree"].falsifier is None
    assert arms["tree_falsifier"].falsifier.num_drawn == 3


def test_trees_begin_with_what_the_llm_wrote():
    """Lexical rules would stand in an arm of sentences, and be taken for what search adds."""
    with_root = config_for("explainer_comparison", planted("explainers.tree.lexical_root=true"))
    assert not any(arm.lexical_root for arm in with_root.explainers.values() if isinstance(arm, TreeConfig))
    assert with_root.explainers == config_for("explainer_comparison", planted()).explainers


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("figure_6", [], "there are complementary_sources"),
        ("layer_sweep", ["explainers={right: {method: lexical, simulator: oracle}}"], "method: tree"),
        ("layer_sweep", ["explainers.tree.num_llm_roots=0"], "num_llm_roots: 0"),
        ("complementary_sources", ["records.complementary=[random_negative]"], "records.complementary"),
        ("explainer_comparison", ["records.holistic=none"], "records.holistic"),
        ("planted", ["subject.model=planted"], "configs/experiments/planted.yaml"),
        ("planted", ["llms={blind: {provider: planted, model: blind}}"], "lacks truth, broad"),
    ],
)
def test_what_an_experiment_cannot_work_with_is_named(name, overrides, said):
    with pytest.raises(UserError, match=said):
        config_for(name, planted(*overrides))
