"""SpanTracer: the ledger of each request as OpenTelemetry's spans, sent over OTLP/HTTP.

    client's span ─▶ llm_request (SERVER)
                       ├ receive  template  tokenise  grammar  hand_over  queue
                       ├ prefill ─ chunk  chunk  chunk
                       └ sample  deliver  decode

Spans are made when a request has ended, of the moments that the ledger has: nothing is done while
it runs. They go into a bounded queue, which a thread of the SDK sends on; what does not fit is
dropped and counted. A collector that does not answer is told of once. Only imported where traces
are asked for: it needs the extra ``otel``.

Attributes are named as vLLM and SGLang name them, and as OpenTelemetry's conventions for generative
AI do. Nothing of a prompt or an answer is in them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue
from prometheus_client import Counter
from starlette.types import Scope

from headstart import __version__
from headstart.server.http.access_log import Answered
from headstart.server.http.deadline import begun
from headstart.server.http.ledger import Ledger

logger = logging.getLogger(__name__)

QUEUE_SIZE = 2048
"""Spans that wait to be sent, where ``OTEL_BSP_MAX_QUEUE_SIZE`` does not say."""

MOST_CHUNKS = 16
"""Of a prompt that have spans of their own."""

MOST_SPANS = MOST_CHUNKS + 16
"""Of one request."""

FLUSH_SECONDS = 3.0
"""How long the last spans may take to be sent when the server ends."""

Attributes = dict[str, AttributeValue]


class Interval(NamedTuple):
    """What has a span of its own: moments of ``time.monotonic``."""

    name: str
    begin: float
    end: float


class _Reasons(logging.Filter):
    """Keeps what the exporter would log, for one line of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        self.first = self.first or record.getMessage()
        return False


class Outbox(SpanExporter):
    """Sends through ``exporter``, and counts. Called by the SDK's thread.

    ``taken``: spans that have left the queue.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str, counter: Counter) -> None:
        self.taken = 0
        self._exporter = exporter
        self._endpoint = endpoint
        self._counter = counter
        self._reasons = _Reasons()
        logging.getLogger(trace_exporter.__name__).addFilter(self._reasons)
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        self._reasons.first = None
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        self._counter.labels("failed" if failed else "exported").inc(len(spans))
        if failed and not self._fails:
            logger.warning(
                "traces cannot be sent to %s (said once, counted in trace_spans_total): %s",
                self._endpoint,
                self._reasons.first,
            )
        elif self._fails and not failed:
            logger.info("traces are sent to %s again", self._endpoint)
        self._fails = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        logging.getLogger(trace_exporter.__name__).removeFilter(self._reasons)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class SpanTracer:
    """``endpoint``: where an OTLP/HTTP collector takes traces, path included. ``counter``: of
    spans, by their ``outcome``. Everything else (headers, timeouts, sampling, the service's name
    and resource, the queue) is as the variables ``OTEL_...`` of the environment say.
    """

    def __init__(self, endpoint: str, counter: Counter) -> None:
        self._counter = counter
        self._queue_size = _queue_size()
        self._offered = 0
        exporter = trace_exporter.OTLPSpanExporter(endpoint=endpoint)
        self._outbox = Outbox(exporter, endpoint, counter)
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(self._outbox, max_queue_size=self._queue_size)
        )
        self._tracer = self._provider.get_tracer("headstart", __version__)
        logger.info("traces go to %s", endpoint)

    def trace(self, scope: Scope, answered: Answered) -> None:
        """The spans of a request that ends now. Does not wait."""
        if self._offered - self._outbox.taken + MOST_SPANS > self._queue_size:
            self._counter.labels("dropped").inc()
            return
        ledger = Ledger.kept(scope)
        end = time.monotonic()
        clock = time.time_ns() - time.monotonic_ns()
        asked = ledger.asked if ledger is not None else None
        name = "llm_request" if asked is not None else f"{scope['method']} {answered.path}"
        root = self._span(
            Interval(name, begun(scope), end),
            clock,
            propagate.extract(_carrier(scope)),
            SpanKind.SERVER,
            _attributes(scope, answered, ledger, end),
        )
        if not root.is_recording():  # the sampler's word, or the client's
            return
        if answered.error is not None and answered.error.is_fault:
            root.set_status(Status(StatusCode.ERROR, answered.error.name))
        if ledger is not None:
            self._phases(ledger, clock, set_span_in_context(root))
        self._end(root, end, clock)

    def _phases(self, ledger: Ledger, clock: int, parent: Context) -> None:
        for interval in _intervals(ledger):
            of_prefill = interval.name == "prefill" and ledger.times is not None
            attributes = _of_prefill(ledger) if of_prefill else None
            span = self._span(interval, clock, parent, SpanKind.INTERNAL, attributes)
            if of_prefill and ledger.times is not None:
                inside = set_span_in_context(span)
                for begin, end in ledger.times.chunks[:MOST_CHUNKS]:
                    chunk = Interval("chunk", begin, end)
                    self._end(self._span(chunk, clock, inside, SpanKind.INTERNAL), end, clock)
            self._end(span, interval.end, clock)

    def _span(
        self,
        interval: Interval,
        clock: int,
        parent: Context,
        kind: SpanKind,
        attributes: Attributes | None = None,
    ) -> Span:
        return self._tracer.start_span(
            interval.name,
            context=parent,
            kind=kind,
            attributes=attributes,
            start_time=clock + _ns(interval.begin),
        )

    def _end(self, span: Span, moment: float, clock: int) -> None:
        span.end(clock + _ns(moment))
        self._offered += 1

    async def close(self) -> None:
        """Send what waits, for some seconds at most."""
        # A thread that nobody waits for at the end of the process: a collector may not answer.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        deadline = time.monotonic() + FLUSH_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if thread.is_alive():
            self._outbox.shutdown()


def _queue_size() -> int:
    text = os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE, "")
    return max(int(text), MOST_SPANS) if text.isascii() and text.isdigit() else QUEUE_SIZE


def _resource() -> Resource:
    """The environment's, with a name if that has none."""
    found = Resource.create({SERVICE_VERSION: __version__})
    named = str(found.attributes.get(SERVICE_NAME, ""))
    if named and not named.startswith("unknown_service"):
        return found
    return found.merge(Resource({SERVICE_NAME: "headstart"}))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _carrier(scope: Scope) -> dict[str, str]:
    """The request's headers, for the parent that ``traceparent`` names."""
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}


