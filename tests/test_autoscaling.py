"""Stages on a cluster that grows and shrinks under them: Ray's autoscaler, with processes for nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayinterp.tables import Tables
from tests.autoscaling import draw
from tests.conftest import copy_upstream
from tests.tables_equal import assert_tables_equal

FIGURE = Path("build") / "autoscaling.png"
MADE_AGAIN = ("activations", "saes", "features", "records", "record_counts", "holistic")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_come_with_work_and_leave_without_it(planted_run, tmp_path):
    folder, trace = copy_upstream(planted_run, tmp_path / "run"), tmp_path / "trace.json"
    tables = Tables(str(folder))
    for name in MADE_AGAIN:
        tables.drop(name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["RAY_AUTH_MODE"] = "disabled"  # `ray start` asks for a token where this machine has one
    command = [sys.executable, "-m", "tests.autoscaling", str(folder), str(trace)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    looks = json.loads(trace.read_text())["trace"]
    FIGURE.parent.mkdir(exist_ok=True)
    draw(trace, FIGURE)

    def most(name: str, stage: str) -> int:
        return max(look[name] for look in looks if look["stage"] == stage)

    assert looks[0]["harvest"] == looks[0]["simulator"] == 0
    assert most("harvest", "harvest") > 1 and most("simulator", "harvest") == 0
    assert max(most("simulator", stage) for stage in ("explain", "score")) > 1 and most("harvest", "score") == 0
    assert looks[-1]["harvest"] == looks[-1]["simulator"] == 0
    assert_tables_equal(planted_run.tables, tables, MADE_AGAIN)
    assert set(tables.read("explanations")["status"].to_pylist()) == {"ok", "no_explanation"}
