"""LLM simulation in pairs per second: packed over a shared header, against one prompt a pair in batches of two."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from rayinterp import embedded
from rayinterp.simulate.simulator import RuleRequest, TokenSequence
from rayinterp.simulate.transformers import TransformersSimulator
from tests.benchmarks.measure import Row, compare

NAME = "simulation"
NUM_RULES, NUM_RECORDS, LENGTH = 3, 6, 32
RULES = ("the word 'ago'", "words about war and peace", "names of months")
TEXT = " The committee met again in March and agreed that the war had ended three years ago , after a long winter ."


def run() -> list[Row]:
    path = str(embedded.model_path(embedded.MODEL))
    words = TEXT.split(" ")[1:] * 3
    sequences = tuple(TokenSequence(i, tuple(f" {word}" for word in words[i : i + LENGTH])) for i in range(NUM_RECORDS))
    requests = [RuleRequest(rule, sequences) for rule in RULES[:NUM_RULES]]
    simulator = TransformersSimulator(path, dtype="float32", calibration="none")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = simulator._prompt
    prompts = [
        [*prompt.header, *prompt.rule(request.rule), *prompt.record(sequence.tokens).ids]
        for request in requests
        for sequence in request.sequences
    ]

    def packed() -> object:
        return simulator.log_probs(requests)

    @torch.inference_mode()
    def plain() -> object:
        for start in range(0, len(prompts), 2):
            pair = prompts[start : start + 2]
            width = max(map(len, pair))
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in pair])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in pair])
            model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        return None

    return [compare("simulation, packed prompt tree", packed, plain, len(prompts), "pairs/s", target=2.0)]
