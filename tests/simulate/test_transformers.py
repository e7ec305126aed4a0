"""The packed engine against one prompt at a time, and what it refuses."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, GPTNeoConfig

from rayinterp.errors import UserError
from rayinterp.prompts import surprisal_prefix
from rayinterp.simulate.prompt_tokens import PromptTokens
from rayinterp.simulate.simulator import NULL_EXPLANATIONS, RuleRequest, TokenSequence, expected_value
from rayinterp.simulate.transformers import TransformersSimulator
from tests.simulate.tiny_simulators import save_model

TOLERANCE = 2e-4
"""Of a log-probability in float32, over networks whose weights are 20 times the usual size."""

SEQUENCES = (
    TokenSequence(1, (" It", " was", " four", " years", " ago", ",")),
    TokenSequence(2, ("\t", "unknown", "<|endoftext|>", "\n\n")),
    TokenSequence(3, (" the", " navy", " of", " Spain", ".", " It", " was", " late")),
)
REQUESTS = [RuleRequest("the word 'ago'", SEQUENCES), RuleRequest("ships and the navy of a country", SEQUENCES[1:])]
OPTIONS = {"dtype": "float32", "device": "cpu", "num_few_shots": 1}


def one_prompt_at_a_time(folder: str, rule: str, sequence: TokenSequence, extra: str = "") -> np.ndarray:
    """Next-token log-probabilities of the digits after `... token<TAB>`, each from a prompt that ends there."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = PromptTokens(tokenizer, OPTIONS["num_few_shots"])

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    escaped = {"\t": "\\t", "\n\n": "\\n\\n", "unknown": "un-known"}
    digits = [encode(digit)[0] for digit in "012345"]
    ids = prompt.header + prompt.rule(rule)
    rows = []
    for token in sequence.tokens:
        ids = ids + encode(escaped.get(token, token)) + encode("\t")
        with torch.inference_mode():
            logits = model(torch.tensor([ids + encode(extra)])).logits[0, -1]
        rows.append(logits[digits].float().log_softmax(-1).numpy())
        ids = ids + encode("unknown") + encode("\n")
    return np.array(rows)


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gptj", "gemma2", "gemma3", "qwen2", "qwen3", "mistral", "cohere", "cohere2"]
)
def test_packed_tree_equals_one_prompt_at_a_time(tmp_path, kind):
    folder = save_model(tmp_path, kind, chat=kind == "llama")
    in_one_pass, in_many = (
        TransformersSimulator(folder, token_budget=budget, **OPTIONS).log_probs(REQUESTS) for budget in (2048, 60)
    )
    for request, packed, cut in zip(REQUESTS, in_one_pass, in_many, strict=True):
        for index, sequence in enumerate(request.sequences):
            expected = one_prompt_at_a_time(folder, request.rule, sequence)
            assert packed[index].shape == (len(sequence.tokens), 6)
            assert packed[index].dtype == np.float32
            assert np.abs(packed[index] - expected).max() < TOLERANCE
            assert np.abs(cut[index] - expected).max() < TOLERANCE
            assert np.ptp(expected, axis=0).min() > 100 * TOLERANCE, "the model is too dull to show a mistake"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="flex attention is compiled, which needs a C++ compiler")
def test_flex_attention_equals_eager(tmp_path):
    """Soft-capping and sliding windows in one model; on a CPU, where flex attention is exact and slow."""
    folder = save_model(tmp_path, "gemma2")
    eager, flex = (
        TransformersSimulator(folder, attn_implementation=a, **OPTIONS).log_probs(REQUESTS)
        for a in ("eager", "flex_attention")
    )
    for one, other in zip(eager, flex, strict=True):
        for expected, found in zip(one, other, strict=True):
            assert np.abs(expected - found).max() < TOLERANCE


def test_predictions_are_read_at_the_tab(tmp_path):
    folder = save_model(tmp_path)
    (answer,) = TransformersSimulator(folder, **OPTIONS).log_probs([RuleRequest("r", SEQUENCES[:1])])
    at_tab, at_unknown = (one_prompt_at_a_time(folder, "r", SEQUENCES[0], extra) for extra in ("", "unknown"))
    assert np.abs(answer[0] - at_tab).max() < TOLERANCE
    assert np.abs(answer[0] - at_unknown).max(axis=1).min() > 100 * TOLERANCE
    assert np.abs(answer[0][1:] - at_tab[:-1]).max(axis=1).min() > 100 * TOLERANCE  # one line early


