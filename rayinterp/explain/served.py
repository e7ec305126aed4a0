"""The client of a local LLM: calls its Serve app. Who asks a model need not import what runs one."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.exceptions import RayTaskError

from rayinterp.explain.client import Generate, LLMError, LLMReply, LLMRequest
from rayinterp.simulate.client import FIRST_PAUSE, LOST, MAX_ATTEMPTS


def served_client(app: str, timeout_seconds: float) -> Generate:
    """Calls the Serve app of one LLM arm; another replica where one is lost with the request."""
    handle = serve.get_app_handle(app)

    async def generate(request: LLMRequest, feature_key: str) -> LLMReply:
        lost: Exception | None = None
        for attempt in range(MAX_ATTEMPTS):
            response = handle.generate.remote(request)
            try:
                async with asyncio.timeout(timeout_seconds):
                    return LLMReply(*await response)
            except LOST as error:
                lost = error
            except RayTaskError as error:  # of the model: out of memory, say, or a conversation that is too long
                why = str(error).strip().splitlines()[-1]
                raise LLMError(f"{app} failed on a request ({why})", transient=True) from None
            except TimeoutError:
                response.cancel()
                raise LLMError(f"no answer of {app} within {timeout_seconds:g} s", transient=True) from None
            await asyncio.sleep(FIRST_PAUSE * 2**attempt)
        raise LLMError(f"no replica of {app} answered ({type(lost).__name__})", transient=True)

    return generate
