"""Answers of /v1/responses: the object, and the events of a stream, each with its number."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headstart.server.api.choices.logprobs import chat_logprobs
from headstart.server.http.errors import APIError
from headstart.server.http.reply import Choice, Format, Usage
from headstart.server.text.answer import Part, Text
from headstart.server.text.answer_blocks import Block, Blocks, Step
from headstart.server.text.assembler import Delta
from headstart.server.text.tokenizer import Tokenizer

encode = msgspec.json.encode

Keep = Callable[[bytes, Sequence[Block]], None]
"""Stores an answer: its JSON and its blocks."""

_ITEM_IDS = {"text": "msg", "thought": "rs", "call": "fc"}


class ResponseFormat(Format):
    """``head``: the fields of the answer that are known before it. ``logprobs``: they are shown;
    the answer is text and nothing else then. ``keep``: None for answers that are not stored."""

    every_token = False

    def __init__(
        self, head: dict[str, Any], tokenizer: Tokenizer, *, logprobs: bool, keep: Keep | None
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._shows_logprobs = logprobs
        self._keep = keep
        self._blocks = Blocks()
        self._ids: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._number = 0

    def opening(self, choice: Choice) -> bytes:
        response = self._response("in_progress", None)
        return b"".join(
            self._event(f"response.{kind}", {"response": response})
            for kind in ("created", "in_progress")
        )

    def event(self, choice: Choice, delta: Delta) -> bytes:
        parts: Sequence[Part] = [Text(delta.text)] if delta.parts is None else delta.parts
        new = self._named(delta.logprobs or ())
        if self._shows_logprobs:
            self._logprobs += new
        steps = [step for part in parts for step in self._blocks.push(part)]
        if delta.finish_reason is not None:
            steps += self._close(delta.finish_reason)
        return b"".join(self._step_events(step, new) for step in steps)

    def ending(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        response = self._finished(choices[0], usage)
        self._store(encode(response))
        return self._event(f"response.{response['status']}", {"response": response})

    def failure(self, error: APIError) -> bytes:
        code = error.code or error.type
        shown = {"code": code, "message": error.message, "param": error.param}
        failed = self._response("failed", None) | {
            "error": {"code": code, "message": error.message},
            "output": self._items(),
        }
        return self._event("error", shown) + self._event("response.failed", {"response": failed})

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        (choice,) = choices
        self._logprobs = self._named(choice.logprobs)
        parts: Sequence[Part] = [Text(choice.text)] if choice.parser is None else choice.parts
        for part in parts:
            for _ in self._blocks.push(part):
                pass
        self._close(choice.finish_reason or "length")
        body = encode(self._finished(choice, usage))
        self._store(body)
        return body

    def _close(self, reason: str) -> list[Step]:
        """The last steps. An answer of nothing is one empty text."""
        steps = [] if self._blocks.all else list(self._blocks.push(Text("")))
        return steps + list(self._blocks.close(cut=reason == "length"))

    def _store(self, body: bytes) -> None:
        if self._keep is not None:
            self._keep(body, self._blocks.all)

    def _named(self, tokens: Sequence[Any]) -> list[dict[str, Any]]:
        if not self._shows_logprobs:
            return []
        found: list[dict[str, Any]] = chat_logprobs(self._tokenizer, tokens)["content"]
        return found

    def _response(self, status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        return self._head | {"status": status, "output": [], "usage": usage}

    def _finished(self, choice: Choice, usage: Usage) -> dict[str, Any]:
        cut = choice.finish_reason == "length"
        thoughts = any(block.kind == "thought" for block in self._blocks.all)
        counts = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": choice.thought_tokens if thoughts else 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        response = self._response("incomplete" if cut else "completed", counts)
        response["output"] = self._items()
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        return response

    def _items(self) -> list[dict[str, Any]]:
        return [
            self._item(block, "completed" if block.whole else "incomplete")
            for block in self._blocks.all
        ]

    def _item_id(self, block: Block) -> str:
        if block.index == len(self._ids):
            self._ids.append(f"{_ITEM_IDS[block.kind]}_{secrets.token_hex(16)}")
        return self._ids[block.index]

    def _item(self, block: Block, status: str, *, begun: bool = False) -> dict[str, Any]:
        """``begun``: as it is at its beginning, without content."""
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        content = [] if begun else [self._part(block)]
        match block.kind:
            case "text":
                return item | {"type": "message", "role": "assistant", "content": content}
            case "thought":
                return item | {"type": "reasoning", "summary": [], "content": content}
            case "call":
                return item | {
                    "type": "function_call",
                    "call_id": block.call_id,
                    "name": block.name,
                    "arguments": block.text,
                }

    def _part(self, block: Block, *, begun: bool = False) -> dict[str, Any]:
        text = "" if begun else block.text
        if block.kind == "thought":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if begun else self._logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _step_events(self, step: Step, logprobs: list[dict[str, Any]]) -> bytes:
        """``logprobs``: of the text that is new."""
        change, block, text = step
        where = {"item_id": self._item_id(block), "output_index": block.index}
        part = where | {"content_index": 0}
        kind = {
            "text": "response.output_text",
            "thought": "response.reasoning_text",
            "call": "response.function_call_arguments",
        }[block.kind]
        place = where if block.kind == "call" else part
        if change == "grown":
            of_text = {"logprobs": logprobs} if block.kind == "text" else {}
            if not text and not logprobs:
                return b""
            return self._event(f"{kind}.delta", place | {"delta": text} | of_text)
        if change == "opened":
            item = self._item(block, "in_progress", begun=True)
            events = [
                self._event(
                    "response.output_item.added", {"output_index": block.index, "item": item}
                )
            ]
            if block.kind != "call":
                begun = part | {"part": self._part(block, begun=True)}
                events.append(self._event("response.content_part.added", begun))
            return b"".join(events)
        match block.kind:
            case "text":
                done = {"text": block.text, "logprobs": self._logprobs}
            case "thought":
                done = {"text": block.text}
            case "call":
                done = {"name": block.name, "arguments": block.text}
        events = [self._event(f"{kind}.done", place | done)]
        if block.kind != "call":
            ended = part | {"part": self._part(block)}
            events.append(self._event("response.content_part.done", ended))
        item = self._item(block, "completed" if block.whole else "incomplete")
        whole = {"output_index": block.index, "item": item}
        return b"".join((*events, self._event("response.output_item.done", whole)))

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        data = encode({"type": kind, "sequence_number": self._number} | fields)
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
