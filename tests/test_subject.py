import importlib.util

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from rayinterp.errors import UserError
from rayinterp.feature_id import FeatureId, interleave
from rayinterp.saes import SaeSource
from rayinterp.subject import LanguageModelSubject, pick_device, sparsify

D_MODEL, D_SAE, LAYERS = 16, 24, 4
IDS = torch.arange(24).reshape(3, 8) + 1


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model(request, tmp_path_factory):
    """A small model with random weights and a tokenizer that has a BOS, as a folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=32, hidden_size=D_MODEL, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
    elif request.param == "gemma2":
        config = Gemma2Config(
            vocab_size=32, hidden_size=D_MODEL, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
        )  # fmt: skip
    else:
        config = GPT2Config(vocab_size=32, n_embd=D_MODEL, n_layer=LAYERS, n_head=2)
    small = AutoModel.from_config(config)
    for parameter in small.parameters():
        parameter.data.normal_(0, 0.2)  # larger than the usual start, or tokens would hardly see each other
    small.save_pretrained(path)
    vocabulary = {"<s>": 0, **{f"t{i}": i for i in range(1, 32)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t1")), bos_token="<s>"
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def make_sae(tmp_path):
    def make(name, hook_name, **metadata):
        torch.manual_seed(1)
        config = StandardSAEConfig(
            d_in=D_MODEL, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook_name, prepend_bos=False, **metadata)
        )
        sae = StandardSAE(config)
        for parameter in sae.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        sae.save_model(tmp_path / name)
        return SaeSource(name, None, str(tmp_path / name)), sae

    return make


def whole(model, ids):
    """Hidden states of the uncut model: [0] the embedding, [i + 1] after layer i."""
    return AutoModel.from_pretrained(model)(input_ids=ids, output_hidden_states=True).hidden_states


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_hidden_states_are_those_of_the_whole_model_and_deeper_layers_are_not_loaded(model, make_sae):
    (post, _), (pre, _) = make_sae("post", "blocks.1.hook_resid_post"), make_sae("pre", "blocks.2.hook_resid_pre")
    subject = LanguageModelSubject(model, [post, pre], {"post": [0], "pre": [0]})
    states, expected = subject.hidden_states(IDS), whole(model, IDS)
    close(states["post"], expected[2])
    close(states["pre"], expected[2])
    assert subject._model.config.num_hidden_layers == 3


def test_bos_is_put_in_front_and_left_out_again(model, make_sae):
    source, _ = make_sae("a", "blocks.1.hook_resid_post")
    subject = LanguageModelSubject(model, [source], {"a": [0]}, prepend_bos=True)
    with_bos = torch.cat([torch.zeros(3, 1, dtype=torch.long), IDS], dim=1)
    close(subject.hidden_states(IDS)["a"], whole(model, with_bos)[2][:, 1:])


def test_auto_bos_follows_the_sae_and_refuses_a_disagreement(model, make_sae, tmp_path):
    (yes, _), (no, _) = make_sae("yes", "blocks.0.hook_resid_post"), make_sae("no", "blocks.0.hook_resid_post")
    path = tmp_path / "yes" / "cfg.json"
    path.write_text(path.read_text().replace('"prepend_bos": false', '"prepend_bos": true'))
    assert LanguageModelSubject(model, [yes], {"yes": [0]})._bos == 0
    assert LanguageModelSubject(model, [no], {"no": [0]})._bos is None
    with pytest.raises(UserError, match=r"subject\.prepend_bos"):
        LanguageModelSubject(model, [yes, no], {"yes": [0], "no": [0]})


def test_activations_are_the_requested_rows_of_the_sae(model, make_sae):
    source, sae = make_sae("a", "blocks.1.hook_resid_post")
    subject = LanguageModelSubject(model, [source], {"a": [3, 7, 20]})
    close(subject.activations(IDS)["a"], sae.encode(whole(model, IDS)[2])[..., [3, 7, 20]])
    assert not subject.activations(IDS)["a"].requires_grad


def test_a_stream_gives_the_non_zeros_of_every_batch_in_order(model, make_sae):
    (post, _), (pre, _) = make_sae("post", "blocks.1.hook_resid_post"), make_sae("pre", "blocks.2.hook_resid_pre")
    subject = LanguageModelSubject(model, [post, pre], {"post": [3, 7, 20], "pre": [0]}, prepend_bos=True)
    batches = [IDS[:2], IDS[2:]]
    for batch, sparse in zip(batches, subject.stream(batches), strict=True):
        for name, dense in subject.activations(batch).items():
            rebuilt = torch.zeros_like(dense)
            found = sparse[name]
            rebuilt[found.rows, found.positions, found.columns] = torch.from_numpy(found.values)
            assert torch.equal(rebuilt, dense)
            assert (found.values != 0).all()
            close(torch.from_numpy(found.norms), subject.hidden_states(batch)[name].norm(dim=-1))


def test_non_zeros_come_in_the_order_of_rows_and_positions():
    dense = torch.zeros(2, 3, 2)
    dense[0, 2, 1], dense[1, 0, 0], dense[1, 0, 1] = 1.0, 2.0, 3.0
    found = sparsify(dense, torch.ones(2, 3))
    assert (found.rows.tolist(), found.positions.tolist(), found.columns.tolist()) == ([0, 1, 1], [2, 0, 0], [1, 0, 1])
    assert found.values.tolist() == [1.0, 2.0, 3.0]


def test_a_check_reports_what_the_reconstruction_misses_and_how_long_its_input_is(model, make_sae):
    source, sae = make_sae("a", "blocks.1.hook_resid_post")
    subject = LanguageModelSubject(model, [source], {"a": [0]})
    state = whole(model, IDS)[2].detach().flatten(0, 1)
    with torch.no_grad():
        reconstructed = sae(state)
    missed = (state - reconstructed).pow(2).sum() / (state - state.mean(0)).pow(2).sum()
    check = subject.check(IDS)["a"]
    assert check.variance_unexplained == pytest.approx(float(missed), rel=1e-4)
    assert check.median_norm == pytest.approx(float(state.norm(dim=-1).median()), rel=1e-5)


MAX_HOLISTIC_DIFFERENCE = 2e-6
"""In fp32, of means around 1; rotary and learned positions. Seen: 5e-7."""


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize(
    "hooks",
    [
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        ("blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"),
        ("blocks.1.hook_resid_post", "blocks.2.hook_attn_out"),
        ("blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized"),  # the pass ends before any attention
    ],
)
def test_holistic_activations_are_those_of_one_full_pass_per_dropped_token(model, make_sae, prepend_bos, hooks):
    sources = [make_sae(name, hook)[0] for name, hook in zip("ab", hooks, strict=True)]
    subject = LanguageModelSubject(model, sources, {"a": [5], "b": list(range(D_SAE))}, prepend_bos=prepend_bos)
    found, full = subject.holistic(IDS), subject.activations(IDS)
    for token in range(IDS.shape[1]):
        shorter = torch.cat([IDS[:, :token], IDS[:, token + 1 :]], dim=1)
        for name, expected in subject.activations(shorter).items():
            slowly = full[name].mean(1) - expected.mean(1)
            difference = float((found[name][:, token] - slowly).abs().max())
            assert difference < MAX_HOLISTIC_DIFFERENCE, (name, token)
    assert float(found["b"].abs().max()) > 0.02


def test_compiled_layers_give_the_same(model, make_sae, monkeypatch):
    # Traced in full; without the code generator, which takes a minute.
    compile_forward, compiled_forwards = torch.compile, []

    def compile_lightly(forward):
        compiled_forwards.append(forward)
        return compile_forward(forward, backend="aot_eager")

    monkeypatch.setattr("torch.compile", compile_lightly)
    (post, _), (inside, _) = make_sae("post", "blocks.1.hook_resid_post"), make_sae("inside", "blocks.2.hook_mlp_out")
    wanted = {"post": [3, 7], "inside": [0]}
    plain = LanguageModelSubject(model, [post, inside], wanted)
    compiled = LanguageModelSubject(model, [post, inside], wanted, compile_layers=True)
    assert len(compiled_forwards) == 2  # the third layer is read inside
    for name, activations in compiled.activations(IDS).items():
        close(activations, plain.activations(IDS)[name])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_and_device_maps_are_passed_on(model, make_sae, attention, monkeypatch):
    source, _ = make_sae("a", "blocks.1.hook_resid_post")
    plain = LanguageModelSubject(model, [source], {"a": [3, 7]})
    if "gemma2" in model and attention == "sdpa":
        pytest.skip("Gemma 2 caps attention scores, which SDPA cannot")
    loaded, load = [], AutoModel.from_pretrained
    monkeypatch.setattr(
        AutoModel, "from_pretrained", lambda *a, **options: loaded.append(options) or load(*a, **options)
    )
    other = LanguageModelSubject(
        model, [source], {"a": [3, 7]}, attn_implementation=attention, device_map="cpu", sae_dtype="bfloat16"
    )
    assert other._model.config._attn_implementation == attention
    assert loaded[0]["device_map"] == "cpu"
    assert other.activations(IDS)["a"].dtype == torch.bfloat16
    torch.testing.assert_close(other.activations(IDS)["a"].float(), plain.activations(IDS)["a"], atol=0.05, rtol=0.05)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_without_its_package_says_what_to_install(model, make_sae):
    source, _ = make_sae("a", "blocks.1.hook_resid_post")
    with pytest.raises(UserError, match=r"pip install 'rayinterp\[quant\]'"):
        LanguageModelSubject(model, [source], {"a": [0]}, quantization="8bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_quantised_model_reads_much_the_same(model, make_sae):
    source, _ = make_sae("a", "blocks.1.hook_resid_post")
    plain = LanguageModelSubject(model, [source], {"a": [3, 7]}, device="cuda", dtype="float32")
    quantised = LanguageModelSubject(model, [source], {"a": [3, 7]}, device="cuda", quantization="8bit")
    states = [subject.hidden_states(IDS)["a"] for subject in (plain, quantised)]
    assert float((states[0] - states[1]).norm() / states[0].norm()) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_overlapped_stream_gives_what_the_plain_one_gives(model, make_sae, monkeypatch):
    source, _ = make_sae("a", "blocks.1.hook_resid_post")
    subject = LanguageModelSubject(model, [source], {"a": list(range(D_SAE))}, device="cuda", dtype="float32")
    batches = [IDS.repeat(500, 1) + i % 5 for i in range(20)]
    plain = [subject._encode(subject.hidden_states(batch))["a"] for batch in batches]
    forward = subject._model.forward

    def slowly(**inputs):
        torch.cuda._sleep(50_000_000)  # on the model's stream: an encoder that does not wait reads too early
        return forward(**inputs)

    monkeypatch.setattr(subject._model, "forward", slowly)
    for expected, found in zip(plain, subject.stream(batches), strict=True):
        for ours, theirs in zip(found["a"], expected, strict=True):
            assert np.array_equal(ours, theirs)


def test_feature_ids_print_and_parse():
    assert str(FeatureId("layer_12", 4711)) == "layer_12/4711"
    assert FeatureId.parse("layer_12/4711") == FeatureId("layer_12", 4711)
    for text in ("layer_12", "layer_12/", "/3", "layer_12/x"):
        with pytest.raises(UserError, match="sae/index"):
            FeatureId.parse(text)


def test_saes_take_turns():
    features = [FeatureId(sae, i) for sae in ("a", "b") for i in range(2)]
    assert [str(f) for f in interleave(features)] == ["a/0", "b/0", "a/1", "b/1"]


def test_a_gpu_that_torch_does_not_see_is_not_passed_over_in_silence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for nothing in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert pick_device("auto") == "cpu"
    for given in ("0", "2,3", "GPU-5a1f", "MIG-5a1f"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert pick_device("cpu") == "cpu"
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={given}.*set device: cpu to go without"):
            pick_device("auto")
