"""Clients that go away: what they held is free within a step, and the others go on."""

from __future__ import annotations

import asyncio
import time

import pytest


def test_in_the_middle_of_a_stream(server, text):
    before = server.metrics()["generation_tokens_total"]
    others = [server.open_stream(text(30, seed), 120) for seed in (200, 201)]
    gone = [server.open_stream(text(60, seed), 4000) for seed in (202, 203, 204)]
    for stream in (*others, *gone):
        stream.wait_for_text()
    for stream in gone:
        stream.close()
    seconds = server.wait_for(lambda m: m["num_requests_running"] <= 2)
    for stream in others:
        status, events = stream.read()
        assert status == 200
        assert events[-1]["usage"]["completion_tokens"] == 120
        assert events[-2]["choices"][0]["finish_reason"] == "length"
    server.wait_idle()
    assert server.metrics()["generation_tokens_total"] - before < 4000
    print(f"3 of 5 streams closed: {1000 * seconds:.0f} ms until their requests were gone")


def test_in_the_middle_of_a_prefill(server, text):
    before = server.metrics()
    gone = server.open_stream(text(6000, 205), 10)
    server.wait_for(lambda m: m["num_requests_running"] == 1)
    gone.close()
    # A step takes at most 512 tokens of the prompt: what came after all of it would be a token.
    seconds = server.wait_for(lambda m: m["num_requests_running"] == 0)
    after = server.metrics()
    assert after["generation_tokens_total"] == before["generation_tokens_total"]
    assert after["kv_cache_usage_perc"] == 0
    print(f"closed within a prefill: {1000 * seconds:.0f} ms until it was gone")


@pytest.mark.parametrize("n", [1, 3])
async def test_without_streaming(server, n):
    before = server.metrics()["generation_tokens_total"]
    async with server.async_client() as client:
        request = asyncio.create_task(
            client.completions.create(
                model=server.model,
                prompt="Once upon a time",
                max_tokens=4000,
                n=n,
                extra_body={"ignore_eos": True},
            )
        )
        await asyncio.to_thread(server.wait_for, lambda m: m["num_requests_running"] == n)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await asyncio.to_thread(server.wait_idle)
    assert server.metrics()["generation_tokens_total"] - before < 4000


def test_many_that_come_and_go(server, text):
    before = server.metrics()["generation_tokens_total"]
    for round in range(5):
        streams = [server.open_stream(text(20, 300 + i), 2000) for i in range(12)]
        time.sleep(0.03 * round)
        for stream in streams:
            stream.close()
    server.wait_idle()
    assert server.metrics()["generation_tokens_total"] - before < 2000
