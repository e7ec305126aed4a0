"""A real server that speaks the OpenAI protocol: the embedded model behind `transformers serve`."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from pydantic import SecretStr
from transformers.utils.import_utils import is_serve_available

from rayinterp import embedded
from rayinterp.config import LLMConfig, OneShotConfig
from rayinterp.explain.client import Ledger, limited
from rayinterp.explain.endpoint import openai_client
from rayinterp.explain.explainer import ask
from rayinterp.explanation import parse_structured
from rayinterp.prompts import MarkedRecord, answer_form, explainer_messages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs the packages of transformers[serving]"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The endpoint's URL and its name of the model."""
    model = str(embedded.resolve(embedded.MODEL))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], stdout=output, stderr=output, env=environment, cwd=log.parent
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail(f"no server after two minutes: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        server.wait(30)


async def test_a_structured_explanation_is_asked_for_and_answered(served):
    url, model = served
    llm = LLMConfig(provider="openai", model=model, base_url=url, answer_format="json_schema", timeout_seconds=300)
    arm = OneShotConfig(llm="l", simulator="s", max_tokens=80, rule_cap=2, max_parse_retries=0)
    records = [MarkedRecord((" The", " old", " oak", " fell"), (0, 0, 5, 0))]
    messages = explainer_messages(records, [], answer_form(2, True, as_object=True), few_shots=True, holistic=False)
    rows = []

    async def write(row):
        rows.append(row)

    ledger = Ledger(limited(openai_client(llm, SecretStr("unused")), llm.max_concurrency), llm, [], write)
    outcome = await ask(ledger, llm, messages, arm, "seed", "a/1")
    assert outcome.prompt_tokens > 100 and 0 < outcome.completion_tokens <= 80
    assert outcome.thought and len(rows) == 1 and rows[0]["finish_reason"] in ("stop", "length")
    # The server enforces no schema, and a model of this size may not keep to it.
    if outcome.status == "ok":
        assert outcome.explanation == parse_structured(outcome.thought, 2)
    else:
        assert outcome.explanation is None and outcome.status in ("parse_error", "cut_off")
