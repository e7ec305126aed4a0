"""What an encoder gives is what `sae.encode` gives, whatever was cut away before."""

import warnings

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig

from rayinterp.errors import UserError
from rayinterp.saes import Encoder, SaeSource, load_sae, read_card, variance_unexplained

D_IN, D_SAE, D_OUT = 16, 40, 12
WANTED = [3, 7, 8, 39]
METADATA = {"hook_name": "blocks.1.hook_mlp_out", "prepend_bos": False}
BUILT_FROM = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "standard, b_dec not subtracted": (StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
    "standard, layer norm": (StandardSAE, StandardSAEConfig, {"normalize_activations": "layer_norm"}),
    "standard, constant norm": (StandardSAE, StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}),
    "standard, heads": (StandardSAE, StandardSAEConfig, {"reshape_activations": "hook_z"}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
    "topk, rescaled by the decoder's norms": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "transcoder": (Transcoder, TranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_skip_transcoder": (
        JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}
    ),
    "jumprelu_transcoder": (
        JumpReLUTranscoder, JumpReLUTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}
    ),
}  # fmt: skip


def save_random(kind, folder):
    """A random SAE of the kind, saved; thresholds and gates such that features are on about half the time."""
    sae_class, config_class, options = BUILT_FROM[kind]
    name = "blocks.1.attn.hook_z" if "heads" in kind else METADATA["hook_name"]
    metadata = SAEMetadata(**{**METADATA, "hook_name": name}, hook_name_out="blocks.1.hook_mlp_out")
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **options))
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.4)
    if hasattr(sae, "threshold"):
        sae.threshold.data.abs_()
    sae.save_model(folder)
    return SaeSource("a", None, str(folder))


@pytest.fixture
def hidden():
    return torch.randn(3, 6, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", list(BUILT_FROM))
@pytest.mark.parametrize("features", [WANTED, list(range(D_SAE))])
def test_activations_are_those_of_sae_lens(kind, features, tmp_path, hidden):
    source = save_random(kind, tmp_path / "sae")
    expected = load_sae(source).encode(hidden)
    found = Encoder(load_sae(source), features)(hidden)
    assert 0.03 < float((expected != 0).float().mean()) < 0.97
    torch.testing.assert_close(found, expected[..., features], rtol=1e-5, atol=1e-6)
    assert torch.equal(found == 0, expected[..., features] == 0)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "transcoder"])
def test_an_encoder_keeps_the_requested_rows_alone(kind, tmp_path):
    encoder = Encoder(load_sae(save_random(kind, tmp_path / "sae")), WANTED)
    kept = sum(parameter.numel() for parameter in encoder._sae.parameters())
    assert kept <= len(WANTED) * (D_IN + 4) + 2 * D_IN * D_OUT


def test_batch_topk_is_harvested_as_the_jumprelu_that_sae_lens_saves_it_as(tmp_path, hidden):
    torch.manual_seed(0)
    options = {"k": 5, "rescale_acts_by_decoder_norm": False, "metadata": SAEMetadata(**METADATA)}
    config = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **options)
    training = BatchTopKTrainingSAE(config)
    training.W_enc.data.normal_(0, 0.4)
    training.topk_threshold.fill_(0.5)
    training.save_inference_model(tmp_path / "sae")
    source = SaeSource("a", None, str(tmp_path / "sae"))
    assert read_card(source).architecture == "jumprelu"
    pre = training.process_sae_in(hidden) @ training.W_enc + training.b_enc
    found = Encoder(load_sae(source), WANTED)(hidden)
    torch.testing.assert_close(found, (pre * (pre > 0.5))[..., WANTED])


def test_a_norm_that_sae_lens_folds_into_the_weights_of_a_release_stays_folded(tmp_path, hidden):
    sae = load_sae(save_random("standard", tmp_path / "sae"))
    before = sae.encode(hidden)
    sae.fold_activation_norm_scaling_factor(0.7)
    expected = sae.encode(hidden)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(Encoder(sae, WANTED)(hidden), expected[..., WANTED])


