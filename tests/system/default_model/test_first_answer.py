"""The question of README.md is answered rightly, every time, in every format the CPU serves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

README = Path(__file__).parents[3] / "README.md"
TIMES = 20


def answers(url: str) -> list[str]:
    """What README's request, which names no sampling, is answered with each time."""
    [body] = re.findall(r"/v1/chat/completions [^\n]*-d '([^']*)'", README.read_text())
    path = f"{url}/v1/chat/completions"
    with httpx.Client(timeout=300) as client:
        got = [client.post(path, json=json.loads(body)).json() for _ in range(TIMES)]
    return [answer["choices"][0]["message"]["content"] for answer in got]


def test_the_first_question(server):
    assert sum("Paris" in answer for answer in answers(server.url)) == TIMES


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8"])
def test_the_first_question_in_every_format(start_server, default_flags, weights):
    server = start_server(*default_flags, "--weights", weights)
    assert sum("Paris" in answer for answer in answers(server.url)) == TIMES
