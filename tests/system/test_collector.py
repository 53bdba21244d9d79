"""Traces of a real server, through a real collector: rotel, a program from PyPI.

headstart ── OTLP/HTTP ──▶ rotel ── OTLP/HTTP ──▶ the test, which decodes them
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GUARD = 300
SLACK = 10**7
"""Nanoseconds."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def collector(span_receiver: Any, tmp_path: Path) -> Iterator[str]:
    """The address of a collector that hands everything on to ``span_receiver``."""
    spec = find_spec("rotel")
    assert spec is not None
    assert spec.origin is not None
    port = free_port()
    argv = [
        *(str(Path(spec.origin).parent / "rotel-agent"), "start"),
        *("--otlp-http-endpoint", f"127.0.0.1:{port}"),
        *("--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}"),
        *("--exporter", "otlp", "--otlp-exporter-protocol", "http"),
        *("--otlp-exporter-endpoint", span_receiver.url),
    ]
    with (tmp_path / "collector.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + GUARD
        while True:
            assert process.poll() is None, (tmp_path / "collector.log").read_text()
            assert time.monotonic() < deadline
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_spans_of_the_default_model(
    start_server: Any, default_flags: list[str], collector: str, span_receiver: Any
) -> None:
    server = start_server(*default_flags, "--otlp-traces-endpoint", collector)
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": "word " * 700}],
        "max_tokens": 5,
        "ignore_eos": True,
        "temperature": 0.5,
        "timings": True,
    }
    before = time.time_ns()
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body,
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "shop=7"},
        timeout=GUARD,
    )
    after = time.time_ns()
    assert response.status_code == 200
    answer, phases = response.json(), response.json()["timings"]["phases_ms"]
    names = {"receive", "template", "tokenise", "hand_over", "queue", "prefill", "sample"}
    spans = {span["name"]: span for span in span_receiver.wait()}
    assert names | {"llm_request", "chunk", "deliver", "decode"} == spans.keys()

    root = spans["llm_request"]
    assert (root["trace"], root["parent"], root["state"]) == (TRACE, PARENT, "shop=7")
    attributes = root["attributes"]
    assert attributes["gen_ai.request.model"] == answer["model"]
    assert attributes["gen_ai.response.id"] == answer["id"]
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.usage.prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert attributes["gen_ai.usage.completion_tokens"] == 5
    assert attributes["gen_ai.response.finish_reasons"] == ["length"]
    first = attributes["gen_ai.latency.time_to_first_token"]
    assert first == pytest.approx(answer["timings"]["first_token_ms"] / 1000, abs=1e-4)

    # Those of the engine's process are where they belong, by the same clock. The server's span may
    # end after its client has all: a system's clock may be set, too.
    assert before - SLACK <= root["begin"] < spans["sample"]["end"] <= after + SLACK
    assert spans["sample"]["end"] <= root["end"]
    for name in names:
        span = spans[name]
        assert span["parent"] == root["id"]
        if name not in ("prefill", "queue"):
            assert (span["end"] - span["begin"]) / 1e6 == pytest.approx(phases[name], abs=0.01)
    follow = sorted((spans[name] for name in names), key=lambda span: span["begin"])
    edges = [edge for span in follow for edge in (span["begin"], span["end"])]
    assert all(b - a > -2000 for a, b in itertools.pairwise(edges))
    assert spans["chunk"]["parent"] == spans["prefill"]["id"]
    assert spans["prefill"]["attributes"]["headstart.prefill.tokens"] > 600
    assert spans["decode"]["end"] <= root["end"]
    assert span_receiver.resources[0]["service.name"] == "headstart"
    assert server.metrics()["trace_spans_total"] == 0  # the last outcome's: none was dropped
