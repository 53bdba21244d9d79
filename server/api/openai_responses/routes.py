"""/v1/responses, and the answers it has stored: another shape of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response

from headstart.server.api.openai_responses.body import CountBody, ResponsesBody
from headstart.server.api.openai_responses.conversations import add_routes
from headstart.server.api.openai_responses.items import stored_items
from headstart.server.api.openai_responses.listing import json_response, page_of
from headstart.server.api.openai_responses.prompt import Asked, fitted, read_prompt
from headstart.server.api.openai_responses.store import Item, Stored
from headstart.server.api.openai_responses.writer import ResponseFormat
from headstart.server.generation.chat import answer_chat, encode_chat
from headstart.server.http.errors import bad_request
from headstart.server.http.ledger import Ledger
from headstart.server.http.reply import Reply
from headstart.server.http.runtime import Runtime


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["responses"])
    stored = Stored(runtime.settings)

    @router.post("/v1/responses", response_class=Response)
    async def create_response(request: Request) -> Reply:
        """Answer a conversation; streamed with ``stream: true``."""
        body = await runtime.parse(request, ResponsesBody)
        served = runtime.served(body.model)
        model = runtime.require_text_model()
        work = partial(read_prompt, runtime, served, stored, request, body)
        asked = await runtime.with_body(request, work)
        thinks = runtime.answers.thoughts is not None
        if body.shows_logprobs and (asked.chat.use.names or thinks):
            raise bad_request(
                "log-probabilities go neither with tools nor with a model that thinks", "include"
            )
        chat = asked.chat
        if body.truncation == "auto":
            room = min(body.max_output_tokens or 1, model.max_model_len // 2)
            ledger = Ledger.of(request.scope)
            chat = await fitted(runtime, chat, model.max_model_len - room, ledger)
        new_params = partial(body.params, runtime.defaults, model)
        head = body.head(served.name, runtime.defaults)
        format = ResponseFormat(
            head,
            asked.tools,
            runtime.tokenizer,
            logprobs=body.shows_logprobs,
            keep=partial(_keep, stored, request, body, asked, head["id"]),
        )
        return await answer_chat(
            runtime,
            request,
            served,
            chat,
            format,
            new_params,
            stream=bool(body.stream),
            explain=bool(body.cache_explain),
        )

    @router.post("/v1/responses/input_tokens", response_class=Response)
    async def count_tokens(request: Request) -> Response:
        """The tokens of the prompt that /v1/responses would have."""
        body = await runtime.parse(request, CountBody)
        served = runtime.served(body.model or runtime.model_name)
        model = runtime.require_text_model()
        work = partial(read_prompt, runtime, served, stored, request, body)
        chat = (await runtime.with_body(request, work)).chat
        ledger = Ledger.of(request.scope)
        if body.truncation == "auto":
            chat = await fitted(runtime, chat, model.max_model_len - 1, ledger)
        token_ids, _ = await encode_chat(runtime, chat, ledger)
        return json_response({"object": "response.input_tokens", "input_tokens": len(token_ids)})

    @router.get("/v1/responses/{response_id}", response_class=Response)
    async def get_response(request: Request, response_id: str) -> Response:
        """A stored answer."""
        found = stored.find(request, response_id)
        if request.query_params.get("stream") == "true":
            raise bad_request("stored answers are not streamed", "stream", "unsupported_parameter")
        return Response(found.body, media_type="application/json")

    @router.get("/v1/responses/{response_id}/input_items", response_class=Response)
    async def list_input_items(request: Request, response_id: str) -> Response:
        """The items that a stored answer answers, the newest first."""
        found = stored.find(request, response_id)
        return page_of(msgspec.json.decode(found.items), request.query_params)

    @router.post("/v1/responses/{response_id}/cancel", response_class=Response)
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Refused: nothing runs in the background."""
        stored.find(request, response_id)
        raise bad_request("Cannot cancel a synchronous response.")

    @router.delete("/v1/responses/{response_id}", response_class=Response)
    async def delete_response(request: Request, response_id: str) -> Response:
        """Forget a stored answer; those that went on from it stay."""
        stored.delete(request, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    add_routes(router, runtime, stored)
    return router


def _keep(
    stored: Stored,
    request: Request,
    body: ResponsesBody,
    asked: Asked,
    response_id: str,
    answer: bytes,
    output: Sequence[Item],
) -> None:
    """Store an answer, and put it into its conversation."""
    conversation = body.conversation_id()
    if body.store is False and conversation is None:
        return
    new = stored_items(asked.new)
    if body.store is not False:
        items = [*asked.earlier, *new]
        stored.keep(request, response_id, answer, items, [*new, *output])
    if conversation is not None:
        stored.extend(request, conversation, [*new, *output])
