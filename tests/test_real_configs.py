"""The configs of real models, run on small models of the same architectures with SAEs of the same kind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayinterp.config import load_config
from rayinterp.harvest import read_token_ids
from rayinterp.preflight import prepare
from rayinterp.run import open_run, run_stage
from rayinterp.subject import LanguageModelSubject
from tests.conftest import CONFIGS
from tests.small_models import D_SAE, save_corpus, save_model, save_sae

SOURCES = ("random", "random_negative", "similar", "similar_negative", "similar_projected",
    "similar_projected_negative", "neighbour")  # fmt: skip


def small(name: str, folder: Path):
    """`configs/<name>.yaml` with a small model, local SAEs and a small corpus in place of the hub's."""
    save_model(name, folder / "model")
    for layer in (0, 2):
        save_sae(name, folder / f"sae_{layer}", f"blocks.{layer}.hook_resid_post")
    save_corpus(folder / "corpus.jsonl")
    return load_config(
        CONFIGS / f"{name}.yaml",
        [
            f"run_dir={folder / 'run'}",
            f"subject.model={folder / 'model'}",
            "subject.dtype=float32",
            f"subject.saes={{sae_id: '{folder}/sae_{{layer}}', layers: even}}",
            "subject.features=20",
            "subject.max_variance_unexplained=1e9",
            f"corpus={{dataset: {folder / 'corpus.jsonl'}, sequence_length: 16, num_sequences: 500, shard_size: 128}}",
            "harvest={token_budget: 300, min_sequences: 5, max_density: 0.9}",
            "index={embedder: embedded/minilm-l6}",
            f"records={{holistic: positive, train: {{positive: 2, complementary: 2}}, complementary: {list(SOURCES)}}}",
            "llms={}",
            "simulators={late_interaction: {engine: late_interaction, embedder: embedded/minilm-l6}}",
            "explainers={lexical: {method: lexical, simulator: late_interaction}}",
            "score={simulators: [late_interaction]}",
            "resources={harvest: {max_actors: 2, num_cpus: 0.5}, index: {num_cpus: 0.5}}",
        ],
    )


def dense_activations(run, where):
    """What the subject gives for sequences of one shard, computed at once: {sae: [rows, seq, k]}."""
    subject = LanguageModelSubject(
        run.config.subject.model, run.prepared.sources, run.prepared.features, dtype="float32"
    )
    return subject, subject.activations(read_token_ids(run.tables, where))


def check_harvest(run):
    """Two SAEs in one pass, a shard's posting lists against the dense activations, a row for every feature."""
    assert list(run.prepared.features) == ["layer_0", "layer_2"]
    assert all(len(features) == 20 < D_SAE for features in run.prepared.features.values())
    _, expected = dense_activations(run, "shard = 1")
    for sae, features in run.prepared.features.items():
        found = torch.zeros_like(expected[sae])
        where = f"sae = '{sae}' and shard = 1"
        for row in run.tables.read("activations", where=where).to_pylist():
            lengths = np.diff(row["offsets"])
            sequences = np.repeat(row["rows"], lengths)
            found[sequences, row["positions"], features.index(row["feature"])] = torch.tensor(row["values"])
        torch.testing.assert_close(found, expected[sae], rtol=1e-4, atol=1e-4)
        assert (found > 0).any()
    saes = {row["sae"]: row for row in run.tables.read("saes").to_pylist()}
    assert all(row["variance_unexplained"] > 0 and row["median_norm"] > 0 for row in saes.values())
    statuses = run.tables.read("features", ["status"])["status"].to_pylist()
    assert len(statuses) == 40 and statuses.count("live") > 5


def check_sources(run):
    """Every source has records, each in its split; silent ones are silent; no document is in two splits."""
    rows = run.tables.read("records").to_pylist()
    splits_of_document = {}
    for row in rows:
        assert splits_of_document.setdefault(row["document_id"], row["split"]) == row["split"]
        if row["source"].endswith("_negative") or row["source"] == "neighbour":
            assert not any(row["activations"])
        elif row["source"] == "positive":
            assert max(row["activations"]) > 0
    found = {(row["split"], row["source"]) for row in rows}
    assert found == {(split, source) for split in ("train", "valid", "test") for source in ("positive", *SOURCES)}
    counts = run.tables.read("record_counts", where="source = 'neighbour'").to_pylist()
    assert {count["status"] for count in counts} >= {"ok"}


@pytest.mark.parametrize("name", ["gpt2", "llama-3.1-8b"])
def test_the_config_of_a_real_model_harvests_its_small_twin(name, tmp_path, ray_session):
    run = open_run(small(name, tmp_path), ("corpus", "harvest"))
    for stage in ("corpus", "harvest"):
        run_stage(run, stage)
    check_harvest(run)


def test_gemma_harvests_and_the_holistic_activations_of_its_records_are_those_of_the_subject(tmp_path, ray_session):
    run = open_run(small("gemma-2-9b", tmp_path), ("corpus", "harvest", "index", "records"))
    for stage in ("corpus", "harvest", "index", "records"):
        run_stage(run, stage)
    check_harvest(run)
    check_sources(run)
    pairs = run.tables.read("holistic").to_pylist()
    wanted = run.tables.read("records", where="split = 'train' and source = 'positive'").to_pylist()
    assert {(p["feature_key"], p["sequence_id"]) for p in pairs} == {
        (w["feature_key"], w["sequence_id"]) for w in wanted
    }
    assert len(pairs) == len(wanted) > 20
    subject, _ = dense_activations(run, "shard = 0 and row = 0")
    records = {(w["feature_key"], w["sequence_id"]): w for w in wanted}
    for pair in pairs[:: len(pairs) // 5]:
        record = records[pair["feature_key"], pair["sequence_id"]]
        column = run.prepared.features[record["sae"]].index(record["feature"])
        expected = subject.holistic(torch.tensor([record["token_ids"]]))[record["sae"]][0, :, column]
        np.testing.assert_allclose(pair["values"], expected, atol=1e-4)
    version = run.tables.open("holistic").version
    run_stage(run, "records")
    assert run.tables.open("holistic").version == version


def test_a_bad_reconstruction_stops_before_anything_is_harvested(tmp_path, ray_session):
    from rayinterp.errors import UserError

    config = small("gpt2", tmp_path)
    strict = config.model_copy(update={"subject": config.subject.model_copy(update={"max_variance_unexplained": 0.1})})
    run = open_run(strict, ("corpus", "harvest"))
    run_stage(run, "corpus")
    with pytest.raises(UserError, match=r"SAE layer_\d leaves .* unexplained.*wrong hook point"):
        run_stage(run, "harvest")
    assert run.tables.count("activations") == 0


def test_the_preflight_reads_the_cards_and_not_the_weights(tmp_path):
    config = small("llama-3.1-8b", tmp_path)
    for weights in tmp_path.glob("sae_*/*.safetensors"):
        weights.unlink()
    prepared = prepare(config, ("corpus", "harvest"))
    assert [source.name for source in prepared.sources] == ["layer_0", "layer_2"]