def _intervals(ledger: Ledger) -> Iterator[Interval]:
    """The phases that took any time, and the answer behind them. Prefill is one with what it
    yielded, since those alternate."""
    before = ledger.begun
    for phase, at in ledger.moments:
        if phase == "prefill":
            continue
        if at > before:
            yield Interval("prefill" if phase == "yielded" else phase, before, at)
        before = at
    decoded = ledger.decoded
    if ledger.first is not None and decoded is not None and decoded.ended is not None:
        yield Interval("decode", ledger.first, max(decoded.ended, ledger.first))


def _of_prefill(ledger: Ledger) -> Attributes:
    times = ledger.times
    assert times is not None
    return {
        "headstart.prefill.chunks": times.num_chunks,
        "headstart.prefill.tokens": times.num_tokens,
        "headstart.prefill.seconds": times.seconds,
        "headstart.queue.running": times.ahead.running,
        "headstart.queue.waiting": times.ahead.waiting,
        "headstart.queue.tokens": times.ahead.tokens,
    }


def _attributes(scope: Scope, answered: Answered, ledger: Ledger | None, end: float) -> Attributes:
    found: Attributes = {
        "http.request.method": scope["method"],
        "http.route": answered.path,
        "http.response.status_code": answered.status,
        "gen_ai.request.id": answered.request_id,
    }
    if client := scope.get("client"):
        found["client.address"] = client[0]
    if answered.error is not None:
        found["error.type"] = answered.error.name
    if answered.usage is not None:
        prompt, completion = answered.usage
        found |= {
            "gen_ai.usage.prompt_tokens": prompt,
            "gen_ai.usage.completion_tokens": completion,
            "gen_ai.usage.input_tokens": prompt,
            "gen_ai.usage.output_tokens": completion,
        }
    if ledger is None or ledger.asked is None:
        return found
    return found | _of_answer(ledger, answered.path) | _latencies(ledger, end)


def _of_answer(ledger: Ledger, path: str) -> Attributes:
    asked = ledger.asked
    assert asked is not None
    found: Attributes = {
        "gen_ai.operation.name": "text_completion" if path == "/v1/completions" else "chat",
        "gen_ai.provider.name": "headstart",
        "gen_ai.request.model": asked.model,
        "gen_ai.request.max_tokens": asked.max_tokens,
        "gen_ai.request.temperature": asked.temperature,
        "gen_ai.request.top_p": 1.0 if asked.top_p is None else asked.top_p,
        "gen_ai.request.n": asked.choices,
        "gen_ai.response.id": asked.answer_id,
        "gen_ai.response.model": asked.model,
        "gen_ai.usage.num_sequences": asked.choices,
        "gen_ai.usage.cached_tokens": ledger.cached_tokens,
    }
    if ledger.finish_reasons:
        found["gen_ai.response.finish_reasons"] = list(ledger.finish_reasons)
    return found


def _latencies(ledger: Ledger, end: float) -> Attributes:
    """Seconds, by vLLM's names."""
    found: Attributes = {"gen_ai.latency.e2e": end - ledger.begun}
    if ledger.first is None:
        return found
    phases = ledger.phases()
    prefill = phases["prefill"] + phases["yielded"] + phases["sample"]
    decode = ledger.decoded.seconds if ledger.decoded is not None else 0.0
    return found | {
        "gen_ai.latency.time_to_first_token": sum(phases.values()),
        "gen_ai.latency.time_in_queue": phases["queue"],
        "gen_ai.latency.time_in_model_prefill": prefill,
        "gen_ai.latency.time_in_model_decode": decode,
        "gen_ai.latency.time_in_model_inference": prefill + decode,
    }
