"""create_app: the HTTP side over an engine client. No globals: two apps do not know each other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from headstart import __version__
from headstart.engine.errors import HeadstartError
from headstart.engine.process.messages import ModelInfo
from headstart.server.api import adapters, models, tokens
from headstart.server.api.anthropic_messages import routes as messages
from headstart.server.api.openai_chat import routes as chat
from headstart.server.api.openai_completions import routes as completions
from headstart.server.api.openai_responses import routes as responses
from headstart.server.api.openai_responses.body import CountBody, ResponsesBody
from headstart.server.api.openai_responses.conversations import (
    ConversationCreateBody,
    ItemsBody,
    MetadataBody,
)
from headstart.server.api.pooling import cohere_embed, embeddings, score
from headstart.server.generation.defaults import OPENAI, GenerationDefaults
from headstart.server.generation.engine_client import EngineClient
from headstart.server.http.access_log import (
    ANTHROPIC_ID,
    IGNORED,
    REQUEST_ID,
    AccessLog,
    Tracer,
    id_headers,
    request_id,
)
from headstart.server.http.admission_control import RATE_HEADERS, AdmissionControl
from headstart.server.http.admission_metrics import AdmissionCollector
from headstart.server.http.api_document import describe
from headstart.server.http.auth import Authorisation
from headstart.server.http.bounds import Crowd
from headstart.server.http.deadline import Attendance, Pings
from headstart.server.http.errors import APIError, error_response, to_api_error
from headstart.server.http.hosts import LocalHosts
from headstart.server.http.metrics import Metrics
from headstart.server.http.refusals import RETRY_HEADERS
from headstart.server.http.reply import WARNING_HEADER
from headstart.server.http.runtime import Runtime
from headstart.server.http.trailing_slash import TrailingSlash
from headstart.server.settings import ServerSettings
from headstart.server.text.answer_format import find_format
from headstart.server.text.template_sandbox import TemplateLimits
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headstart.server.http.tracing import SpanTracer

logger = logging.getLogger(__name__)

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": chat.ChatBody,
    "/v1/completions": completions.CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": CountBody,
    "/v1/conversations": ConversationCreateBody,
    "/v1/conversations/{conversation_id}": MetadataBody,
    "/v1/conversations/{conversation_id}/items": ItemsBody,
    "/v1/messages": messages.MessagesBody,
    "/v1/messages/count_tokens": messages.CountTokensBody,
    "/v1/embeddings": embeddings.EmbeddingBody,
    "/v2/embed": cohere_embed.CohereEmbedBody,
    "/v1/score": score.ScoreBody,
    "/v1/rerank": score.RerankBody,
    "/v1/load_lora_adapter": adapters.LoadAdapterBody,
    "/v1/unload_lora_adapter": adapters.UnloadAdapterBody,
    "/tokenize": tokens.TokenizeBody,
    "/detokenize": tokens.DetokenizeBody,
    "/apply-template": tokens.ApplyTemplateBody,
}


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    *,
    model_names: Sequence[str],
    settings: ServerSettings | None = None,
    defaults: GenerationDefaults = OPENAI,
    pings: Pings | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_ready: Callable[[ModelInfo], None] | None = None,
    on_start_failure: Callable[[HeadstartError], None] | None = None,
) -> FastAPI:
    """An ASGI app that starts the engine when it starts, and stops it when it stops.

    ``defaults``: how tokens are chosen where a request does not say. ``pings``: as the settings
    say, unless given. ``clock``: of what callers may have in a minute, seconds.

    The app answers at once; /health is 503 until the engine is ready. ``on_ready`` is told when it
    is, ``on_start_failure`` when it never will be. ``app.state.runtime`` is the app's Runtime,
    ``app.state.post_paths`` what takes a POST.
    """
    settings = settings or ServerSettings()
    template = _chat_template(tokenizer, settings)
    answers = find_format(
        tokenizer, template, calls=settings.tool_call_parser, thoughts=settings.reasoning_parser
    )
    if template is not None and answers.calls is not None:
        template.call_format = answers.calls
    runtime = Runtime(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=template,
        settings=settings,
        metrics=Metrics(engine, model_names[0]),
        model_names=tuple(model_names),
        answers=answers,
        defaults=defaults,
        clock=clock,
    )
    runtime.metrics.register(AdmissionCollector(runtime.admission, model_names[0]))
    tracer = _new_tracer(settings.otlp_traces_endpoint, runtime.metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        start = asyncio.create_task(_start(engine, on_ready, on_start_failure))
        try:
            yield
        finally:
            runtime.draining = True
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            await engine.stop()
            for threads in (runtime.threads, runtime.chat_threads, runtime.body_threads):
                threads.shutdown(wait=False, cancel_futures=True)
            await runtime.grammars.close()
            if tracer is not None:
                await tracer.close()

    app = FastAPI(
        title="headstart",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # the redirect would be made of the client's Host header
    )
    app.state.runtime = runtime
    # Those that are asked most come first: routes are tried in order.
    modules = (
        chat,
        completions,
        responses,
        messages,
        embeddings,
        cohere_embed,
        score,
        tokens,
        models,
        adapters,
    )
    groups = [*(module.routes(runtime) for module in modules), _operations(runtime)]
    for router in groups:
        app.include_router(router)
    routes = [r for router in groups for r in router.routes if isinstance(r, APIRoute)]
    routes += _add_heads(app, routes)
    paths = frozenset(route.path for route in routes)
    pings = pings or Pings(interval=settings.ping_interval)
    _add_middleware(app, runtime, pings, paths, tracer)
    _add_error_handlers(app, routes)
    app.state.post_paths = frozenset(r.path for r in routes if "POST" in (r.methods or ()))
    describe(app, BODIES)
    return app


def _new_tracer(endpoint: str | None, metrics: Metrics) -> SpanTracer | None:
    if endpoint is None:
        return None
    # Imported here: it needs an extra, and takes a while.
    from headstart.server.http.tracing import SpanTracer

    return SpanTracer(endpoint, metrics.spans)


def _add_middleware(
    app: FastAPI,
    runtime: Runtime,
    pings: Pings,
    paths: frozenset[str],
    tracer: Tracer | None,
) -> None:
    """The last one added is the first to see a request."""
    settings = runtime.settings
    app.add_middleware(AdmissionControl, admission=runtime.admission)
    app.add_middleware(Attendance, seconds=settings.request_timeout, pings=pings)
    app.add_middleware(Authorisation, keys=settings.keys)
    app.add_middleware(TrailingSlash)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("DELETE", "GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=(
                *(REQUEST_ID, ANTHROPIC_ID, IGNORED, WARNING_HEADER.decode()),
                *(*RETRY_HEADERS, *RATE_HEADERS),
            ),
        )
    if settings.allowed_hosts is not None and not settings.keys.api:
        app.add_middleware(
            LocalHosts, hosts=settings.allowed_hosts, origins=settings.allowed_origins
        )
    app.add_middleware(Crowd, refused=runtime.admission.refused)
    app.add_middleware(
        AccessLog,
        metrics=runtime.metrics.http,
        paths=paths,
        line_format=settings.access_log_format,
        tracer=tracer,
    )


def _chat_template(tokenizer: Tokenizer, settings: ServerSettings) -> ChatTemplate | None:
    if tokenizer.chat_template is None:
        return None
    limits = TemplateLimits(settings.template_timeout, settings.max_template_chars)
    return ChatTemplate(tokenizer, limits)


async def _start(
    engine: EngineClient,
    on_ready: Callable[[ModelInfo], None] | None,
    on_failure: Callable[[HeadstartError], None] | None,
) -> None:
    try:
        await engine.start()
        if on_ready is not None and engine.model is not None:
            on_ready(engine.model)
    except HeadstartError as error:
        logger.error("the engine did not start: %s", error)
        if on_failure is not None:
            on_failure(error)
    except Exception as error:
        logger.exception("the engine did not start")
        if on_failure is not None:
            on_failure(HeadstartError(f"the engine did not start: {error}"))


def _operations(runtime: Runtime) -> APIRouter:
    """What operators ask: /health, /live, /ready, /load, /version, /metrics."""
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> Response:
        """200 when requests are served, 503 while loading, draining, or without an engine."""
        runtime.require_model()
        return JSONResponse({"status": "ok"})

    @router.get("/live")
    async def live() -> Response:
        """200 as long as this process answers, whatever becomes of the engine."""
        return JSONResponse({"status": "alive"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 and 503 as /health."""
        runtime.require_model()
        return JSONResponse({"status": "ready"})

    @router.get("/load")
    async def load() -> Response:
        """How busy the engine is, for those who choose between servers; a 503 when not ready.

        ``predicted_seconds`` is the time until a short prompt that came now had its first token;
        null where the engine does not know yet what prompts cost. KV pages are used (held by
        requests), cached (kept for later ones, free on demand), or free.
        """
        pages = runtime.require_model().num_pages  # stats have none before the first step
        stats, admission = runtime.engine.stats, runtime.admission
        used = stats.pages_used - stats.pages_cached
        return JSONResponse(
            {
                "running": stats.running,
                "waiting": stats.waiting,
                "in_flight": admission.in_flight,
                "in_flight_limit": admission.limit,
                "without_first_token": admission.waiting,
                "predicted_seconds": admission.predicted(),
                "kv_used": used / pages,
                "kv_pages_total": pages,
                "kv_pages_used": used,
                "kv_pages_cached": stats.pages_cached,
            }
        )

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(runtime.metrics.expose(), media_type=runtime.metrics.content_type)

    return router


