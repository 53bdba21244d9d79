"""/v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from headstart.server.access_log import name_request
from headstart.server.openai.chat_body import ChatBody
from headstart.server.openai.chat_format import ChatFormat
from headstart.server.openai.chat_start import prepare_chat
from headstart.server.openai.reply import Reply
from headstart.server.runtime import Runtime


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["chat"])

    @router.post("/v1/chat/completions", response_class=Response)
    async def create_chat_completion(request: Request) -> Reply:
        """Answer a chat; streamed with ``stream: true``."""
        body = await runtime.parse(request, ChatBody)
        deadline = runtime.deadline(request, body.timeout)
        if body.request_id is not None:
            name_request(request.scope, body.request_id)
        chat = await prepare_chat(runtime, body)
        format = ChatFormat(
            chat.served.name,
            runtime.tokenizer,
            logprobs=chat.params.logprobs is not None,
            prompt_logprobs=body.prompt_logprobs,
            reasoning=body.include_reasoning is not False,
            shown=body.shown,
        )
        return Reply(
            chat.start(runtime),
            format,
            stream=bool(body.stream),
            warning=chat.warning,
            deadline=deadline,
        )

    return router
