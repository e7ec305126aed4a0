"""Small models with random weights and real architectures, with a tokenizer and SAEs, as folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from rayinterp.planted import VOCABULARY, documents

D_MODEL, NUM_LAYERS, D_SAE = 32, 3, 48
WORDS = ("<s>", "<unk>", *VOCABULARY)
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": D_MODEL, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=len(WORDS), n_embd=D_MODEL, n_layer=NUM_LAYERS, n_head=4, n_positions=64),
    "gemma-2-9b": Gemma2Config(**SIZES, sliding_window=32, query_pre_attn_scalar=8),
    "llama-3.1-8b": LlamaConfig(**SIZES),
}
"""By the name of the config file that stands for the real model."""


def save_model(name: str, folder: Path) -> None:
    """A causal LM of the architecture of `configs/<name>.yaml`, and a tokenizer of the planted words."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)


def save_sae(name: str, folder: Path, hook_name: str) -> None:
    """A random SAE of the kind that the config's release holds; every feature fires now and then."""
    torch.manual_seed(1)
    metadata = SAEMetadata(hook_name=hook_name, prepend_bos=True)
    if name == "gemma-2-9b":
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=D_SAE, apply_b_dec_to_input=False, metadata=metadata))
        sae.threshold.data.fill_(1.0)
    else:
        sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4, metadata=metadata))
    sae.W_enc.data.normal_(0, 0.3)
    sae.save_model(folder)


def save_corpus(path: Path, num_documents: int = 120) -> None:
    """Planted sentences as the Pile's JSON lines."""
    rng = random.Random(0)
    chosen = rng.sample(list(documents(0, num_documents=400)), num_documents)
    path.write_text("".join(json.dumps(document) + "\n" for document in chosen))