def test_null_explanations_are_computed_once_per_sequence(tmp_path, monkeypatch):
    simulator = TransformersSimulator(save_model(tmp_path), calibration="difference", **OPTIONS)
    asked = []
    log_probs = simulator.log_probs
    monkeypatch.setattr(simulator, "log_probs", lambda requests: asked.extend(requests) or log_probs(requests))
    (first,) = simulator.simulate([RuleRequest("r", SEQUENCES[:2])])
    (second,) = simulator.simulate([RuleRequest("r", SEQUENCES)])
    nulls = [s.sequence_id for request in asked if request.rule in NULL_EXPLANATIONS for s in request.sequences]
    assert sorted(nulls) == sorted([1, 2, 3] * len(NULL_EXPLANATIONS))
    np.testing.assert_allclose(first[0], second[0], atol=5 * TOLERANCE)

    assert ((first[0] >= 0) & (first[0] <= 5)).all()


def test_calibration_is_applied_by_simulate_alone(tmp_path):
    folder = save_model(tmp_path)
    plain = TransformersSimulator(folder, calibration="none", **OPTIONS)
    request = [RuleRequest("the word 'ago'", SEQUENCES[:1])]
    np.testing.assert_allclose(plain.simulate(request)[0][0], expected_value(plain.log_probs(request)[0][0]))
    (null,) = TransformersSimulator(folder, calibration="difference", **OPTIONS).simulate(
        [RuleRequest(NULL_EXPLANATIONS[0], SEQUENCES[:1])]
    )
    assert null[0].max() < plain.simulate(request)[0][0].max()


def test_refuses_what_it_cannot_pack(tmp_path):
    with pytest.raises(UserError, match=r"has \d+ tokens and the model \(gpt2\) has 64 positions"):
        TransformersSimulator(save_model(tmp_path / "short", "gpt2", n_positions=64), **OPTIONS)
    simulator = TransformersSimulator(save_model(tmp_path / "limit", "gpt2", n_positions=400), **OPTIONS)
    with pytest.raises(UserError, match="Use shorter sequences"):
        simulator.log_probs([RuleRequest("r", (TokenSequence(1, (" word",) * 200),))])
    with pytest.raises(UserError, match="num_few_shots is 99"):
        TransformersSimulator(save_model(tmp_path / "shots"), num_few_shots=99)


def test_refuses_layers_that_count_their_window_by_place_in_the_row(tmp_path):
    folder = save_model(tmp_path)
    config = GPTNeoConfig(
        vocab_size=500, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(UserError, match="local layers count their window"):
        TransformersSimulator(folder, **OPTIONS)


def test_refuses_models_without_position_ids(tmp_path):
    folder = save_model(tmp_path)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=500, hidden_size=32, n_layer=1, n_head=2))
    bloom.save_pretrained(folder)
    with pytest.raises(UserError, match="takes no position_ids"):
        TransformersSimulator(folder, **OPTIONS)


