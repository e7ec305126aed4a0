"""One feature explained in plain Python: no Ray, no tables, no config. `python examples/one_feature.py [feature]`

Reads the embedded model's first SAE on some documents of the embedded corpus, proposes rules from the words on which
the feature fires, predicts activations from the rules alone, and says how well the prediction holds on other documents.
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from transformers import AutoTokenizer

from rayinterp import embedded
from rayinterp.corpus import split_of, stable_hash
from rayinterp.explain.lexical import lexical_explanation
from rayinterp.explanation import MAX_STRENGTH, render
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord
from rayinterp.score import evaluate
from rayinterp.simulate.late_interaction import LateInteractionSimulator
from rayinterp.simulate.simulator import TokenSequence, rules_to_requests
from rayinterp.subject import LanguageModelSubject, SaeSource

NUM_DOCUMENTS, LENGTH, WINDOWS = 60, 32, 6


def read_sequences(tokenizer) -> list[tuple[int, list[int]]]:
    """(document id, token ids) of the first windows of some documents of every subset."""
    sequences = []
    for subset in embedded.CORPUS_SUBSETS:
        for _, document in zip(range(NUM_DOCUMENTS), embedded.documents(subset), strict=False):
            ids = tokenizer.encode(document["text"], add_special_tokens=False)[: LENGTH * WINDOWS]
            starts = range(0, len(ids) - LENGTH + 1, LENGTH)
            sequences += [(stable_hash(document["text"]), ids[start : start + LENGTH]) for start in starts]
    return sequences


def pick(records: list[ActivationRecord], count: int) -> list[ActivationRecord]:
    """The strongest records, and as many silent ones."""
    active = sorted((r for r in records if r.activations.max() > 0), key=lambda r: -r.activations.max())[:count]
    return active + [r for r in records if r.activations.max() == 0][:count]


def main(feature_index: int = 47, console: Console | None = None) -> float | None:
    """Explains one feature, by default a clear one."""
    console = console or Console()
    model = str(embedded.model_path(embedded.MODEL))
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    sequences = read_sequences(tokenizer)

    sae = SaeSource("layer", None, str(embedded.sae_path(embedded.SAES[0])))
    subject = LanguageModelSubject(model, [sae], {sae.name: list(range(2048))})
    ids = torch.tensor([window for _, window in sequences])
    activations = torch.cat([subject.activations(batch)[sae.name] for batch in ids.split(64)])
    feature = FeatureId(embedded.SAES[0], feature_index)
    values = activations[:, :, feature_index].numpy()

    splits = [split_of(0, document, (0.5, 0.2, 0.3)) for document, _ in sequences]
    scale = max(row.max() for row, split in zip(values, splits, strict=True) if split == "train")
    records: dict[str, list[ActivationRecord]] = {"train": [], "valid": [], "test": []}
    for number, ((document, window), row, split) in enumerate(zip(sequences, values, splits, strict=True)):
        tokens = TokenSequence(number, tuple(tokenizer.decode([i]) for i in window))
        source = "positive" if row.max() > 0 else "random_negative"
        records[split].append(
            ActivationRecord(tokens, document, source, tuple(window), MAX_STRENGTH * row / max(scale, 1e-9))
        )

    explanation = lexical_explanation(pick(records["train"], 15), rule_cap=3)
    if explanation is None:
        console.print(f"{feature} is silent on this text; try another feature")
        return None
    test = pick(records["test"], 20)
    simulator = LateInteractionSimulator(str(embedded.embedder_path(embedded.EMBEDDER)))
    predicted = simulator.simulate(rules_to_requests(explanation, [record.sequence for record in test]))
    simulated = {rule.activates_on: p for rule, p in zip(explanation, predicted, strict=True)}
    score, _ = evaluate(explanation, test, simulated)
    console.print(f"{feature}: {render(explanation)}", highlight=False)
    console.print(f"correlation on {len(test)} test records: {'undefined' if score is None else f'{score:.2f}'}")
    return score


if __name__ == "__main__":
    main(int(sys.argv[1])) if len(sys.argv) > 1 else main()
