"""Harvest of 50 features of one SAE, and holistic activations, against the plain ways; the embedded model, in fp32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM

from rayinterp import embedded
from rayinterp.config import load_config
from rayinterp.postings import join_batches, to_postings
from rayinterp.saes import SaeSource, load_sae
from rayinterp.subject import LanguageModelSubject
from tests.benchmarks.measure import Row, compare

NAME = "harvest"
NUM_LAYERS, D_SAE, NUM_FEATURES = 30, 16_384, 50
NUM_SEQUENCES, LENGTH, BATCH = 128, 32, 64
NUM_HOLISTIC = 16
MODEL = embedded.MODEL
NUM_SAES = {"gpt2": 12, "gemma-2-9b": 21, "llama-3.1-8b": 16}
"""By config: all layers, or the even ones."""


def save_sae(folder: Path, layer: int) -> SaeSource:
    """A random JumpReLU SAE on which a few features in a hundred are active at a token."""
    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", prepend_bos=True)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=576, d_sae=D_SAE, metadata=metadata))
    sae.W_enc.data.normal_(0, 0.05)
    sae.threshold.data.fill_(2.0)
    sae.save_model(folder / f"sae_{layer}")
    return SaeSource(f"layer_{layer}", None, str(folder / f"sae_{layer}"))


def plain_harvest(model, sae, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """The reference's method: the whole model with its logits, the SAE at full width, its first 50 features dense."""
    stored = []
    for batch in ids.split(BATCH):
        with torch.no_grad():
            states = model(input_ids=batch, output_hidden_states=True).hidden_states[layer + 1]
            stored.append(sae.encode(states.float())[..., :NUM_FEATURES])
    return torch.cat(stored)


def compare_harvest(folder: Path, model, share: str, layer: int, target: float) -> Row:
    source = save_sae(folder, layer)
    features = list(range(NUM_FEATURES))
    subject = LanguageModelSubject(embedded.resolve(MODEL), [source], {source.name: features}, dtype="float32")
    sae = load_sae(source)
    ids = torch.randint(100, 40_000, (NUM_SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    with_bos = torch.nn.functional.pad(ids, (1, 0), value=subject._bos)

    def ours() -> object:
        batches = [batch[source.name] for batch in subject.stream(ids.split(BATCH))]
        return to_postings(join_batches(batches), source.name, features, shard=0)

    def reference() -> object:
        return plain_harvest(model, sae, layer, with_bos)

    found, expected = ours()["values"], reference()[:, 1:]
    assert sum(map(len, found.to_pylist())) == int((expected != 0).sum()), "not the same work"
    name = f"harvest of {NUM_FEATURES} features, hook {share} up (layer {layer} of {NUM_LAYERS})"
    return compare(name, ours, reference, ids.numel(), "tokens/s", target)


def compare_holistic(folder: Path) -> Row:
    source = save_sae(folder, 9)
    subject = LanguageModelSubject(
        embedded.resolve(MODEL), [source], {source.name: list(range(NUM_FEATURES))}, dtype="float32"
    )
    ids = torch.randint(100, 40_000, (NUM_HOLISTIC, LENGTH), generator=torch.Generator().manual_seed(0))

    def ours() -> object:
        return subject.holistic(ids)[source.name]

    def one_pass_per_token() -> object:
        whole = subject.activations(ids)[source.name].mean(1)
        shorter = [torch.cat([ids[:, :i], ids[:, i + 1 :]], dim=1) for i in range(LENGTH)]
        return torch.stack([whole - subject.activations(i)[source.name].mean(1) for i in shorter], dim=1)

    torch.testing.assert_close(ours(), one_pass_per_token(), atol=1e-4, rtol=1e-3)
    return compare("holistic activations of 16 sequences", ours, one_pass_per_token, NUM_HOLISTIC, "sequences/s", 1.5)


def avoided(config_name: str) -> Row:
    """Sequences of the corpus that no record of the config's needs holistic activations of, at least."""
    config = load_config(f"configs/{config_name}.yaml")
    num_features = NUM_SAES[config_name] * int(config.subject.features)
    recorded = num_features * sum(getattr(config.records, s).positive for s in config.records.holistic_splits)
    percent = 100 * (1 - min(1, recorded / config.corpus.num_sequences))
    return Row(f"holistic passes avoided, configs/{config_name}.yaml", percent, None, None, "% or more", None, None)


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = AutoModelForCausalLM.from_pretrained(embedded.resolve(MODEL), dtype=torch.float32).eval()
        rows = [
            compare_harvest(folder, model, "half-way", 14, 2.3),
            compare_harvest(folder, model, "a quarter", 7, 4.0),
            compare_holistic(folder),
        ]
    return [*rows, *(avoided(name) for name in NUM_SAES)]
