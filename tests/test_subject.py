import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from rayinterp.errors import UserError
from rayinterp.subject import FeatureId, HookPoint, LanguageModelSubject, SaeSource, interleave, parse_hook_point

D_MODEL, D_SAE, LAYERS = 16, 24, 4
IDS = torch.arange(24).reshape(3, 8) + 1


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    """A small model with random weights and a tokenizer that has a BOS, as a folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=32, hidden_size=D_MODEL, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        LlamaModel(config).save_pretrained(path)
    else:
        GPT2Model(GPT2Config(vocab_size=32, n_embd=D_MODEL, n_layer=LAYERS, n_head=2)).save_pretrained(path)
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


def test_variance_unexplained_is_one_for_a_mean_and_zero_for_the_truth(model, make_sae):
    source, _ = make_sae("a", "blocks.1.hook_resid_post")
    subject = LanguageModelSubject(model, [source], {"a": [0]})

    class Predict(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function, self.cfg = function, subject._saes["a"].cfg

        def forward(self, x):
            return self.function(x)

    subject._saes["a"] = Predict(lambda x: x)
    assert subject.variance_unexplained(IDS)["a"] == 0
    subject._saes["a"] = Predict(lambda x: x.mean(0).expand_as(x))
    assert subject.variance_unexplained(IDS)["a"] == pytest.approx(1)


@pytest.mark.filterwarnings(r"ignore:[\s\S]*non-empty model_from_pretrained_kwargs:UserWarning")
def test_centred_writing_weights_centre_the_stream(model, make_sae):
    source, _ = make_sae("a", "blocks.1.hook_resid_post", model_from_pretrained_kwargs={"center_writing_weights": True})
    subject = LanguageModelSubject(model, [source], {"a": [0]})
    state = whole(model, IDS)[2]
    close(subject.hidden_states(IDS)["a"], state - state.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.1.hook_resid_post", HookPoint(1, "*.1", "output")),
        ("blocks.10.hook_resid_pre", HookPoint(10, "*.10", "input")),
        ("model.layers.9", HookPoint(9, "layers.9", "output")),
        ("transformer.h.3", HookPoint(3, "h.3", "output")),
    ],
)
def test_hook_points(name, hook):
    assert parse_hook_point(name) == hook


def test_an_unmapped_hook_point_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="hook_resid_post"):
        parse_hook_point("blocks.3.attn.hook_z")


def test_feature_ids_print_and_parse():
    assert str(FeatureId("layer_12", 4711)) == "layer_12/4711"
    assert FeatureId.parse("layer_12/4711") == FeatureId("layer_12", 4711)
    for text in ("layer_12", "layer_12/", "/3", "layer_12/x"):
        with pytest.raises(UserError, match="sae/index"):
            FeatureId.parse(text)


def test_saes_take_turns():
    features = [FeatureId(sae, i) for sae in ("a", "b") for i in range(2)]
    assert [str(f) for f in interleave(features)] == ["a/0", "b/0", "a/1", "b/1"]