def test_variance_unexplained_is_zero_for_the_truth_and_one_for_the_mean(hidden):
    assert variance_unexplained(lambda x: x, hidden, hidden) == 0
    mean = hidden.flatten(0, -2).mean(0)
    assert variance_unexplained(lambda x: mean.expand_as(x), hidden, hidden) == pytest.approx(1)


def test_a_transcoder_is_measured_on_what_it_reconstructs(tmp_path, hidden):
    sae = load_sae(save_random("transcoder", tmp_path / "sae"))
    assert variance_unexplained(sae, hidden, sae(hidden)) == pytest.approx(0, abs=1e-6)


def test_cards_of_old_and_new_configs_say_the_same(tmp_path):
    save_random("jumprelu", tmp_path / "new")
    new = read_card(SaeSource("a", None, str(tmp_path / "new")))
    assert (new.architecture, new.d_in, new.d_sae) == ("jumprelu", D_IN, D_SAE)
    assert (new.hook_name, new.prepend_bos, new.centred) == ("blocks.1.hook_mlp_out", False, False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cfg.json").write_text(
        f'{{"d_in": {D_IN}, "d_sae": {D_SAE}, "hook_point": "blocks.1.hook_mlp_out", "activation_fn_str": "topk",'
        ' "model_from_pretrained_kwargs": {"center_writing_weights": true}}'
    )
    old = read_card(SaeSource("a", None, str(tmp_path / "old")))
    assert (old.architecture, old.hook_name, old.prepend_bos, old.centred) == ("topk", new.hook_name, True, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"architecture": "abstopk"', "'abstopk', which cannot be harvested; these can: gated"),
        ('"architecture": "batchtopk"', "save_inference_model"),
        ('"hook_head_index": 3', "a single attention head"),
        ('"hook_name": null', "does not say where it reads"),
    ],
)
def test_what_cannot_be_harvested_is_refused_from_the_card(tmp_path, change, message):
    name = "" if "hook_name" in change else ', "hook_name": "blocks.0.attn.hook_z"'
    (tmp_path / "cfg.json").write_text(f'{{"d_in": 4, "d_sae": 8{name}, {change}}}')
    with pytest.raises(UserError, match=message):
        read_card(SaeSource("a", None, str(tmp_path)))


def test_a_card_of_a_release_prefers_the_module_that_transformers_names(monkeypatch):
    loaded = {
        "architecture": "jumprelu_transcoder", "d_in": 4, "d_sae": 8, "hook_name": "blocks.3.hook_mlp_in",
        "hook_name_out": "blocks.3.hook_mlp_out", "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm.output", "prepend_bos": True,
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(
        "sae_lens.loading.pretrained_sae_loaders.load_sae_config_from_huggingface",
        lambda release, sae_id: asked.append((release, sae_id)) or loaded,
    )
    card = read_card(SaeSource("a", "some-release", "layer_3"))
    assert asked == [("some-release", "layer_3")]
    assert (card.hook_name, card.hook_name_out) == (loaded["hf_hook_name"], loaded["hf_hook_name_out"])
    assert card.prepend_bos


def test_a_release_is_loaded_by_its_name(monkeypatch, tmp_path):
    sae = load_sae(save_random("standard", tmp_path / "sae"))
    asked = []
    monkeypatch.setattr("sae_lens.SAE.from_pretrained", lambda *names, **options: asked.append((names, options)) or sae)
    assert load_sae(SaeSource("a", "some-release", "layer_3"), dtype="bfloat16") is sae
    assert asked == [(("some-release", "layer_3"), {"device": "cpu", "dtype": "bfloat16"})]


def test_loading_an_sae_of_a_centred_model_warns_of_nothing(tmp_path):
    source = save_random("standard", tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    kwargs = '"prepend_bos": false, "model_from_pretrained_kwargs": {"center_writing_weights": true}'
    path.write_text(path.read_text().replace('"prepend_bos": false', kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sae(source)
    assert read_card(source).centred