def test_imports_with_torch_and_transformers_alone():
    absent = (
        "ray lance lance_ray lancedb pyarrow datasets pydantic jaxtyping sae_lens sentence_transformers openai yaml"
    )
    modules = "rayinterp.simulate.prompt_tree, rayinterp.simulate.transformers, rayinterp.subject"
    # huggingface_hub needs yaml itself: it is taken away once transformers is there.
    code = f"import sys, transformers; sys.modules.update(dict.fromkeys({absent.split()})); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def one_text_at_a_time(folder: str, description: str, sequence: TokenSequence) -> np.ndarray:
    """Losses of a text's tokens behind a description, from the model as it was saved."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    before, text = encode(surprisal_prefix(description)), encode(" " + "".join(sequence.tokens).strip())
    with torch.inference_mode():
        log_probs = model(torch.tensor([before + text])).logits[0].float().log_softmax(-1)
    places = range(len(before), len(before) + len(text))
    return np.array([-log_probs[place - 1, token].item() for place, token in zip(places, text, strict=True)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gptj"])
def test_losses_equal_one_text_at_a_time(tmp_path, kind):
    """Tied and untied heads, one with a bias; gemma2 caps its logits and has sliding windows."""
    folder = save_model(tmp_path, kind, chat=kind == "llama")
    in_one_pass, in_many = (TransformersSimulator(folder, token_budget=b, **OPTIONS) for b in (2048, 60))
    digits = in_one_pass.log_probs(REQUESTS)
    whole, cut = (simulator.token_losses(REQUESTS) for simulator in (in_one_pass, in_many))
    for request, packed, in_parts in zip(REQUESTS, whole, cut, strict=True):
        for index, sequence in enumerate(request.sequences):
            expected = one_text_at_a_time(folder, request.rule, sequence)
            assert packed[index].shape == in_parts[index].shape == expected.shape and len(expected) > 1
            np.testing.assert_allclose(packed[index], expected, atol=10 * TOLERANCE)
            np.testing.assert_allclose(in_parts[index], expected, atol=10 * TOLERANCE)
    # The digits' head is back in its place.
    for before, after in zip(digits, in_one_pass.log_probs(REQUESTS), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    same_texts = [request._replace(sequences=SEQUENCES[1:]) for request in REQUESTS]
    (first, *_), (other, *_) = in_one_pass.token_losses(same_texts)
    assert np.abs(first - other).max() > 100 * TOLERANCE, "the description makes no difference"


def test_a_text_without_visible_tokens_has_losses_or_none(tmp_path):
    (answer,) = TransformersSimulator(save_model(tmp_path), **OPTIONS).token_losses(
        [RuleRequest("r", (TokenSequence(1, ("\n", " ")), TokenSequence(2, (" a",))))]
    )
    assert [np.isfinite(losses).all() for losses in answer] == [True, True]


TEXTS = ["the word 'ago'", "a hope that is never said aloud", "unknown", "tabs\tand\nnew lines", "ships"]


def rated_one_at_a_time(folder: str, text: str, behind: str = "\t") -> np.ndarray:
    """Log-probabilities of the digits behind the whole prompt as one text, written out here."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = PromptTokens(tokenizer, 1).rating_header()
    escaped = {"unknown": "un-known", "tabs\tand\nnew lines": "tabs\\tand\\nnew lines"}
    for piece in (escaped.get(text, text), *behind.partition("\t")[1:]):
        ids = ids + tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    digits = [tokenizer(digit, add_special_tokens=False).input_ids[0] for digit in "012345"]
    return logits[digits].float().log_softmax(-1).numpy()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_ratings_equal_one_text_at_a_time(tmp_path, kind):
    folder = save_model(tmp_path, kind, chat=kind == "llama")
    in_one_pass, in_many = (TransformersSimulator(folder, token_budget=b, **OPTIONS).rate(TEXTS) for b in (2048, 30))
    for text, packed, cut in zip(TEXTS, in_one_pass, in_many, strict=True):
        expected = rated_one_at_a_time(folder, text)
        assert np.abs(packed - expected).max() < TOLERANCE
        assert np.abs(cut - expected).max() < TOLERANCE
        assert np.abs(packed - rated_one_at_a_time(folder, text, "\tunknown")).max() > 100 * TOLERANCE


def test_a_rating_is_read_at_the_tab_before_unknown(tmp_path, monkeypatch):
    """Logits by hand: where the token is a tab, digit 4; everywhere else digit 1."""
    simulator = TransformersSimulator(save_model(tmp_path), **OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    (tab,) = tokenizer("\t", add_special_tokens=False).input_ids
    forward = simulator._model.forward

    def by_hand(input_ids, **options):
        answer = forward(input_ids=input_ids, **options)
        digit = torch.where(input_ids == tab, 4, 1)
        answer.logits = torch.nn.functional.one_hot(digit, 6).float() * 50
        return answer

    monkeypatch.setattr(simulator._model, "forward", by_hand)
    ratings = expected_value(np.asarray(simulator.rate(TEXTS)))
    np.testing.assert_allclose(ratings, 4, atol=1e-4)


def test_rating_leaves_simulations_as_they_are(tmp_path):
    simulator = TransformersSimulator(save_model(tmp_path), **OPTIONS)
    before = simulator.log_probs(REQUESTS)
    first = simulator.rate(TEXTS)
    for one, two in zip(before, simulator.log_probs(REQUESTS), strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(first, simulator.rate(TEXTS))
    assert simulator.rate([]) == []
