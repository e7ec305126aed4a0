"""An endpoint that speaks the OpenAI protocol, and misbehaves on a share of its calls.

Which call meets which fault depends on the seed, the request and how often it was asked, not on the order of arrival:
two runs that ask the same meet the same faults.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

FAULTS = (
    "rate_limit", "server_error", "hang", "disconnect", "malformed", "truncated", "empty", "huge", "wrong_shape",
)  # fmt: skip

WRONG_SHAPES: list[Any] = [
    {"error": {"message": "upstream is busy", "code": 502}},
    {"choices": []},
    {"choices": {}},
    {"choices": ["text"]},
    {"choices": [{"finish_reason": "stop"}]},
    {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": [{"type": "text", "text": "parts"}]}}]},
    {"choices": [{"message": {"content": 7}}]},
    {"choices": [{"message": {"content": "ok"}}], "usage": {"prompt_tokens": -3, "completion_tokens": "many"}},
    ["choices"],
    "choices",
    None,
]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def faulty_endpoint(
    seed: int,
    share: float,
    answer: str | Callable[[dict[str, Any]], str],
    faults: tuple[str, ...] = FAULTS,
    hang_seconds: float = 5.0,
    seen: list[tuple[str, dict[str, Any]]] | None = None,
    down: threading.Event | None = None,
) -> Iterator[str]:
    """The base URL of an endpoint that answers with `answer`, or with one of `faults` on a `share` of the calls.

    Args:
        answer: The text, or what makes it of a request's body.
        faults: Some of `FAULTS`, or `dribble`: a body of blanks that never ends.
        hang_seconds: A hanging call is dropped after this; a client should have given up before.
        seen: Takes the fault ("" for none) and the body of every call.
        down: While it is set, every call is a server's error.
    """
    asked: Counter[str] = Counter()
    lock, closing = threading.Lock(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            body, name = json.loads(text), hashlib.sha256(text).hexdigest()
            with lock:
                asked[name] += 1
                chance = random.Random(f"{seed}/{name}/{asked[name]}")
            fault = chance.choice(faults) if chance.random() < share else ""
            if down is not None and down.is_set():
                fault = "server_error"
            if seen is not None:
                seen.append((fault, body))
            self._answer(fault, completion(answer if isinstance(answer, str) else answer(body)), chance)

        def _answer(self, fault: str, good: dict[str, Any], chance: random.Random) -> None:
            if fault == "hang":
                closing.wait(hang_seconds)
            elif fault == "dribble":
                self.send_response(200)
                self.end_headers()
                while not closing.wait(0.05):
                    self.wfile.write(b" ")
            elif fault in ("rate_limit", "server_error"):
                status = 429 if fault == "rate_limit" else chance.choice([500, 502, 503])
                self._send({"error": {"message": "try again"}}, status)
            elif fault == "malformed":
                self._send(chance.choice(["<html>Bad gateway</html>", "", "data: [DONE]", "[" * 5000]))
            elif fault == "truncated":
                whole = json.dumps(good)
                self._send(whole[: chance.randrange(1, len(whole))])
            elif fault == "empty":
                self._send(completion(chance.choice(["", " \n", "```json\n```"])))
            elif fault == "huge":
                self._send(completion('[{"activates_on": "' + "very " * 200_000))
            elif fault == "wrong_shape":
                self._send(chance.choice(WRONG_SHAPES))
            elif not fault:
                self._send(good)

        def _send(self, body: Any, status: int = 200) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client has gone
                super().handle()

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


def completion(text: str) -> dict[str, Any]:
    """A well-formed answer."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
