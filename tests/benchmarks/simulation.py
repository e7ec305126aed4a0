"""LLM simulation: packed prompts against the reference's way and plain prompts; what the memo and Serve do to it.

The reference's way (its README): the header's KV cache is computed once, copied for every batch, two prompts a batch,
logits over the whole vocabulary at every position. Plain: every prompt from its beginning, in batches of two.
"""

from __future__ import annotations

import asyncio
import random

import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from rayinterp import embedded
from rayinterp.config import ServiceResources, TransformersSimulatorConfig
from rayinterp.explain.search import SearchSettings, TreeSearch
from rayinterp.explanation import Explanation, Rule
from rayinterp.simulate.serve import deploy_simulator
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, Memo, RuleRequest, TokenSequence, with_nulls
from rayinterp.simulate.transformers import TransformersSimulator
from tests.benchmarks._prompts import header_cached, plain
from tests.benchmarks.measure import Row, compare

NAME = "simulation"
NUM_RECORDS, LENGTH, NUM_SEARCHES = 6, 32, 32
RULES = ("the word 'ago'", "words about war and peace", "names of months")
TEXT = " The committee met again in March and agreed that the war had ended three years ago , after a long winter ."
TOKEN_BUDGET = 512
"""As in configs/demo.yaml: what suits a CPU."""


def records() -> tuple[TokenSequence, ...]:
    words = TEXT.split(" ")[1:] * 3
    return tuple(TokenSequence(i, tuple(f" {word}" for word in words[i : i + LENGTH])) for i in range(NUM_RECORDS))


def engines() -> list[Row]:
    path = str(embedded.model_path())
    requests = [RuleRequest(rule, records()) for rule in RULES]
    options = {"dtype": "float32", "device": "cpu", "calibration": "none", "token_budget": TOKEN_BUDGET}
    simulator = TransformersSimulator(path, **options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = simulator._prompt
    suffixes = [
        [*prompt.rule(request.rule), *prompt.record(sequence.tokens).ids]
        for request in requests
        for sequence in request.sequences
    ]
    prompts = [[*prompt.header, *suffix] for suffix in suffixes]

    def packed() -> None:
        simulator.log_probs(requests)

    def reference() -> None:
        header_cached(model, prompt.header, suffixes)

    def digits_alone() -> None:
        header_cached(simulator._model, prompt.header, suffixes)

    num_packed = sum(len(prompt.rule(r.rule)) for r in requests) + sum(
        len(prompt.record(s.tokens).ids) for r in requests for s in r.sequences
    )
    num_plain = sum(map(len, prompts))
    pairs = len(prompts)
    return [
        compare("packed against the reference's way", packed, reference, pairs, "pairs/s", target=2.0),
        compare("packed against plain prompts", packed, lambda: plain(model, prompts), pairs, "pairs/s", target=4.0),
        compare("the reference's way with six rows of the head", digits_alone, reference, pairs, "pairs/s", target=1.0),
        Row("tokens per pair, packed against plain", num_packed / pairs, num_plain / pairs, num_plain / num_packed,
            "tokens", None, None),
        Row("tokens of the header", float(len(prompt.header)), None, None, "tokens", None, None),
    ]  # fmt: skip


def trace(seed: int) -> list[Explanation]:
    """Candidates of one tree search whose revisions change one rule of the parent's three, as an LLM's mostly do."""
    rng = random.Random(seed)
    search = TreeSearch(SearchSettings(3, False, 2, 3, 3, 1.0))
    candidates = []
    while proposals := search.ask():
        for proposal in proposals:
            parent = search.nodes[proposal.parent].explanation if proposal.parent is not None else None
            rules = list(parent or (Rule(f"rule {rng.random()}", 5) for _ in range(3)))
            rules[rng.randrange(len(rules))] = Rule(f"rule {rng.random()}", rng.randint(1, 5))
            explanation = tuple(rules)
            candidates.append(explanation)
            search.tell(proposal.node, explanation=explanation, status="ok", train_score=rng.random(), valid_score=0.0)
    return candidates


def memo() -> list[Row]:
    """Tokens of records that a search simulates, with the memo and without."""
    sequences = records()
    asked = sent = 0
    for seed in range(20):
        known = Memo()
        for explanation in trace(seed):
            wanted = with_nulls([RuleRequest(rule.activates_on, sequences) for rule in explanation], "difference")
            missing = known.missing(wanted)
            known.add(missing, [[torch.zeros(len(s.tokens), 6).numpy() for s in r.sequences] for r in missing])
            asked += sum(len(s.tokens) for r in wanted for s in r.sequences)
            sent += sum(len(s.tokens) for r in missing for s in r.sequences)
    name = f"share of simulated tokens that the memo avoids, {len(NULL_EXPLANATIONS)} nulls a sequence"
    return [Row(name, 1 - sent / asked, None, None, "", None, None)]


def through_serve() -> list[Row]:
    """Many searches at once, one candidate each, against the same candidates one after another in this process."""
    config = TransformersSimulatorConfig(
        model=embedded.MODEL, dtype="float32", device="cpu", token_budget=TOKEN_BUDGET, calibration="none"
    )
    sequences = records()[:4]
    candidates = [[RuleRequest(f"{RULES[i % 3]} {i}", sequences)] for i in range(NUM_SEARCHES)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    handle = deploy_simulator("bench", config, ServiceResources(num_cpus=0.1), "simulator-bench")
    direct = TransformersSimulator(
        str(embedded.model_path()), dtype="float32", device="cpu", token_budget=TOKEN_BUDGET, calibration="none"
    )

    async def ask_all() -> list[object]:
        async def ask(candidate: list[RuleRequest]) -> object:
            return await handle.answer.remote(candidate)

        return await asyncio.gather(*(ask(candidate) for candidate in candidates))

    num_pairs = len(candidates) * len(sequences)
    row = compare(
        f"through Serve with {NUM_SEARCHES} searches at once, against the engine alone",
        lambda: asyncio.run(ask_all()),
        lambda: [direct.log_probs(candidate) for candidate in candidates],
        num_pairs,
        "pairs/s",
        target=0.9,
    )
    serve.shutdown()
    ray.shutdown()
    return [row]


def run() -> list[Row]:
    return [*engines(), *memo(), *through_serve()]
