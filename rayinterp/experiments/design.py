"""Experiments as sets of explainer arms, made from the config's tree explainer by changing one thing at a time.

A tree arm of the config is the template: its LLM, its simulator, its breadth and depth. Wherever an experiment does not
say otherwise, answers are structured, no negatives or holistic activations are shown, the search begins with the LLM's
roots alone, and nothing falsifies, so that "tree" is the same arm in every experiment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rayinterp.config import (
    LANGUAGE,
    ExplainerConfig,
    FalsifierConfig,
    LexicalConfig,
    OneShotConfig,
    RunConfig,
    TreeConfig,
    parse_config,
)
from rayinterp.errors import UserError

RULE_CAPS = (1, 2, 3, 5)
"""Of `polysemanticity`."""
NUM_NEGATIVES = 10
"""Train negatives shown, where they are: as many as positives by default."""
FORMS: dict[str, dict[str, Any]] = {
    "string": {"structured": False},
    "structured": {},
    "holistic": {"holistic": True},
    "negatives": {"num_negatives_shown": NUM_NEGATIVES},
}
"""What an explainer is shown and asked for, in `explainer_comparison`."""
BASE: dict[str, Any] = {
    "structured": True,
    "holistic": False,
    "num_negatives_shown": 0,
    "lexical_root": False,  # what no LLM wrote would count as what search adds, and as rules in an arm of sentences
}

Arms = dict[str, ExplainerConfig]


class Experiment(NamedTuple):
    """One experiment of the paper, or of our own."""

    title: str
    question: str
    """What it answers, and how, for people."""
    arms: Callable[[TreeConfig, RunConfig], Arms]
    """Explainers, from the template."""


def template_of(config: RunConfig) -> TreeConfig:
    """The config's tree explainer, without what experiments switch on.

    Raises:
        UserError: it has none, or several, or one whose search begins with no LLM root.
    """
    trees = {name: arm for name, arm in config.explainers.items() if isinstance(arm, TreeConfig)}
    tree = trees.get("tree", next(iter(trees.values()), None))
    if tree is None or (len(trees) > 1 and "tree" not in trees):
        raise UserError(
            f"explainers has {len(trees)} arms with method: tree ({', '.join(trees) or 'none'}); experiments are made "
            "from one of them: call it tree"
        )
    if not tree.num_llm_roots:
        raise UserError(
            "the tree explainer has num_llm_roots: 0; experiments' trees begin with these alone: set 1 or more"
        )
    return tree.model_copy(update=BASE)


def tree_arm(template: TreeConfig, **changes: Any) -> TreeConfig:
    """The template's search, nothing falsified unless asked for."""
    return template.model_copy(update={"falsifier": None} | changes)


def one_shot_arm(template: TreeConfig, **changes: Any) -> OneShotConfig:
    """A single call with the template's prompt."""
    shared = {name: getattr(template, name) for name in OneShotConfig.model_fields if name != "method"}
    return OneShotConfig(**(shared | changes))


def falsified(template: TreeConfig) -> FalsifierConfig:
    """The template's falsifier, or the default one."""
    return template.falsifier or FalsifierConfig()


def capped_name(method: str, rule_cap: int, template: TreeConfig) -> str:
    """With the template's own cap it is the arm that other experiments know."""
    return method if rule_cap == template.rule_cap else f"{method}_cap_{rule_cap}"


def _both(template: TreeConfig, config: RunConfig) -> Arms:
    return {"one_shot": one_shot_arm(template), "tree": tree_arm(template)}


def _every_form(template: TreeConfig, config: RunConfig) -> Arms:
    arms: Arms = {"lexical": LexicalConfig(simulator=template.simulator, rule_cap=template.rule_cap)}
    for form, changes in FORMS.items():
        suffix = "" if form == "structured" else f"_{form}"
        arms[f"one_shot{suffix}"] = one_shot_arm(template, **changes)
        arms[f"tree{suffix}"] = tree_arm(template, **changes)
    arms["tree_falsifier"] = tree_arm(template, falsifier=falsified(template))
    return arms


def _every_cap(template: TreeConfig, config: RunConfig) -> Arms:
    caps = sorted({*RULE_CAPS, template.rule_cap})
    arms: Arms = {capped_name("one_shot", cap, template): one_shot_arm(template, rule_cap=cap) for cap in caps}
    return arms | {capped_name("tree", cap, template): tree_arm(template, rule_cap=cap) for cap in caps}


def _against_the_truth(template: TreeConfig, config: RunConfig) -> Arms:
    if config.subject.model != LANGUAGE:
        raise UserError(
            f"experiment planted needs features whose truth is known: subject.model is {config.subject.model!r}, "
            f"not {LANGUAGE!r}; start from configs/experiments/planted.yaml"
        )
    missing = [name for name in ("truth", "broad") if name not in config.llms]
    if missing:
        raise UserError(f"experiment planted asks the LLMs truth and broad; llms lacks {', '.join(missing)}")
    return {
        "lexical": LexicalConfig(simulator=template.simulator, rule_cap=template.rule_cap),
        **_both(template, config),
        "tree_falsifier": tree_arm(template, falsifier=falsified(template)),
        "broad": one_shot_arm(template, llm="broad"),
        "truth": one_shot_arm(template, llm="truth"),
    }


EXPERIMENTS: dict[str, Experiment] = {
    "complementary_sources": Experiment(
        "Complementary sources (figure 3)",
        "How much a score depends on the silent texts it is taken on. The same explanations are graded on positives "
        "beside every complementary source of the config, and beside the texts nearest to their own words.",
        _both,
    ),
    "explainer_comparison": Experiment(
        "Explainers (figure 4)",
        "What an explainer gains from search, from structured answers, from holistic activations, from negatives and "
        "from a falsifier. Differences are paired by feature.",
        _every_form,
    ),
    "polysemanticity": Experiment(
        "Rule cap and polysemanticity (figure 5)",
        "What further rules are worth. Every arm chooses its winner on valid and is compared on test, so that more "
        "rules are not more draws from the same lottery.",
        _every_cap,
    ),
    "layer_sweep": Experiment(
        "Layers",
        "How score, complexity and the number of rules change with the layer.",
        _both,
    ),
    "planted": Experiment(
        "Planted features",
        "Which method finds the truth where it is known, and which scores notice an explanation that is too broad.",
        _against_the_truth,
    ),
}


def config_for(name: str, config: RunConfig) -> RunConfig:
    """The config with the experiment's explainers in place of its own; everything else stays.

    Raises:
        UserError: no such experiment, or the config lacks what it needs.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"experiment {name!r} does not exist; there are {', '.join(EXPERIMENTS)}")
    if name == "complementary_sources" and len(config.records.complementary) < 2:
        raise UserError(
            f"experiment complementary_sources compares sources, records.complementary names "
            f"{len(config.records.complementary)}; name several, e.g. [random_negative, similar_negative]"
        )
    arms = EXPERIMENTS[name].arms(template_of(config), config)
    data = config.model_dump(mode="json")
    data["explainers"] = {arm: explainer.model_dump(mode="json") for arm, explainer in arms.items()}
    return parse_config(data, f"experiment {name}")
