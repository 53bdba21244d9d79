"""What client programs send (tests/clients/requests), streamed and whole: none of it is refused
that can be answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

FOLDER = Path(__file__).parents[2] / "clients" / "requests"
FILES = sorted(FOLDER.glob("*.json"))
LENGTHS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""Endpoints that stream, and what they call the length of an answer."""
MOST = 4
"""Tokens of an answer: what counts is that there is one."""


def request_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The body in a file, and the notes about it."""
    fields = json.loads(path.read_text())
    notes = {name: value for name, value in fields.items() if name.startswith("_")}
    return {name: fields[name] for name in fields.keys() - notes.keys()}, notes


def cases() -> list[Any]:
    found = []
    for path in FILES:
        url = request_of(path)[1]["_path"].partition("?")[0]
        streams = (False, True) if url in LENGTHS else (None,)
        found += [
            pytest.param(path, url, stream, id=f"{path.stem}{'-streamed' if stream else ''}")
            for stream in streams
        ]
    return found


def shortened(body: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    given = [name for name in names if body.get(name) is not None] or names[:1]
    return body | {name: min(body.get(name) or MOST, MOST) for name in given}


def test_there_are_requests():
    assert len(FILES) > 80
    assert {request_of(path)[1]["_client"] for path in FILES} >= {"claude-code", "codex", "litellm"}


@pytest.mark.parametrize(("path", "url", "stream"), cases())
def test_it_is_answered(server, path, url, stream):
    body, notes = request_of(path)
    body["model"] = server.model
    if stream is not None:
        body = shortened(body, LENGTHS[url]) | {"stream": stream}
    if not stream:
        body.pop("stream_options", None)
    response = httpx.post(
        server.url + notes["_path"], json=body, headers=notes.get("_headers"), timeout=300
    )
    expected = notes["_expected"]["status"]
    allowed = (200, 400) if isinstance(expected, str) else (expected,)
    assert response.status_code in allowed, response.text
    if response.status_code == 200 and stream:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert events
        assert [event for event in events if event.get("error")] == []
        assert [event for event in events if event.get("type") == "response.failed"] == []
