"""What an SAE reads here is what it reads in sae-lens: the same weights in transformers and in TransformerLens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config
from transformer_lens.pretrained import weight_conversions
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rayinterp.errors import UserError
from rayinterp.hook_points import NAMES, HookPoint, check_module, parse_hook_point
from rayinterp.saes import SaeSource
from rayinterp.subject import LanguageModelSubject

NUM_LAYERS, LAYER = 3, 1
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of the largest value of a tensor, in fp32. Seen: 1.3e-6 at most."""
IDS = torch.arange(24).reshape(3, 8) + 1

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
GEMMA = {**GROUPED, "sliding_window": 32, "query_pre_attn_scalar": 8}
TINY_LENS = {"d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 64, "n_layers": NUM_LAYERS, "n_ctx": 64, "d_vocab": 64,
    "n_key_value_heads": 2, "window_size": 32}  # fmt: skip
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=NUM_LAYERS, n_head=4, n_positions=64, n_ctx=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, rotary_pct=0.25),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": Qwen2Config(**{**GROUPED, "head_dim": 8}),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
}
CONVERSIONS = {
    "gpt2": weight_conversions.convert_gpt2_weights,
    "gpt_neox": weight_conversions.convert_neox_weights,
    "llama": weight_conversions.convert_llama_weights,
    "mistral": weight_conversions.convert_mistral_weights,
    "qwen2": weight_conversions.convert_qwen2_weights,
    "qwen3": weight_conversions.convert_qwen3_weights,
    "gemma2": weight_conversions.convert_gemma_weights,
    "gemma3": weight_conversions.convert_gemma_weights,
}


@pytest.fixture
def make_subject(tmp_path: Path) -> Callable[..., LanguageModelSubject]:
    """Builds a subject from a model folder and a small random SAE that reads one hook point, without BOS."""

    def make(folder: Path | str, hook_name: str, d_sae: int = 24, **metadata: Any) -> LanguageModelSubject:
        config = AutoConfig.from_pretrained(folder)
        d_in = width_of(hook_name, config.get_text_config())
        torch.manual_seed(1)
        cfg = StandardSAEConfig(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(hook_name=hook_name, prepend_bos=False))
        path = tmp_path / f"sae-{len(list(tmp_path.iterdir()))}"
        sae = StandardSAE(cfg)
        for key, value in metadata.items():
            sae.cfg.metadata[key] = value
        sae.save_model(path)
        return LanguageModelSubject(str(folder), [SaeSource("a", None, str(path))], {"a": list(range(d_sae))})

    return make


def width_of(hook_name: str, config: Any) -> int:
    """Width of a hook point of a small model."""
    if hook_name.endswith("hook_z"):
        return config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 4)
    return config.hidden_size


def random_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def lens_model(family, model, folder, center_writing_weights=False):
    """The same weights in TransformerLens, as sae-lens loads them: without processing."""
    if family == "gemma2":
        config = {**convert_hf_model_config("google/gemma-2-2b"), **TINY_LENS}
        config["attn_types"] = ["local", "global", "local"]
    elif family == "gemma3":
        config = {**convert_hf_model_config("google/gemma-3-1b-pt"), **TINY_LENS}
        config["attn_types"] = ["local", "local", "global"]
    else:
        config = convert_hf_model_config(str(folder))
    config = HookedTransformerConfig.from_dict(
        {**config, "init_weights": False, "device": "cpu", "tokenizer_name": None}
    )
    lens = HookedSAETransformer(config)
    lens.load_and_process_state_dict(
        CONVERSIONS[family](model, config),
        fold_ln=False,
        center_writing_weights=center_writing_weights,
        center_unembed=False,
        fold_value_biases=False,
    )
    return lens


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """(family, folder of a small model with random weights, what stands at every name in TransformerLens)."""
    model, folder = random_model(request.param), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    lens = lens_model(request.param, model, folder)
    with torch.no_grad():
        _, cache = lens.run_with_cache(IDS)
        found = {name: cache[f"blocks.{LAYER}.{name}"] for name in NAMES if f"blocks.{LAYER}.{name}" in cache}
        # TransformerLens fills these two only when asked to: they are what goes into the MLP's norm and into the MLP.
        found["mlp.hook_in"] = lens.blocks[LAYER].ln2(found.get("hook_resid_mid", found["hook_resid_pre"]))
        if request.param != "gpt_neox":
            found["hook_mlp_in"] = found["hook_resid_mid"]
    return request.param, str(folder), found


def relative_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_every_name_reads_what_transformer_lens_reads(family, make_subject):
    name, folder, lens = family
    parallel = {"hook_resid_mid", "hook_mlp_in"} if name == "gpt_neox" else set()
    assert lens.keys() == set(NAMES) - parallel
    for hook, theirs in lens.items():
        subject = make_subject(folder, f"blocks.{LAYER}.{hook}")
        (ours,) = subject.hidden_states(IDS).values()
        assert relative_difference(ours, theirs.flatten(2)) < MAX_RELATIVE_DIFFERENCE, hook


