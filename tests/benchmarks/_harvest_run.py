"""`python -m tests.benchmarks._harvest_run FOLDER NUM_SEQUENCES`: corpus and harvest in a Ray of their own."""

import logging
import sys
from pathlib import Path

import ray

from rayinterp.config import load_config
from rayinterp.run import open_run, run_stage

if __name__ == "__main__":
    folder, num_sequences = Path(sys.argv[1]), int(sys.argv[2])
    config = load_config(
        "configs/gpt2.yaml",
        [
            f"run_dir={folder / f'run_{num_sequences}'}",
            f"subject.model={folder / 'model'}",
            f"subject.saes={{sae_id: '{folder}/sae', layers: [2]}}",
            "subject.features=all",
            "subject.max_variance_unexplained=1e9",
            f"corpus={{dataset: {folder / 'corpus.jsonl'}, sequence_length: 16, num_sequences: {num_sequences}}}",
            "harvest={token_budget: 8192}",
            "index={embedder: embedded/minilm-l6}",
            "llms={}",
            "simulators={late_interaction: {engine: late_interaction, embedder: embedded/minilm-l6}}",
            "explainers={lexical: {method: lexical, simulator: late_interaction}}",
            "score={simulators: [late_interaction]}",
            "resources={}",
        ],
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    run = open_run(config, ("corpus", "harvest"))
    for stage in ("corpus", "harvest"):
        run_stage(run, stage)
    assert run.tables.count("sequences") == num_sequences
    assert run.tables.count("activations", "feature >= 0") > 0
