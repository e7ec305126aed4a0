"""One feature's card drawn in a terminal."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rayinterp.config import RunConfig, arm_id, parse_config
from rayinterp.errors import UserError
from rayinterp.report_cards import spans
from rayinterp.show import shaded, show_feature, show_records, why_not
from rayinterp.tables import Tables


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return parse_config(
        {
            "name": "a run",
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "subject": {"model": "planted", "saes": {"sae_id": "planted", "layers": [9]}},
            "corpus": {"dataset": "planted"},
            "simulators": {"late": {"engine": "late_interaction"}},
            "explainers": {"lexical": {"method": "lexical", "simulator": "late"}},
            "score": {"simulators": ["late"]},
        }
    )


@pytest.fixture(scope="module")
def tables(config: RunConfig) -> Tables:
    tables = Tables(config.run_dir)
    explainer = arm_id("lexical", config.explainers["lexical"])
    simulator = arm_id("late", config.simulators["late"])
    features = [identity(f"layer_9/{n}") | {"status": "live", "max_activation": 4.0} for n in (3, 40, 47, 60, 900, 950)]
    tables.append("features", [*features, identity("layer_9/48") | {"status": "too_few"}])
    tables.append(
        "explanations",
        [
            {**identity("layer_9/47"), "explainer": explainer, "simulator": simulator, "status": "ok"}
            | {"explanation": '[{"activates_on": "the word [red]ago[/red]", "strength": 5}]', "valid_score": 0.4}
        ],
    )
    score = {**identity("layer_9/47"), "simulator": simulator, "scorer": "correlation", "split": "test"}
    tables.append(
        "scores",
        [
            {
                **score,
                "source": "random_negative",
                "explainer": explainer,
                "control": "",
                "value": 0.512,
                "status": "wide",
            },
            {**score, "source": "random_negative", "explainer": "", "control": "token_lookup", "value": 0.25}
            | {"status": "ok"},
            {**score, "source": "random_negative", "explainer": "", "control": "null", "status": "constant_prediction"},
        ],
    )
    found = {"split": "test", "source": "positive", "requested": 3, "found": 3, "status": "ok"}
    tables.append("record_counts", [{**identity("layer_9/47"), **found}])
    record = {
        **identity("layer_9/47"),
        "split": "test",
        "source": "positive",
        "tokens": [" years", " ago", "\n\x1b[2J"],
    }
    tables.append("records", [{**record, "rank": r, "sequence_id": r, "activations": [0, 4.0, 0]} for r in range(3)])
    tables.append(
        "predictions",
        [
            {"feature_key": "layer_9/47", "explainer": explainer, "simulator": simulator, "split": "test"}
            | {"source": "positive", "sequence_id": 0, "values": [1.0, 0.0, 0.0]}
        ],
    )
    return tables


def identity(key: str) -> dict[str, Any]:
    sae, _, feature = key.partition("/")
    return {"feature_key": key, "sae": sae, "feature": int(feature)}


def drawn(tables: Tables, config: RunConfig, feature: str, colour: bool = False) -> str:
    system = "truecolor" if colour else None
    console = Console(file=io.StringIO(), width=140, force_terminal=colour, color_system=system)
    show_feature(tables, config, feature, console, max_records=2)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_card_says_what_and_how_well(tables: Tables, config: RunConfig) -> None:
    text = drawn(tables, config, "layer_9/47")
    assert "the word [red]ago[/red]" in text, "text from an LLM is not markup"
    assert "valid 0.40" in text and "train –" in text
    row = next(line for line in text.splitlines() if line.startswith("late"))
    assert " ".join(row.split()) == "late random negative 0.51 (wide) 0.25 – not graded – constant prediction – –"
    assert "positive: 2 of 3" in text
    assert "– not simulated" in text


def test_tokens_are_shaded_where_the_feature_fires(tables: Tables, config: RunConfig) -> None:
    text = drawn(tables, config, "layer_9/47", colour=True)
    true = next(line for line in text.splitlines() if "true" in line)
    assert re.search(r"48;2;240;140;0m ago", true)
    assert not re.search(r"48;2;[\d;]+m years", true)
    simulated = next(line for line in text.splitlines() if "lexical, late" in line)
    assert re.search(r"48;2;[\d;]+m years", simulated) and not re.search(r"48;2;[\d;]+m ago", simulated)


def test_text_of_the_corpus_cannot_steer_the_terminal(tables: Tables, config: RunConfig) -> None:
    text = drawn(tables, config, "layer_9/47", colour=True)
    assert "\x1b[2J" not in text and "⏎␛[2J" in text


def test_shading_grows_with_activation() -> None:
    text = shaded(spans(["a", "b", "c", "d"], np.array([0.0, 0.4, 2.6, 5.0])), (200, 100, 0))
    blues = [int(str(span.style)[-2:], 16) for span in text.spans]
    assert text.plain == "abcd" and len(blues) == 3, "a silent token has no background"
    assert blues == sorted(blues, reverse=True) and blues[-1] == 0


def test_a_feature_without_explanation_says_why(tables: Tables, config: RunConfig) -> None:
    assert "active in too few train sequences" in drawn(tables, config, "layer_9/48")


def test_an_unknown_feature_names_its_neighbours(tables: Tables, config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nearest are layer_9/48, layer_9/47, layer_9/40, layer_9/60, layer_9/3"):
        drawn(tables, config, "layer_9/50")
    with pytest.raises(UserError, match="no SAE 'layer_99' was harvested; there are layer_9"):
        drawn(tables, config, "layer_99/50")
    with pytest.raises(UserError, match="sae/index"):
        drawn(tables, config, "layer_9:50")
    with pytest.raises(UserError, match="harvest first"):
        drawn(Tables(str(tmp_path)), config, "layer_9/50")


def printed(draw, *arguments) -> str:
    """What a terminal of 120 columns shows."""
    console = Console(file=io.StringIO(), width=120)
    draw(*arguments, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_records_are_shown_by_split_and_source(planted_run):
    text = printed(show_records, planted_run.tables, "planted/0")
    heads = [line for line in text.splitlines() if re.match(r"(train|valid|test), ", line)]
    assert heads[0] == "train, positive: 10"
    assert {head.split(":")[0] for head in heads} == {
        f"{split}, {source}"
        for split in ("train", "valid", "test")
        for source in ("positive", "random negative", "similar negative")
    }
    assert "test, positive: 30" in heads
    assert text.count("the") > 50


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        ("planted/3", "active nowhere in the corpus"),
        ("planted/4", "harvest.max_density"),
        ("planted/5", "harvest.min_sequences"),
        ("planted/0", "all that were asked for"),
    ],
)
def test_why_a_feature_has_no_more_records(planted_run, feature, says):
    text = " ".join(printed(why_not, planted_run.tables, feature).split())
    assert feature in text and says in text
    if feature != "planted/0":
        assert says in " ".join(printed(show_records, planted_run.tables, feature).split())


def test_why_not_of_an_unknown_feature_names_the_nearest(planted_run):
    with pytest.raises(UserError, match="nearest are planted/5"):
        printed(why_not, planted_run.tables, "planted/9")
