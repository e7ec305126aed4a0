"""A harvest that loses processes and a machine on the way ends with the tables of one that lost nothing."""

import os
import shutil
import subprocess
import sys

from rayinterp.tables import Tables
from tests.tables_equal import assert_tables_equal


def test_a_harvest_outlives_its_actors_its_committer_and_a_node(planted_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("sequences.lance", "corpus_files.lance", "run.yaml"):
        source = os.path.join(planted_run.config.run_dir, name)
        (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, folder / name)
    # A cluster of its own: the session's must outlive it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.faults.kill_harvest", str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    killed = [line for line in result.stdout.splitlines() if line.startswith("killed")]
    assert killed == ["killed MapWorker(Map(Harvester)", "killed FragmentCommitter", "killed a node"]
    tables = Tables(str(folder))
    assert_tables_equal(planted_run.tables, tables, ["activations", "features", "saes"])
    data_files = {path.name for path in (folder / "activations.lance" / "data").iterdir()}
    named = {file.path for fragment in tables.open("activations").get_fragments() for file in fragment.data_files()}
    assert data_files == named, "files that no version names were left behind"
