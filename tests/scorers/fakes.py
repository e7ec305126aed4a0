"""Services of a scorer that a test decides on. Actors load this module: it asks for none that is slow to load."""

import re
from pathlib import Path

import numpy as np

from rayinterp.explain.client import LLMError, LLMReply
from rayinterp.explanation import Rule
from rayinterp.planted import RULES, fires
from rayinterp.prompts import PLAIN_QUESTION
from rayinterp.scorers.actor import Services


def strongest(description: str, text: str) -> float:
    """How strongly the planted rules that a description names fire in a text."""
    rules = tuple(Rule(rule) for rule in description.split("; ") if rule in RULES)
    words = text.replace("<<", "").replace(">>", "").split()
    at = fires(rules, words)
    marks = ["<<" in word for word in text.split()]
    return max((value for value, mark in zip(at, marks, strict=True) if mark or not any(marks)), default=0.0)


class Fakes:
    """Picklable: an LLM that knows what planted rules mean, a model that reads texts, and a bill of what is asked."""

    def __init__(
        self, bill: Path, fails: str = "", mumbles: str = "", tried: Path | None = None, down: tuple[int, int] = (0, 0)
    ):
        """
        Args:
            fails, mumbles: Features on which calls fail, and on which answers do not parse.
            tried: Takes the features on which they failed.
            down: Calls that are answered before the LLM goes down, and those that it then refuses, of all kinds.
        """
        self.bill, self.fails, self.mumbles, self.tried, self.down = bill, fails, mumbles, tried, down
        self.asked = 0

    def __call__(self, config, tables, committer, name, key):
        return Services(self.generate, self.losses)

    async def generate(self, request, feature_key):
        self.asked += 1
        refuses = self.down[0] < self.asked <= sum(self.down)
        is_plain = request.messages == (PLAIN_QUESTION,)
        if is_plain and not refuses and self.fails != ".*":
            return LLMReply("ok", "stop", 1, 1)
        if refuses or re.fullmatch(self.fails, feature_key):
            if self.tried:
                with self.tried.open("a") as file:
                    file.write(feature_key + "\n")
            raise LLMError("APITimeoutError from m", True)
        with self.bill.open("a") as file:
            file.write(request.hash + "\n")
        question = next(m["content"] for m in reversed(request.messages) if "Text 1:" in m["content"])
        texts = re.findall(r"Text \d+: (.*)", question)
        if re.fullmatch(self.mumbles, feature_key):
            return LLMReply("Some of them do.", "stop", 1, 1)
        described = re.search(r"Description: (.*)", question)
        if described:
            return LLMReply(str([int(strongest(described[1], text) > 0) for text in texts]), "stop", 1, 1)
        truth = {"planted/0": "words about ships and the sea", "planted/2": "bowed string instruments; citrus fruits"}
        values = [strongest(truth.get(feature_key, "the word 'bank' soon after a river or stream"), t) for t in texts]
        return LLMReply(str(1 + int(np.argmin(values))), "stop", 1, 1)

    async def losses(self, requests):
        return [
            [np.array([3.0, 3.0 - strongest(r.rule, " ".join(t.strip() for t in s.tokens))]) for s in r.sequences]
            for r in requests
        ]
