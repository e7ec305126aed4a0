"""Services of a search actor that a test decides on. Actors load this module: it asks for none that is slow to load."""

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

from rayinterp.config import RunConfig
from rayinterp.explain.actor import Services, make_client
from rayinterp.explain.client import LLMError, LLMReply, LLMRequest
from rayinterp.feature_id import FeatureId
from rayinterp.planted import FEATURES, RULES, OracleSimulator
from rayinterp.prompts import PLAIN_QUESTION
from rayinterp.simulate.simulator import RuleRequest


class Fakes:
    """Picklable: makes services whose LLM fails and answers as it is told.

    Args:
        fails: Calls that fail, by feature.
        poisoned: Of these the first, since it is the feature's prompts that are not answered; at the others it is down.
    """

    def __init__(self, fails=(), transient=True, bill=None, poisoned=0):
        self.fails, self.transient = Counter(dict(fails)), transient
        self.failed, self.poisoned = Counter(), poisoned
        self.bill = bill
        """A file with a line for each call that was answered."""

    def __call__(self, config, tables, committer, keys, retriever):
        oracle = OracleSimulator()

        async def simulate(requests):
            return [oracle.simulate([request])[0] for request in requests]

        async def generate(request, feature_key):
            await asyncio.sleep(0)
            num_failed, plain = self.failed[feature_key], request.messages == (PLAIN_QUESTION,)
            if plain and num_failed <= self.poisoned:
                return LLMReply("Yes", "stop", 10, 1)
            if plain or num_failed < self.fails[feature_key]:
                self.failed[feature_key] += not plain
                raise LLMError("RateLimitError 429 from m", self.transient)
            if self.bill:
                await asyncio.sleep(0.3 * (request.seed % 3))  # siblings of a failed call are answered later
                with self.bill.open("a") as file:
                    file.write(request.hash + "\n")
            feature = FeatureId.parse(feature_key)
            truth = FEATURES[feature.index].truth[0].activates_on
            return LLMReply(f'[{{"activates_on": "{truth}", "strength": {1 + request.seed % 5}}}]', "stop", 10, 10)

        async def retrieve(requests):
            return await retriever.silent.remote(requests)

        return Services({"oracle": lambda: simulate}, dict.fromkeys(config.llms, generate), retrieve)


class RealEndpoints(Fakes):
    """The same simulator, and the LLMs of the config."""

    def __call__(self, config, tables, committer, keys, retriever):
        services = super().__call__(config, tables, committer, keys, retriever)
        return services._replace(llms={name: make_client(name, config, keys[name]) for name in keys})


class Billed:
    """Picklable: services whose LLM takes its time, answers the same to the same, and writes down what it answered."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, config: RunConfig, *others: Any) -> Services:
        oracle = OracleSimulator()

        async def simulate(requests: list[RuleRequest]) -> list[list[Any]]:
            return oracle.simulate(requests)

        async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
            rng = random.Random(request.hash)
            await asyncio.sleep(rng.uniform(0.2, 0.6))
            truth = [rule.activates_on for rule in FEATURES[FeatureId.parse(feature_key).index].truth]
            others = [rule for rule in list(RULES)[:4] if rule not in truth]
            said = [*truth, *rng.sample(others, 2)]  # never quite right, or the search would be over
            rules = [{"activates_on": rule, "strength": rng.randint(1, 5)} for rule in said]
            with self.log.open("a") as file:
                file.write(request.hash + "\n")
                file.flush()
                os.fsync(file.fileno())
            return LLMReply(json.dumps(rules), "stop", 10, 10)

        return Services({"oracle": lambda: simulate}, dict.fromkeys(config.llms, generate), None)
