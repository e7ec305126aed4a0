"""Peak memory of corpus and harvest, driver and largest worker, at 40k and at 160k sequences of a tiny model."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from rayinterp.planted import documents
from tests.benchmarks.measure import Row
from tests.small_models import save_model, save_sae

NAME = "memory"
SMALL, LARGE = 40_000, 160_000
SECONDS_BETWEEN = 0.25
MAX_GROWTH = 1.25


def peaks(command: list[str]) -> dict[str, float]:
    """Largest unique set size seen, in MB: of the driver, and of the largest worker."""
    process = psutil.Popen(command)
    largest: dict[str, float] = defaultdict(float)
    while process.poll() is None:
        for child in [process, *process.children(recursive=True)]:
            try:
                line, used = " ".join(child.cmdline()), child.memory_full_info().uss / 1e6
            except psutil.Error:  # it ended meanwhile
                continue
            kind = "driver" if child.pid == process.pid else "worker" if line.startswith("ray::") else "ray itself"
            largest[kind] = max(largest[kind], used)
        time.sleep(SECONDS_BETWEEN)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    return largest


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model("gpt2", folder / "model")
        save_sae("gpt2", folder / "sae", "blocks.2.hook_resid_post")
        with (folder / "corpus.jsonl").open("w") as file:
            # Some seven windows a document; a few are duplicates.
            file.writelines(json.dumps(document) + "\n" for document in documents(0, num_documents=LARGE // 6))
        command = [sys.executable, "-m", "tests.benchmarks._harvest_run", str(folder)]
        small, large = (peaks([*command, str(size)]) for size in (SMALL, LARGE))
    # Ours: at 160k; baseline: at 40k. The ratio is that of small to large, so that above 1 is better, as elsewhere.
    return [
        Row(f"peak memory of the {kind}, {LARGE:,} against {SMALL:,} sequences", large[kind], small[kind],
            small[kind] / large[kind], "MB", 1 / MAX_GROWTH, large[kind] <= MAX_GROWTH * small[kind])
        for kind in ("driver", "worker")
    ]  # fmt: skip
