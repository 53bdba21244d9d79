"""Who asks for ``cache_explain`` gets the engine's explanation in words (text/cache_explain.py)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request

from headstart.engine.errors import RequestError
from headstart.engine.process.messages import Explanation
from headstart.server.http.cache_scope import salt_of
from headstart.server.http.errors import APIError
from headstart.server.http.reply import Explain
from headstart.server.http.runtime import Runtime
from headstart.server.text.cache_explain import OPENERS, Explained, describe
from headstart.server.text.layout import Layout
from headstart.server.text.templates import Message


def explainer(
    runtime: Runtime,
    request: Request,
    token_ids: Sequence[int],
    messages: Sequence[Message] = (),
    lay_out: Callable[[], Awaitable[Layout]] | None = None,
) -> Explain:
    """What makes the object ``cache_explain`` of a prompt. ``messages``, ``lay_out``: of a chat,
    which is rendered again if it differs from an earlier one."""
    thoughts = runtime.answers.thoughts
    asked = Explained(
        token_ids,
        messages,
        openers=OPENERS if thoughts is None else (thoughts.opens, *OPENERS),
        salted=bool(salt_of(request.scope)),
    )

    async def explain(explanation: Explanation) -> dict[str, Any]:
        layout = None
        if lay_out is not None and explanation.difference is not None:
            # What a template does not tell is left out; the answer is there.
            with contextlib.suppress(RequestError, APIError):
                layout = await lay_out()
        found = replace(asked, layout=layout)
        work = partial(describe, runtime.tokenizer, explanation, found)
        return await asyncio.get_running_loop().run_in_executor(runtime.chat_threads, work)

    return explain
