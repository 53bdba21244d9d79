"""Answers of /v1/messages: the message, and the events of a stream."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headstart.server.api.tools import arguments_object
from headstart.server.http.errors import APIError
from headstart.server.http.reply import NO_MORE, Choice, Format, Usage
from headstart.server.text.answer import Part, Text
from headstart.server.text.answer_blocks import Block, Blocks, Step
from headstart.server.text.assembler import Delta

encode = msgspec.json.encode

_DELTAS = {
    "text": ("text_delta", "text"),
    "thought": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessageFormat(Format):
    every_token = False

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._blocks = Blocks()

    @property
    def answer_id(self) -> str:
        return self._head["id"]

    def opening(self, choice: Choice) -> bytes:
        usage = _usage(Usage.of([choice]))
        end = {"stop_reason": None, "stop_sequence": None}
        message: dict[str, Any] = self._head | {"content": []} | end | {"usage": usage}
        return _event("message_start", {"message": message}) + _event("ping", {})

    def event(self, choice: Choice, delta: Delta) -> bytes:
        parts: Sequence[Part] = delta.parts or ()
        if delta.parts is None and delta.text:
            parts = [Text(delta.text)]
        steps = [step for part in parts for step in self._blocks.push(part)]
        if delta.finish_reason is not None:
            steps += self._blocks.close(cut=delta.finish_reason == "length")
        return b"".join(map(_step_event, steps))

    def ending(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        end = {"delta": _end(choices[0]), "usage": _usage(usage), **more}
        return _event("message_delta", end) + _event("message_stop", {})

    def failure(self, error: APIError) -> bytes:
        return b"event: error\ndata: " + error.anthropic_body() + b"\n\n"

    def ping(self) -> bytes:
        return _event("ping", {})

    def body(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        (choice,) = choices
        parts: Sequence[Part] = choice.parts
        if choice.parser is None and choice.text:
            parts = [Text(choice.text)]
        for part in parts:
            for _ in self._blocks.push(part):
                pass
        content = [_block(block, block.text) for block in self._blocks.all]
        end = {**_end(choice), "usage": _usage(usage), **more}
        return encode({**self._head, "content": content, **end})


def _usage(usage: Usage) -> dict[str, int]:
    """The parts of the prompt that were read from the cache, and that were not, add up to it."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _end(choice: Choice) -> dict[str, str | int | None]:
    stop = choice.assembler.stop_reason if choice.finish_reason == "stop" else None
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    reason = reasons.get(choice.finish_reason or "", "end_turn")
    return {"stop_reason": reason if stop is None else "stop_sequence", "stop_sequence": stop}


def _block(block: Block, text: str) -> dict[str, Any]:
    """A block with this text; "" is what it begins with."""
    match block.kind:
        case "text":
            return {"type": "text", "text": text, "citations": None}
        case "thought":
            return {"type": "thinking", "thinking": text, "signature": ""}
        case "call":
            given = arguments_object(text)
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": given}


def _step_event(step: Step) -> bytes:
    change, block, text = step
    where: dict[str, Any] = {"index": block.index}
    match change:
        case "opened":
            return _event("content_block_start", where | {"content_block": _block(block, "")})
        case "grown":
            kind, key = _DELTAS[block.kind]
            return _event("content_block_delta", where | {"delta": {"type": kind, key: text}})
        case "closed":
            return _event("content_block_stop", where)


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind} | fields) + b"\n\n"
