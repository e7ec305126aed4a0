"""The simulator's prompt: escaping, assembly, chat templates."""

import pytest
from tokenizers import AddedToken

from rayinterp.errors import UserError
from rayinterp.prompts import SIMULATOR_EXAMPLES, simulator_messages
from rayinterp.simulate.prompt_tokens import PromptTokens, escape_token
from tests.simulate.tiny_simulators import make_tokenizer


@pytest.mark.parametrize(
    ("token", "line"),
    [
        (" ago", " ago"),
        ("\t", "\\t"),
        (" \n\n", " \\n\\n"),
        ("\x00", "\\x00"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("unknown", "un-known"),
        (" unknowns", " un-knowns"),
        ("", "''"),
        ("é�", "é�"),
    ],
)
def test_escaped_tokens_fit_a_line(token, line):
    assert escape_token(token) == line


@pytest.mark.parametrize("chat", [True, False])
def test_every_token_is_read_at_its_own_tab(chat):
    tokenizer = make_tokenizer(chat)
    prompt = PromptTokens(tokenizer, 2)
    tokens = (" kneaded", "\t", "a\tb", "unknown", "", "<|im_end|>", " \n", "5")
    ids, reads = prompt.record(tokens)
    assert len(reads) == len(tokens)
    written = tokenizer.decode(ids)
    assert written.count("\t") == len(tokens)
    lines = (tokenizer.decode(ids[: read + 1]).split("\n")[-1] for read in reads)
    assert list(lines) == [f"{escape_token(token)}\t" for token in tokens]
    assert reads[-1] == len(ids) - 1
    special = set(tokenizer.all_special_ids)
    assert not special & set(ids + prompt.rule("<|im_end|>")[:3]), "a token of the corpus became a special token"


@pytest.mark.parametrize("chat", [True, False])
def test_the_whole_prompt_reads_as_the_template_writes_it(chat):
    tokenizer = make_tokenizer(chat)
    prompt = PromptTokens(tokenizer, 3)
    text = tokenizer.decode(prompt.header + prompt.rule("the word\n 'ago'") + prompt.record((" a", " b")).ids)
    assert text.count("The detector responds to:") == 4
    assert text.endswith("\n a\tunknown\n b\t")
    assert "The detector responds to: the word 'ago'\nTokens and ratings:" in text
    assert text.startswith("<|im_start|>user\n" if chat else "A detector")
    # Rating lines of the header are made of the same pieces as those of a record.
    line = prompt.record((" the", "x")).ids[: prompt.record((" the",)).reads[-1] + 3]
    assert any(prompt.header[i : i + len(line)] == line for i in range(len(prompt.header)))


def test_a_tokenizer_without_single_digits_is_refused_with_all_reasons():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("\tun", normalized=False)])
    tokenizer.backend_tokenizer.normalizer = None
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("4", "four")
    with pytest.raises(UserError, match="the digit 4 is the tokens") as refusal:
        PromptTokens(tokenizer, 1)
    assert "2024" in str(refusal.value), "the second problem is missing"


def test_examples_are_mostly_zeros():
    ratings = [rating for example in SIMULATOR_EXAMPLES for _, rating in example.ratings if rating is not None]
    assert ratings.count(0) > 0.7 * len(ratings)
    assert all(any(rating for _, rating in example.ratings) for example in SIMULATOR_EXAMPLES)
    assert len(simulator_messages("r", 2)) == 5