def test_centred_writing_weights_are_centred_for_layer_norm_alone(make_subject, tmp_path):
    for family, centred in (("gpt2", True), ("gpt_neox", True), ("llama", False)):
        model, folder = random_model(family), tmp_path / family.replace("llama", "third")  # it goes by names
        model.save_pretrained(folder)
        with torch.no_grad():
            _, cache = lens_model(family, model, folder, center_writing_weights=centred).run_with_cache(IDS)
        for hook in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"):
            kwargs = {"center_writing_weights": True}
            subject = make_subject(folder, f"blocks.{LAYER}.{hook}", model_from_pretrained_kwargs=kwargs)
            (ours,) = subject.hidden_states(IDS).values()
            difference = relative_difference(ours, cache[f"blocks.{LAYER}.{hook}"].flatten(2))
            assert difference < MAX_RELATIVE_DIFFERENCE, (family, hook)


def test_the_pass_ends_at_the_deepest_hook_point(make_subject, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "m")
    subject = make_subject(tmp_path / "m", "blocks.1.hook_attn_out")
    ran = []
    for name, module in subject._model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    subject.hidden_states(IDS)
    assert "layers.1.self_attn.o_proj" in ran and "layers.0.mlp" in ran
    assert "layers.1.mlp" not in ran and "norm" not in ran
    assert len(subject._model.layers) == 2


LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize(
    ("name", "config", "point"),
    [
        ("blocks.1.hook_resid_post", LLAMA, HookPoint(1, "layers.1", "output", True)),
        ("blocks.2.hook_resid_pre", FAMILIES["gpt2"], HookPoint(2, "h.2", "input", True)),
        ("blocks.1.attn.hook_z", LLAMA, HookPoint(1, "layers.1.self_attn.o_proj", "input", False)),
        ("model.layers.2", LLAMA, HookPoint(2, "layers.2", "output", True)),
        ("transformer.h.0", FAMILIES["gpt2"], HookPoint(0, "h.0", "output", True)),
        ("model.layers.1.self_attn.o_proj.input", LLAMA, HookPoint(1, "layers.1.self_attn.o_proj", "input", False)),
        ("model.layers.1.output", LLAMA, HookPoint(1, "layers.1", "output", True)),
        ("model.language_model.layers.1.mlp", LLAMA, HookPoint(1, "layers.1.mlp", "output", False)),
    ],
)  # fmt: skip
def test_names_become_modules(name, config, point):
    assert parse_hook_point(name, config) == point


def test_an_unmapped_name_is_refused_with_those_that_work():
    with pytest.raises(UserError, match=r"hook_q.*'llama'.*blocks\.N\.hook_resid_post.*model\.layers\.N\.mlp"):
        parse_hook_point("blocks.1.attn.hook_q", LLAMA)
    with pytest.raises(UserError, match=r"hook_resid_mid.*not mapped") as error:
        parse_hook_point("blocks.1.hook_resid_mid", FAMILIES["gpt_neox"])
    assert "blocks.N.hook_resid_mid" not in str(error.value)
    with pytest.raises(UserError, match="layers 0 to 2"):
        parse_hook_point("blocks.3.hook_resid_post", LLAMA)


def test_a_module_that_the_model_does_not_have_is_refused_with_those_that_it_has():
    model = random_model("llama").model
    check_module(model, parse_hook_point("model.layers.1.mlp", LLAMA), "model.layers.1.mlp")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mpl.*its layer 1 has self_attn.*mlp"):
        check_module(model, parse_hook_point("model.layers.1.mpl", LLAMA), "model.layers.1.mpl")
    with pytest.raises(UserError, match=r"it has embed_tokens, layers"):
        check_module(model, parse_hook_point("transformer.h.1", LLAMA), "transformer.h.1")


def test_a_family_that_is_not_known_still_has_its_residual_stream_and_its_own_names():
    class Unknown:
        model_type, num_hidden_layers = "novel", 4

    assert parse_hook_point("blocks.3.hook_resid_post", Unknown).module == "layers.3"
    assert parse_hook_point("model.layers.3.mixer", Unknown).module == "layers.3.mixer"
    with pytest.raises(UserError, match=r"'novel'.*blocks\.N\.hook_resid_pre"):
        parse_hook_point("blocks.3.hook_mlp_out", Unknown)


def test_a_subject_takes_a_multimodal_model_by_its_text_part(tmp_path, make_subject):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=FAMILIES["gemma3"], vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "m")
    subject = make_subject(tmp_path / "m", "blocks.1.hook_resid_post")
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[2]
    assert isinstance(subject, LanguageModelSubject)
    assert len(subject._model.layers) == 2
    (ours,) = subject.hidden_states(IDS).values()
    assert relative_difference(ours, expected) < MAX_RELATIVE_DIFFERENCE
