"""Explanations: what a rule is, how an LLM's answer becomes one, and how one is shown.

The explainer proposes, the simulator reads, the tables keep: all three pass these values around. A string
explanation is a structured one with a single rule of full strength, so that one simulator serves both forms.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple

MAX_STRENGTH = 5
MAX_RULE_CHARACTERS = 500
"""A longer rule is an essay, and would not fit beside a sequence in a simulator's prompt."""


class Rule(NamedTuple):
    """One reason for which the feature fires.

    Example:
        `Rule("the word 'ago' after a number of years", 5)`
    """

    activates_on: str
    strength: int = MAX_STRENGTH

    @property
    def hash(self) -> str:
        """Key of the rule's words in `simulations`; strength is applied after simulation and plays no part."""
        return hashlib.sha256(self.activates_on.encode()).hexdigest()[:16]


Explanation = tuple[Rule, ...]
"""One or more rules; the feature's predicted activation is the largest that any of them predicts."""


class ParseError(ValueError):
    """The answer holds no valid explanation; the message says what is missing."""


def to_json(explanation: Explanation) -> str:
    return json.dumps([rule._asdict() for rule in explanation], ensure_ascii=False)


def from_json(text: str) -> Explanation:
    """Reads back what `to_json` wrote."""
    return tuple(Rule(**rule) for rule in json.loads(text))


def render(explanation: Explanation) -> str:
    """One line for people: rules joined by semicolons, with their strengths where they differ from full."""
    return "; ".join(
        rule.activates_on if rule.strength == MAX_STRENGTH else f"{rule.activates_on} ({rule.strength}/5)"
        for rule in explanation
    )


def claims(explanation: Explanation) -> tuple[str, ...]:
    """What it says the feature fires on, without strengths; rules of strength 0 say where it does not."""
    rules = [rule for rule in explanation if rule.strength] or explanation
    return tuple(rule.activates_on for rule in rules)


def wording(explanation: Explanation) -> str:
    """Its claims in one line."""
    return "; ".join(claims(explanation))


def rules_schema(rule_cap: int, max_characters: int | None = None) -> dict[str, Any]:
    """JSON schema of a structured answer. Endpoints want an object at the root, and every key required.

    Args:
        max_characters: Of a rule; endpoints refuse schemas with lengths.
    """
    lengths = {} if max_characters is None else {"minLength": 1, "maxLength": max_characters}
    rule = {
        "type": "object",
        "properties": {
            "activates_on": {"type": "string", **lengths},
            "strength": {"type": "integer", "minimum": 0, "maximum": MAX_STRENGTH},
        },
        "required": ["activates_on", "strength"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"rules": {"type": "array", "items": rule, "minItems": 1, "maxItems": rule_cap}},
        "required": ["rules"],
        "additionalProperties": False,
    }


def parse_structured(answer: str, rule_cap: int) -> Explanation:
    """Rules from an LLM's answer: strict about meaning, lenient about wrapping.

    The list may stand alone or as `{"rules": [...]}`. Code fences, prose around it, trailing commas and numbers such
    as "4" or 4.0 are accepted; strengths are clamped to 0-5 and rules beyond `rule_cap` are cut off. Of several lists
    the last valid one counts: those before it are drafts, or quote the explanation that is to be revised.

    Raises:
        ParseError: no JSON list of objects with a non-empty `activates_on` and a whole-number `strength`.
    """
    problem, found, rest = "no JSON list of rules in the answer", None, _said(answer)
    # An object follows the bracket: the others of an answer gone wrong may be thousands, each read to its end.
    while match := re.search(r"\[\s*\{", rest):
        rest = rest[match.start() :]
        items, length = _decode_list(rest)
        try:
            found = tuple(_to_rule(item) for item in items)[:rule_cap] or found
        except ParseError as error:
            problem, length = str(error), 1
        rest = rest[length:]
    if found is None:
        raise ParseError(problem)
    return found


def parse_string(answer: str) -> Explanation:
    """One sentence from an LLM's answer; quotes, code fences, a leading label, lines that announce what comes and all
    but the first line after them are dropped.

    Raises:
        ParseError: there is no text.
    """
    lines = [line.strip() for line in _said(answer).splitlines()]
    lines = [line for line in lines if re.search(r"\w", line) and not re.fullmatch(r"```\w*", line)]
    while len(lines) > 1 and lines[0].rstrip("*_").endswith(":"):
        del lines[0]
    text = re.sub(r"^(explanation|answer)\s*:\s*", "", lines[0], flags=re.IGNORECASE) if lines else ""
    text = text.strip().strip('"').strip()
    if not re.search(r"\w", text):
        raise ParseError("the answer holds no text")
    if len(text) > MAX_RULE_CHARACTERS:
        raise ParseError(f"the answer has {len(text)} characters; it may have {MAX_RULE_CHARACTERS}")
    return (Rule(text),)


_THOUGHT = re.compile(r"^[ \t]*<think>.*?(?:</think>|\Z)|\A.*?^[ \t]*</think>", re.DOTALL | re.MULTILINE)
"""At the beginning of lines: an explanation may be about the tags. Some chat templates say the first tag themselves."""


def _said(answer: str) -> str:
    """The answer without what a reasoning model thinks before it; nothing where the answer ends within that."""
    return _THOUGHT.sub("", answer)


def _decode_list(text: str) -> tuple[list[dict[str, Any]], int]:
    """The JSON list of objects that `text` begins with, and its length; trailing commas are forgiven.

    Returns:
        No items and the length of the bracket where there is none.
    """
    decoder = json.JSONDecoder()
    for candidate in (text, re.sub(r",(?=\s*[\]}])", " ", text)):  # a blank for each, so that the length stays
        try:
            value, length = decoder.raw_decode(candidate)
        except (ValueError, RecursionError):  # also numbers and nesting beyond Python's limits
            continue
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return value, length
    return [], 1


def _to_rule(item: dict[str, Any]) -> Rule:
    text = item.get("activates_on")
    if not isinstance(text, str) or not text.strip():
        raise ParseError(f"activates_on is {text!r}; it must be non-empty text")
    if len(text.strip()) > MAX_RULE_CHARACTERS:
        raise ParseError(f"activates_on has {len(text)} characters; it may have {MAX_RULE_CHARACTERS}")
    strength = item.get("strength")
    if isinstance(strength, bool) or not isinstance(strength, int | float | str):
        raise ParseError(f"strength is {strength!r}; it must be a whole number from 0 to 5")
    try:
        number = float(strength)
    except (ValueError, OverflowError):
        raise ParseError("strength is no number; it must be a whole number from 0 to 5") from None
    if not number.is_integer():
        raise ParseError(f"strength is {strength!r}; it must be a whole number from 0 to 5")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ParseError("activates_on holds half a character (a lone surrogate)") from None
    return Rule(text.strip(), min(max(int(number), 0), MAX_STRENGTH))
