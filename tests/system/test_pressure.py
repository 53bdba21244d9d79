"""More work than KV pages: requests wait or start again, none is lost or wrong."""

from __future__ import annotations

import asyncio

import pytest

CONTEXT = 1024


@pytest.fixture
def small_server(start_server, smollm2, token_bytes):
    memory = str(2 * CONTEXT * token_bytes)
    return start_server(
        *(str(smollm2), "--kv-memory", memory, "--max-model-len", str(CONTEXT)),
        *("--threads", "1"),
    )


@pytest.mark.slow
async def test_24_requests_where_two_fit(small_server, text):
    async def ask(client, i: int) -> str:
        # Short prompts, of which most fit at once, and answers that need three times the pages.
        wanted = 100 + 37 * i % 160
        answer = await client.completions.create(
            model=small_server.model,
            prompt=text(20 + i, i),
            max_tokens=wanted,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.completion_tokens == wanted
        assert answer.choices[0].finish_reason == "length"
        return answer.choices[0].text

    async with small_server.async_client() as client:
        together = await asyncio.gather(*(ask(client, i) for i in range(24)))
        metrics = small_server.metrics()
        assert metrics["num_preemptions_total"] > 0
        # The text must be that of a request with the machine for itself.
        assert [await ask(client, i) for i in (3, 11, 23)] == [together[i] for i in (3, 11, 23)]
    small_server.wait_idle()
    print(f"preemptions: {metrics['num_preemptions_total']:.0f}")
