"""The simulator's prompt as token ids, put together piece by piece.

    header | rule | token, tab, "unknown", newline, token, tab, ...

Tokenising the whole text would let some tokenisers merge across a tab; pieces keep every tab, and so every place
where a prediction is read, where it is known to be. Needs only a Hugging Face tokenizer; knows nothing of models.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from rayinterp.errors import UserError
from rayinterp.prompts import SIMULATOR_EXAMPLES, UNKNOWN, Message, abstractness_messages, simulator_messages
from rayinterp.simulate.simulator import NUM_DIGITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULE_SLOT = "@@rule@@"
"""Stands for the rule while the chat template is applied; the text is then cut here."""

RATING_LINE = re.compile(rf"([^\t\n]+)(\t)({UNKNOWN}|[0-{NUM_DIGITS - 1}])(\n?)")

PROBE = (" word", "2024", "\t", "\n\n", "", UNKNOWN, "<|endoftext|>", " é", "�")
"""Tokens that the prompt is tried with before the first record."""


class Record(NamedTuple):
    """One sequence as the end of a prompt."""

    ids: list[int]
    reads: list[int]
    """Index in `ids` of the tab behind each token: the logits there are the prediction."""


def escape_token(token: str) -> str:
    """A token as it can stand in a line of the prompt: visible, not empty, and not the word unknown."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
    return visible.replace(UNKNOWN, f"{UNKNOWN[:2]}-{UNKNOWN[2:]}") or "''"


class PromptTokens:
    """Turns rules and sequences into token ids for one tokenizer and one set of worked examples.

    Raises:
        UserError: the tokenizer cannot carry the prompt; the message lists all that failed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_few_shots: int) -> None:
        if not 1 <= num_few_shots <= len(SIMULATOR_EXAMPLES):
            raise UserError(
                f"num_few_shots is {num_few_shots}; there are 1 to {len(SIMULATOR_EXAMPLES)} worked examples"
            )
        self._tokenizer = tokenizer
        # A sequence's tokens come back for every rule.
        self._encode_text = lru_cache(maxsize=100_000)(self._encode_text_uncached)
        text = render(tokenizer, simulator_messages(RULE_SLOT, num_few_shots))
        before, found, after = text.partition(RULE_SLOT)
        assert found and RULE_SLOT not in after, f"the chat template changed {RULE_SLOT} in {text!r}"
        # The space before the rule goes with its first word, as in running text.
        self.header = self._bos() + self._encode_prompt(before.rstrip(" "))
        """Ids of everything before the rule."""
        self._after_rule = self._encode_prompt(after)
        self._tab, self._unknown, self._newline = (self._encode_text(text) for text in ("\t", UNKNOWN, "\n"))
        self.digit_ids = [(self._encode_text(str(digit)) or (-1,))[0] for digit in range(NUM_DIGITS)]
        """Ids of the digits 0 to 5."""
        self._check()

    def rule(self, rule: str) -> list[int]:
        """Ids of the rule and of what stands between it and the first token."""
        return [*self._encode_text(" " + " ".join(rule.split())), *self._after_rule]

    def rating_header(self) -> list[int]:
        """Ids of everything before a text that is rated; that stands in a line as a token does: `record((text,))`."""
        task, begun = abstractness_messages()
        return self._bos() + self._encode_prompt(render(self._tokenizer, [task]) + begun["content"] + "\n")

    def record(self, tokens: tuple[str, ...]) -> Record:
        """Ids of a sequence; it ends at its last tab, since nothing behind that is read."""
        assert tokens, "a sequence without tokens"
        ids: list[int] = []
        reads = []
        for token in tokens:
            ids += [*self._encode_text(escape_token(token)), *self._tab]
            reads.append(len(ids) - 1)
            ids += [*self._unknown, *self._newline]
        return Record(ids[: reads[-1] + 1], reads)

    def prefix(self, text: str) -> list[int]:
        """Ids of running text that others are read behind, as a base model meets it: without a chat template."""
        return [*self._first(), *self._encode_text(text)]

    def text(self, tokens: tuple[str, ...]) -> list[int]:
        """Ids of a sequence as running text."""
        return list(self._encode_text(" " + "".join(tokens).strip()))

    def _encode_text_uncached(self, text: str) -> tuple[int, ...]:
        """Text that others wrote: what looks like a special token in it stays text."""
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def _encode_prompt(self, text: str) -> list[int]:
        """Our own text with the template's special tokens; rating lines piece by piece, as in a record."""
        pieces = (piece for piece in RATING_LINE.split(text) if piece)
        return [i for piece in pieces for i in self._tokenizer(piece, add_special_tokens=False).input_ids]

    def _bos(self) -> list[int]:
        """BOS before plain text; a chat template brings its own."""
        return [] if self._tokenizer.chat_template else self._first()

    def _first(self) -> list[int]:
        """BOS, where the tokenizer adds one to plain text."""
        first: list[int] = self._tokenizer("a").input_ids[:1]
        return first if first == [self._tokenizer.bos_token_id] else []

    def _check(self) -> None:
        """Refuses a tokenizer with which digits are not single tokens or lines do not read back as written."""
        problems = []
        for digit in range(NUM_DIGITS):
            ids = self._encode_text(str(digit))
            if len(ids) != 1 or self.digit_ids.count(ids[0]) != 1:
                problems.append(f"the digit {digit} is the tokens {list(ids)}, not one token of its own")
        for token in PROBE:
            record = self.record((token, token))
            written = f"{escape_token(token)}\t{UNKNOWN}\n{escape_token(token)}\t"
            read = self._tokenizer.decode(record.ids, clean_up_tokenization_spaces=False)
            if read != written:
                problems.append(f"the line {written!r} reads back as {read!r}")
            if [record.ids[i] for i in record.reads] != [*self._tab[-1:]] * 2:
                problems.append(f"the tab behind {token!r} was not found")
        if problems:
            name = self._tokenizer.name_or_path or type(self._tokenizer).__name__
            raise UserError(
                f"tokenizer {name} cannot carry the simulator's prompt:\n"
                + "\n".join(f"  {problem}" for problem in problems)
                + "\nChoose a simulator model with another tokenizer"
            )


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Messages by the tokenizer's chat template, up to where the answer begins; as plain text where it has none."""
    if not tokenizer.chat_template:
        return "".join(m["content"] + ("\n" if m["role"] == "user" else "\n\n") for m in messages)
    text = tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in messages],
        tokenize=False,
        add_generation_prompt=True,
        # Variables of some templates, ignored by others: today's date would be another prompt every day.
        date_string="01 Jan 2025",
        enable_thinking=False,
    )
    assert isinstance(text, str)
    return text
