"""The stage `score` with further scorers, through Serve and the config's own LLM, and what the report makes of it."""

from pathlib import Path

from rayinterp.config import scorer_id
from rayinterp.run import Run, open_run, run_stage
from rayinterp.tables import Tables
from tests.conftest import copy_upstream, planted_config
from tests.simulate.tiny_simulators import save_model


def test_the_stage_scores_reports_and_has_nothing_left_to_do(planted_run: Run, tmp_path: Path) -> None:
    folder = copy_upstream(planted_run, tmp_path / "run")
    Tables(str(folder)).append("explanations", planted_run.tables.read("explanations"))
    reader = save_model(tmp_path / "model")
    config = planted_config(
        folder,
        f"simulators.reader={{engine: transformers, model: {reader}, num_few_shots: 1, dtype: float32}}",
        # Of the first feature all questions are answered alike, of the others none.
        "llms.judge={provider: scripted, model: judge, answers: {planted/0: '[1]'}}",
        "score.scorers.detection={method: detection, llm: judge, max_records: 10, num_shown: 1}",
        "score.scorers.surprisal={method: surprisal, simulator: reader, num_features: 1, max_records: 5}",
        "score.scorers.embedding={method: embedding}",
    )
    run = open_run(config)
    run_stage(run, "score")
    tables = run.tables
    rows = tables.read("scores", where=f"simulator = '{scorer_id(config, 'detection')}'").to_pylist()
    first = [row for row in rows if row["feature_key"] == "planted/0" and row["value"] is not None]
    assert {row["value"] for row in first} == {0.5} and all(row["num_unparsed"] == 0 for row in first)
    others = [row for row in rows if row["feature_key"] == "planted/1"]
    assert {row["status"] for row in others} == {"parse_error"}
    losses = tables.read("scores", where="scorer = 'surprisal' and control = ''").to_pylist()
    assert {row["feature_key"] for row in losses} == {"planted/0"} and all(0 <= row["value"] <= 1 for row in losses)
    assert {row["source"] for row in losses} == {"similar_negative", "random_negative", "rule_negative"}

    versions = {name: tables.version(name) for name in ("scores", "llm_calls")}
    run_stage(run, "score")
    assert {name: tables.version(name) for name in versions} == versions

    run_stage(run, "report")
    html = (folder / "report.html").read_text()
    # Three scorers, three sources, three explainers.
    assert html.count('class="scorer-row"') == 27
    assert "66.7 %" in html and "50.0 %" in html  # `wrong` explains two features
    assert "<h2>Do the simulators agree?</h2>" not in html  # there is one, whatever stands in its column
