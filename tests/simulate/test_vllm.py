"""The vLLM engine against the packed one, on the embedded model: `make test-vllm` runs it in an environment of its own.

Imports nothing that a machine with vllm, torch and transformers alone would lack.
"""

import os

import numpy as np
import pytest

from rayinterp.errors import UserError
from rayinterp.simulate.simulator import RuleRequest, TokenSequence

pytestmark = pytest.mark.vllm

SEQUENCES = tuple(
    TokenSequence(number, tuple(f" {word}" for word in text.split()))
    for number, text in enumerate(
        (
            "It was four years ago that the war had ended .",
            "The committee met again in March and agreed on the plan",
            "unknown \\t <|endoftext|> def main ( ) :",
        )
    )
)
REQUESTS = [RuleRequest("the word 'ago' after a number of years", SEQUENCES), RuleRequest("months", SEQUENCES[:2])]
TOLERANCE = 1e-3
"""Of a log-probability in float32."""


@pytest.fixture(scope="module")
def model() -> str:
    pytest.importorskip("vllm", reason="vllm is not installed here; `make test-vllm` brings an environment with it")
    return os.environ["RAYINTERP_TEST_MODEL"]


@pytest.fixture(scope="module")
def simulator(model):
    from rayinterp.simulate.vllm import VllmSimulator

    return VllmSimulator(model, dtype="float32", num_few_shots=2, max_model_len=2048, block_size=32)


def largest_difference(found, expected) -> float:
    return max(
        np.abs(a - b).max() for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def expected(model):
    from rayinterp.simulate.transformers import TransformersSimulator

    return TransformersSimulator(model, dtype="float32", device="cpu", num_few_shots=2).log_probs(REQUESTS)


def test_the_numbers_are_those_of_the_packed_engine(simulator, expected):
    found = simulator.log_probs(REQUESTS)
    difference = largest_difference(found, expected)
    assert difference < TOLERANCE, difference
    spread = max(np.ptp(values, axis=0).max() for of_request in expected for values in of_request)
    assert spread > 100 * TOLERANCE, "the model is too dull to show a mistake"


def test_what_the_cache_holds_is_computed_again_where_it_is_asked_for(simulator, expected):
    """All prompts are in the prefix cache by now, which returns the end of each alone."""
    assert largest_difference(simulator.log_probs(REQUESTS), expected) < TOLERANCE
    twice = [RuleRequest("months", (SEQUENCES[0], SEQUENCES[0]))] * 2
    assert largest_difference(simulator.log_probs(twice), [[expected[1][0]] * 2] * 2) < TOLERANCE


def test_a_prompt_beyond_the_models_positions_is_refused(simulator):
    with pytest.raises(UserError, match=r"has \d+ tokens and the model has \d+ positions"):
        simulator.log_probs([RuleRequest("r", (TokenSequence(9, (" word",) * 9000),))])
