"""Where the time of a request went, told by a real server to a client with a clock of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from headstart.server.http.ledger import PHASES

CHAT = "/v1/chat/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


@pytest.fixture
def ask(server: Any) -> Callable[..., tuple[dict[str, Any], float]]:
    """``ask(text, field=value)``: a stream's timings, and the seconds until its end."""

    def send(text: str, **fields: Any) -> tuple[dict[str, Any], float]:
        body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": text}]}
        body |= {"stream": True, "timings": True, "max_tokens": 8, "temperature": 0, **fields}
        begin = time.perf_counter()
        response = httpx.post(f"{server.url}{CHAT}", json=body, timeout=300)
        seconds = time.perf_counter() - begin
        assert response.status_code == 200, response.text
        events = [line for line in response.text.splitlines() if line.startswith("data: {")]
        timings: dict[str, Any] = json.loads(events[-1].removeprefix("data: "))["timings"]
        return timings, seconds

    return send


def prove(timings: dict[str, Any], seconds: float) -> None:
    """The phases add up, none is missing, and all of it lies in what the client waited."""
    phases = timings["phases_ms"]
    assert list(phases) == list(PHASES)
    assert all(value >= 0 for value in phases.values())
    assert sum(phases.values()) == pytest.approx(timings["first_token_ms"], abs=0.01)
    assert timings["first_token_ms"] <= timings["total_ms"] <= 1000 * seconds
    parts = ("receive", "template", "tokenise", "hand_over", "prefill", "sample", "deliver")
    assert all(phases[phase] > 0 for phase in parts)


def test_phases_add_up(ask, text) -> None:
    for count in (4, 700):
        timings, seconds = ask(text(count, count))
        prove(timings, seconds)
        assert timings["phases_ms"]["grammar"] == 0
        assert timings["prompt_n"] >= count
        assert timings["predicted_n"] == 8
        assert timings["phases_ms"]["prefill"] < timings["prompt_ms"]


def test_what_is_cached_is_not_computed(ask, text) -> None:
    prompt = text(300, 4711)
    ask(prompt)
    timings, seconds = ask(prompt)
    prove(timings, seconds)
    assert timings["cache_n"] >= 256
    assert timings["prompt_n"] < 100


def test_a_grammar_has_its_time(ask) -> None:
    timings, seconds = ask("Name a colour.", response_format=SCHEMA)
    prove(timings, seconds)
    assert timings["phases_ms"]["grammar"] > 0


def test_those_who_come_together_wait_for_each_other(ask, text) -> None:
    found: list[tuple[dict[str, Any], float]] = []
    threads = [
        threading.Thread(target=lambda seed=seed: found.append(ask(text(400, seed))))
        for seed in range(90, 96)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for timings, seconds in found:
        prove(timings, seconds)
    # The others were there when the last of them came.
    before = [timings["ahead"]["running"] + timings["ahead"]["waiting"] for timings, _ in found]
    assert max(before) >= 1