def _add_heads(app: FastAPI, routes: Sequence[APIRoute]) -> list[APIRoute]:
    """HEAD wherever GET is: the same answer, of which the server sends no body."""
    heads = APIRouter()
    for route in routes:
        if "GET" in (route.methods or ()):
            heads.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                include_in_schema=False,
                response_class=route.response_class,
            )
    app.include_router(heads)
    return [route for route in heads.routes if isinstance(route, APIRoute)]


def _add_error_handlers(app: FastAPI, routes: Sequence[APIRoute]) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return error_response(to_api_error(error), request.scope)

    async def unknown(request: Request, error: Exception) -> Response:
        response = error_response(to_api_error(error), request.scope)
        for name in id_headers(request.scope):  # made outside the middleware
            response.headers[name] = request_id(request.scope)
        return response

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == 404:
            message = f"there is no {request.scope['path'][:200]!r} here"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed on {request.scope['path'][:200]!r}"
            # Where a path has several routes, Starlette names the first one's methods.
            here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            # A path of its own is no id of the path beside it: /v1/responses/input_tokens.
            here = [route for route in here if route.path == request.scope["path"]] or here
            if methods := {m for route in here for m in route.methods or ()}:
                headers = {"Allow": ", ".join(sorted(methods))}
        shown = APIError(error.status_code, message, headers=headers)
        return error_response(shown, request.scope)

    for kind in (APIError, HeadstartError, ValidationError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(Exception, unknown)
    app.add_exception_handler(HTTPException, http)
