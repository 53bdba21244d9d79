"""Prometheus metrics, named as vLLM names them, under ``headstart:``.

The engine's counters are read from its latest Stats when somebody scrapes, so a step costs nothing
here. Request metrics are observed as tokens pass. Each app has a registry of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from headstart.engine.process.messages import Output
from headstart.server.generation.engine_client import EngineClient
from headstart.server.http.errors import APIError
from headstart.server.http.ledger import PHASES, Decoded, Gaps, Ledger
from headstart.server.http.policy import OTHER

FIRST_TOKEN_BUCKETS = tuple(
    0.01 * factor
    for factor in (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 4000)
)
INTER_TOKEN_BUCKETS = tuple(
    0.001 * factor
    for factor in (1, 2, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000, 2500)
)
LATENCY_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
STAGE_BUCKETS = (0.001, 0.005, 0.02, 0.05, *LATENCY_BUCKETS)
PHASE_BUCKETS = (0.0001, 0.0003, *STAGE_BUCKETS)
TOKEN_BUCKETS = tuple(float(4**i) for i in range(10))
SPAN_OUTCOMES = ("exported", "failed", "dropped")
FINISH_REASONS = ("stop", "length", "tool_calls", "abort", "error")

MAX_FIELDS = 256
"""Ignored fields that are counted apart from others."""


class EngineCollector(Collector):
    """The engine's Stats as metrics."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        relay, runahead = stats.relay, stats.runahead
        pages = max(1, stats.pages_total)
        gauges = (
            ("engine_up", "1 when the engine is ready", float(self._engine.ready)),
            ("num_lora_adapters", "LoRA adapters that are loaded", len(self._engine.adapters)),
            ("num_requests_running", "Requests in the engine's batch", stats.running),
            ("num_requests_waiting", "Requests waiting to be scheduled", stats.waiting),
            (
                "kv_cache_usage_perc",
                "KV pages held by requests, 1 is all",
                (stats.pages_used - stats.pages_cached) / pages,
            ),
            (
                "kv_cache_cached_perc",
                "KV pages held by the prefix cache alone, free on demand, 1 is all",
                stats.pages_cached / pages,
            ),
            ("relay_enabled", "1 when shared prefixes may be read once a batch", relay.enabled),
            ("relay_refused", "1 when that gave other logits and was turned off", relay.refused),
            (
                "relay_check_largest_difference",
                "Of a logit, against plain attention, relative to the largest logit",
                relay.largest_difference,
            ),
            ("runahead_ranks", "Ranks of the chain for long prompts, 1: none", runahead.ranks),
            ("runahead_ranks_live", "Those that take part now", runahead.ranks_live),
        )
        counters = (
            ("prompt_tokens", "Prompt tokens, cached ones included", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.generation_tokens),
            (
                "forced_tokens",
                "Generated tokens that a grammar left no choice of, several computed in a step",
                stats.forced_tokens,
            ),
            ("prefix_cache_queries", "Prompt tokens looked up", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the cache", stats.cached_tokens),
            ("num_preemptions", "Requests put back to waiting", stats.preemptions),
            ("engine_steps", "Engine steps", stats.steps),
            ("engine_step_seconds", "Time inside engine steps, seconds", stats.step_seconds),
            ("relay_steps", "Steps that read a shared prefix once", relay.steps),
            ("relay_ranges", "Shared prefixes read once, summed over steps", relay.ranges),
            ("relay_checks", "Steps computed both ways and compared", relay.checks),
            (
                "relay_attention_seconds",
                "Inside attention, in steps with a shared prefix, read once or not; 0 on a GPU, "
                "where it is not waited for",
                relay.seconds,
            ),
            (
                "relay_predicted_attention_seconds",
                "The same as predicted when those steps were planned",
                relay.predicted_seconds,
            ),
            (
                "relay_predicted_plain_attention_seconds",
                "The same as predicted had nothing been read once",
                relay.predicted_plain_seconds,
            ),
            (
                "relay_kv_read_bytes",
                "Keys and values read in steps with a shared prefix",
                relay.bytes_read,
            ),
            (
                "relay_kv_distinct_bytes",
                "The same had each page been read once a step",
                relay.bytes_distinct,
            ),
            ("runahead_prompts", "Prompts computed by a chain of ranks", runahead.prompts),
            (
                "runahead_failed",
                "Prompts that a chain began, and the engine computed alone",
                runahead.failed,
            ),
            ("runahead_left_out", "Ranks that were left out of the chain", runahead.left_out),
            ("runahead_tokens", "Prompt tokens computed by the chain", runahead.tokens),
            (
                "runahead_seconds",
                "From the start of these prompts to their first token",
                runahead.seconds,
            ),
            (
                "runahead_predicted_seconds",
                "The same as predicted when they were cut",
                runahead.predicted_seconds,
            ),
            (
                "runahead_idle_seconds",
                "In which the engine waited for the KV of other ranks",
                runahead.idle_seconds,
            ),
            (
                "runahead_sent_bytes",
                "Keys and values sent from rank to rank",
                runahead.bytes_sent,
            ),
            ("engine_restarts", "Engine starts after it had died", self._engine.restarts),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"headstart:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(f"headstart:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter


class HttpMetrics:
    """What was answered, by the routes' paths."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "headstart:http_requests", "Requests", ["path", "status"], registry=registry
        )
        self._errors = Counter(
            "headstart:http_errors",
            "Requests that went wrong; those whose answers had begun, too",
            ["path", "status", "code"],
            registry=registry,
        )
        self._ignored = Counter(
            "headstart:ignored_fields",
            "Fields of bodies that had no effect",
            ["field"],
            registry=registry,
        )
        self._fields: set[str] = set()

    def answered(self, path: str, status: int, error: APIError | None) -> None:
        self._requests.labels(path, status).inc()
        if error is not None:
            self._errors.labels(path, error.status, error.name).inc()

    def ignored(self, field: str) -> None:
        if len(self._fields) < MAX_FIELDS:
            self._fields.add(field)
        self._ignored.labels(field if field in self._fields else OTHER).inc()


class FormerName(Collector):
    """A histogram by the name that it had before: dashboards ask for it still."""

    def __init__(self, histogram: Histogram, name: str) -> None:
        self._histogram = histogram
        self._name = f"headstart:{name}"

    def collect(self) -> Iterator[Metric]:
        for metric in self._histogram.collect():
            former = Metric(self._name, metric.documentation, metric.type)
            for sample in metric.samples:
                suffix = sample.name.removeprefix(metric.name)
                former.samples.append(sample._replace(name=self._name + suffix))
            yield former


class RequestMetrics:
    """Of the requests for one model, or adapter; ``success`` by the reason they finished for."""

    __slots__ = (
        "decode",
        "first_token",
        "generation_tokens",
        "inference",
        "inter_token",
        "latency",
        "per_output_token",
        "phases",
        "prefill",
        "prompt_tokens",
        "queue",
        "success",
    )

    def __init__(
        self, name: str, histograms: Iterable[Histogram], phases: Histogram, success: Counter
    ) -> None:
        (
            self.first_token,
            self.inter_token,
            self.latency,
            self.queue,
            self.prefill,
            self.decode,
            self.inference,
            self.per_output_token,
            self.prompt_tokens,
            self.generation_tokens,
        ) = (histogram.labels(name) for histogram in histograms)
        self.phases = {phase: phases.labels(name, phase) for phase in PHASES}
        self.success = {reason: success.labels(name, reason) for reason in FINISH_REASONS}

    def delivered(self, ledger: Ledger) -> None:
        """The first token of a request is out."""
        for phase, seconds in ledger.phases().items():
            self.phases[phase].observe(seconds)


class Metrics:
    """Every metric of one app; ``expose()`` is the body of /metrics."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        registry = CollectorRegistry()
        registry.register(EngineCollector(engine, model_name))
        ProcessCollector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"headstart:{name}", text, ["model_name"], buckets=buckets, registry=registry
            )

        self._registry = registry
        self.http = HttpMetrics(registry)
        inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens", INTER_TOKEN_BUCKETS
        )
        registry.register(FormerName(inter_token, "time_per_output_token_seconds"))
        self._histograms = (
            histogram(
                "time_to_first_token_seconds",
                "First byte of the request to first token",
                FIRST_TOKEN_BUCKETS,
            ),
            inter_token,
            histogram(
                "e2e_request_latency_seconds",
                "First byte of the request to last token",
                LATENCY_BUCKETS,
            ),
            histogram(
                "request_queue_time_seconds", "In the engine before it is scheduled", STAGE_BUCKETS
            ),
            histogram("request_prefill_time_seconds", "Scheduled to first token", STAGE_BUCKETS),
            histogram("request_decode_time_seconds", "First to last token", STAGE_BUCKETS),
            histogram("request_inference_time_seconds", "Scheduled to last token", STAGE_BUCKETS),
            histogram(
                "request_time_per_output_token_seconds",
                "Between two tokens, the mean of a request",
                INTER_TOKEN_BUCKETS,
            ),
            histogram("request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS),
            histogram("request_generation_tokens", "Tokens generated for a request", TOKEN_BUCKETS),
        )
        self._phases = Histogram(
            "headstart:request_phase_time_seconds",
            "From the first byte of the request to its first token, in phases that add up to it",
            ["model_name", "phase"],
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        self._success = Counter(
            "headstart:request_success",
            "Requests answered",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self.spans = Counter(
            "headstart:trace_spans",
            "Spans of traces, and requests whose spans were dropped since the queue was full",
            ["outcome"],
            registry=registry,
        )
        for outcome in SPAN_OUTCOMES:
            self.spans.labels(outcome)
        self._models: dict[str, RequestMetrics] = {}
        self.of(model_name)

    def register(self, collector: Collector) -> None:
        """Expose what it collects, too."""
        self._registry.register(collector)

    def expose(self) -> bytes:
        return generate_latest(self._registry)

    def of(self, name: str) -> RequestMetrics:
        """Those of a model, or an adapter; exposed from now on."""
        if name not in self._models:
            self._models[name] = RequestMetrics(name, self._histograms, self._phases, self._success)
        return self._models[name]

    def forget(self, name: str) -> None:
        """Expose those of an adapter no more: those of all that ever were would pile up."""
        if self._models.pop(name, None) is not None:
            for histogram in self._histograms:
                histogram.remove(name)
            for phase in PHASES:
                self._phases.remove(name, phase)
            for reason in FINISH_REASONS:
                self._success.remove(name, reason)


class ChoiceTimer:
    """Observes the tokens of one choice, from the first byte of its request on. ``told``: who else
    is told of the first output."""

    __slots__ = ("_begun", "_clock", "_first", "_gaps", "_last", "_prefill", "_told", "metrics")

    def __init__(
        self,
        metrics: RequestMetrics,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[Output], None] | None = None,
    ) -> None:
        self.metrics = metrics
        self._clock = clock
        self._told = told
        self._gaps = Gaps()
        self._begun = clock()
        self._first: float | None = None
        self._last = 0.0
        self._prefill = 0.0

    def begin(self, moment: float) -> None:
        """The request began earlier than this timer."""
        self._begun = moment

    def scheduled(self, output: Output) -> None:
        """Observe what the engine says of the time before its first output."""
        if output.times is not None:
            self.metrics.queue.observe(output.times.queue)
            self.metrics.prefill.observe(output.times.prefill)
            self._prefill = output.times.prefill
        if self._told is not None:
            self._told(output)

    def take(self, output: Output) -> None:
        now = self._clock()
        if self._first is None:
            self._first = now
            self.metrics.first_token.observe(now - self._begun)
            self.scheduled(output)
        elif count := len(output.token_ids):
            gap = (now - self._last) / count
            self._gaps.add(gap, count)
            for _ in range(count):
                self.metrics.inter_token.observe(gap)
        self._last = now

    def finished(self, reason: str, num_prompt: int, num_generated: int) -> None:
        metrics = self.metrics
        metrics.success[reason].inc()
        metrics.latency.observe(self._clock() - self._begun)
        metrics.prompt_tokens.observe(num_prompt)
        metrics.generation_tokens.observe(num_generated)
        if self._first is None:
            return
        seconds = self._seconds
        metrics.decode.observe(seconds)
        metrics.inference.observe(self._prefill + seconds)
        if num_generated > 1:
            metrics.per_output_token.observe(seconds / (num_generated - 1))

    @property
    def _seconds(self) -> float:
        """From the first token to the last."""
        return 0.0 if self._first is None else self._last - self._first

    def decoded(self, num_tokens: int) -> Decoded:
        """What has come so far, which are so many tokens."""
        ended = None if self._first is None else self._last
        return Decoded(num_tokens, self._seconds, self._gaps, ended)
