"""Random models of real architectures, and a byte-level tokenizer, small enough to make in a test."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rayinterp.prompts import simulator_messages

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
SMALL_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": (GPT2Config, {**SMALL_GPT, "n_positions": 1024}),
    "gptj": (GPTJConfig, {**SMALL_GPT, "n_positions": 1024, "rotary_dim": 8}),  # a head with a bias
    # Every window ends within the header for some tokens of a record, and within the rule for others.
    "gemma2": (Gemma2Config, {**GROUPED, "head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 24}),
    "gemma3": (Gemma3TextConfig, {**GROUPED, "head_dim": 16, "sliding_window": 24, "layer_types": LAYER_TYPES}),
    "qwen2": (Qwen2Config, {**GROUPED, "use_sliding_window": True, "sliding_window": 24, "layer_types": LAYER_TYPES}),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 16}),
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": 24}),  # one window for all layers
    "cohere": (CohereConfig, {**GROUPED, "logit_scale": 0.25}),
    "cohere2": (Cohere2Config, {**GROUPED, "logit_scale": 0.25, "sliding_window": 24, "layer_types": LAYER_TYPES}),
}


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the simulator's own examples, so that words are pieces of several letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    texts = [message["content"] for message in simulator_messages("the word 'ago'", 5)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_model(folder: Path, kind: str = "llama", chat: bool = False, **changes: Any) -> str:
    """Writes a random model and its tokenizer; returns the folder."""
    tokenizer = make_tokenizer(chat)
    config_class, options = CONFIGS[kind]
    # Weights far larger than usual: the digits' probabilities must differ for a wrong position or mask to show.
    config = config_class(vocab_size=len(tokenizer), initializer_range=0.4, **{**options, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
