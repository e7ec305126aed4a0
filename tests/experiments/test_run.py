"""Experiments on planted features, whole: what they find, what they leave, and what a second one pays."""

from pathlib import Path

import pytest

from rayinterp.config import load_config
from rayinterp.experiments.design import config_for
from rayinterp.experiments.runner import write_experiment
from rayinterp.run import STAGES, open_run, run_stage

CONFIG = Path(__file__).parent.parent.parent / "configs" / "experiments" / "planted.yaml"
SMALL = (
    "corpus.num_sequences=2400",
    "corpus.shard_size=800",
    "subject.features=2",
    "records.complementary=[random_negative, similar_negative]",
    "score.num_shuffled=1",
    "score.num_bootstrap=200",
)


def run_experiment(name, run_dir):
    config = config_for(name, load_config(CONFIG, [f"run_dir={run_dir}", *SMALL]))
    run = open_run(config)
    for stage in STAGES:
        run_stage(run, stage)
    return config, run.tables, write_experiment(name, config, run.tables)


def values(tables, panel, experiment="planted"):
    where = f"experiment = '{experiment}' and panel = '{panel}'"
    return {(row["x"], row["series"]): row for row in tables.read("experiments", where=where).to_pylist()}


@pytest.fixture(scope="module")
def planted(ray_session, tmp_path_factory):
    return run_experiment("planted", tmp_path_factory.mktemp("experiment") / "run")


def test_the_truth_is_recovered_by_whoever_knows_it(planted):
    _, tables, _ = planted
    recovered = values(tables, "Truth recovered")
    live = tables.read("features", ["sae"], "status = 'live'")["sae"].to_pylist()
    for layer in range(4):
        assert recovered["truth", f"layer_{layer}"]["value"] == 1
        assert recovered["truth", f"layer_{layer}"]["num_features"] == live.count(f"layer_{layer}") >= 1
        assert recovered["truth", f"layer_{layer}"]["ci_low"] < 0.5  # of two features
    assert all(recovered["broad", f"layer_{layer}"]["value"] == 0 for layer in (0, 2))
    arms = {arm for arm, _ in recovered}
    share = {arm: sum(recovered[arm, f"layer_{layer}"]["value"] for layer in range(4)) for arm in arms}
    assert share["truth"] >= share["tree"] > share["one_shot"] >= share["broad"]
    assert share["tree_falsifier"] >= share["tree"]


def test_a_broad_claim_keeps_its_score_on_random_texts_alone(planted):
    _, tables, _ = planted
    score, wrong = values(tables, "Score by source"), values(tables, "False positives by source")
    broad = {source: score["broad", source]["value"] for _, source in score}
    assert broad["random_negative"] - max(broad["similar_negative"], broad["rule_negative"]) > 0.1
    assert wrong["broad", "rule_negative"]["value"] > 3 * wrong["broad", "random_negative"]["value"]
    truth = [score["truth", source]["value"] for source in broad]
    assert min(truth) > 0.95 and max(truth) - min(truth) < 0.02


def test_an_experiment_leaves_figures_and_a_page(planted):
    config, _, written = planted
    assert [Path(file).suffix for file in written.figures] == [".png", ".svg", ".pdf"]
    assert all(Path(file).stat().st_size > 10_000 for file in written.figures)
    page, report = Path(written.page).read_text(), (Path(config.run_dir) / "report.html").read_text()
    cards = {link.split('"')[0] for link in page.split('href="../report.html#')[1:]}
    assert '<a href="experiments/planted.html">' in report
    assert cards and all(f'id="{card}"' in report for card in cards)


def test_a_second_experiment_pays_for_what_is_new_alone(planted):
    config, tables, _ = planted
    names = ("llm_calls", "candidates", "explanations", "scores", "predictions", "complexity", "test_records")
    before = {name: tables.version(name) for name in names}
    run_experiment("layer_sweep", config.run_dir)  # its two arms are arms of the first
    assert {name: tables.version(name) for name in names} == before  # nothing was written, not even the same again
    num_rows = tables.count("experiments")
    write_experiment("planted", config, tables)
    assert tables.count("experiments") == num_rows
    sweep = values(tables, "Score under rule_negative", "layer_sweep")
    assert {x for x, _ in sweep} == {f"layer_{layer}" for layer in range(4)}
