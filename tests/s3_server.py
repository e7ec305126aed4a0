"""An S3 server on this machine, moto's, that may refuse a share of its requests."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto import backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class _Quiet(WSGIRequestHandler):
    def log_request(self, *arguments: Any) -> None:
        pass


@contextmanager
def s3_server(share_refused: float = 0.0, refused: list[str] | None = None) -> Iterator[dict[str, str]]:
    """Environment variables that lead Lance and s3fs to a server with an empty bucket.

    Args:
        share_refused: Of requests answered by 503 or 500, drawn anew for every one.
        refused: Takes method and path of each.
    """
    moto, chance = DomainDispatcherApplication(create_backend_app), random.Random(0)
    backends.get_backend("s3").reset()  # they are the process's

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if chance.random() < share_refused:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            if refused is not None:
                refused.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            status = chance.choice(["503 Slow Down", "500 Internal Server Error"])
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
            return [SLOW_DOWN]
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "one",
            "AWS_SECRET_ACCESS_KEY": "two",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.shutdown()
