"""Answers of /v1/responses: the object, and the events of a stream, each with its number."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from headstart.server.api.choices.logprobs import chat_logprobs
from headstart.server.api.openai_responses.custom_input import InputReader, custom_input
from headstart.server.api.openai_responses.items import new_id
from headstart.server.api.openai_responses.store import Item
from headstart.server.api.openai_responses.tools import Offered, OfferedTools
from headstart.server.http.errors import APIError
from headstart.server.http.reply import NO_MORE, Choice, Format, Usage
from headstart.server.text.answer import Part, Text
from headstart.server.text.answer_blocks import Block, Blocks, Step
from headstart.server.text.assembler import Delta
from headstart.server.text.tokenizer import Tokenizer

encode = msgspec.json.encode

Keep = Callable[[bytes, Sequence[Item]], None]
"""Stores an answer: its JSON and its items."""

_ITEM_IDS = {"text": "msg", "thought": "rs", "call": "fc"}


class ResponseFormat(Format):
    """``head``: the fields of the answer that are known before it. ``tools``: whose calls there may
    be. ``logprobs``: they are shown; the answer is text and nothing else then."""

    every_token = False

    def __init__(
        self,
        head: dict[str, Any],
        tools: OfferedTools,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        keep: Keep,
    ) -> None:
        self._head = head
        self._tools = tools
        self._tokenizer = tokenizer
        self._shows_logprobs = logprobs
        self._keep = keep
        self._blocks = Blocks()
        self._input = InputReader()  # of the custom tool that is being called
        self._ids: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._number = 0

    @property
    def answer_id(self) -> str:
        return str(self._head["id"])

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

    def ending(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        response = self._finished(choices[0], usage)
        self._keep(encode(response), response["output"])
        return self._event(f"response.{response['status']}", {"response": {**response, **more}})

    def failure(self, error: APIError) -> bytes:
        code = error.code or error.type
        shown = {"code": code, "message": error.message, "param": error.param}
        failed = self._response("failed", None) | {
            "error": {"code": code, "message": error.message},
            "output": self._items(),
        }
        return self._event("error", shown) + self._event("response.failed", {"response": failed})

    def body(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        (choice,) = choices
        self._logprobs = self._named(choice.logprobs)
        parts: Sequence[Part] = [Text(choice.text)] if choice.parser is None else choice.parts
        for part in parts:
            for _ in self._blocks.push(part):
                pass
        self._close(choice.finish_reason or "length")
        response = self._finished(choice, usage)
        body = encode(response)
        self._keep(body, response["output"])
        return encode({**response, **more}) if more else body

    def _close(self, reason: str) -> list[Step]:
        """The last steps. An answer of nothing is one empty text."""
        steps = [] if self._blocks.all else list(self._blocks.push(Text("")))
        return steps + list(self._blocks.close(cut=reason == "length"))

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

    def _called(self, block: Block) -> Offered | None:
        """The tool that a block calls, if it is a call."""
        return self._tools.tool(block.name) if block.kind == "call" else None

    def _item_id(self, block: Block) -> str:
        if block.index == len(self._ids):
            tool = self._called(block)
            prefix = "ctc" if tool is not None and tool.custom else _ITEM_IDS[block.kind]
            self._ids.append(new_id(prefix))
        return self._ids[block.index]

    def _item(self, block: Block, status: str, *, begun: bool = False) -> Item:
        """``begun``: as it is at its beginning, without content."""
        item: Item = {"id": self._item_id(block), "status": status}
        content = [] if begun else [self._part(block)]
        match block.kind:
            case "text":
                return item | {"type": "message", "role": "assistant", "content": content}
            case "thought":
                return item | {"type": "reasoning", "summary": [], "content": content}
        tool = self._tools.tool(block.name)
        item |= {"call_id": block.call_id, "name": tool.name}
        if tool.namespace is not None:
            item["namespace"] = tool.namespace
        given = "" if begun else block.text
        if tool.custom:
            return item | {"type": "custom_tool_call", "input": custom_input(given)}
        return item | {"type": "function_call", "arguments": given}

    def _part(self, block: Block, *, begun: bool = False) -> dict[str, Any]:
        text = "" if begun else block.text
        if block.kind == "thought":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if begun else self._logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _step_events(self, step: Step, logprobs: list[dict[str, Any]]) -> bytes:
        """``logprobs``: of the text that is new."""
        change, block, text = step
        tool = self._called(block)
        if change == "opened":
            return self._opened(block)
        if tool is not None and tool.custom:
            return self._input_events(step)
        kind, place = self._kind(block), self._place(block)
        if change == "grown":
            of_text = {"logprobs": logprobs} if block.kind == "text" else {}
            if not text and not logprobs:
                return b""
            return self._event(f"{kind}.delta", place | {"delta": text} | of_text)
        done: dict[str, Any] = {"text": block.text}
        if tool is not None:
            done = {"name": tool.name, "arguments": block.text}
        elif block.kind == "text":
            done["logprobs"] = self._logprobs
        events = self._event(f"{kind}.done", place | done)
        if tool is None:
            ended = place | {"part": self._part(block)}
            events += self._event("response.content_part.done", ended)
        return events + self._item_done(block)

    def _opened(self, block: Block) -> bytes:
        self._input = InputReader()
        item = self._item(block, "in_progress", begun=True)
        added = {"output_index": block.index, "item": item}
        events = self._event("response.output_item.added", added)
        if block.kind != "call":
            begun = self._place(block) | {"part": self._part(block, begun=True)}
            events += self._event("response.content_part.added", begun)
        return events

    def _input_events(self, step: Step) -> bytes:
        change, block, text = step
        kind, place = "response.custom_tool_call_input", self._place(block)
        if change == "grown":
            new = self._input.push(text)
            return self._event(f"{kind}.delta", place | {"delta": new}) if new else b""
        given, told = custom_input(block.text), self._input.read or ""
        rest = given[len(told) :] if given.startswith(told) else ""
        events = self._event(f"{kind}.delta", place | {"delta": rest}) if rest else b""
        return (
            events + self._event(f"{kind}.done", place | {"input": given}) + self._item_done(block)
        )

    def _item_done(self, block: Block) -> bytes:
        item = self._item(block, "completed" if block.whole else "incomplete")
        whole = {"output_index": block.index, "item": item}
        return self._event("response.output_item.done", whole)

    def _kind(self, block: Block) -> str:
        """What events of its text are called."""
        return {
            "text": "response.output_text",
            "thought": "response.reasoning_text",
            "call": "response.function_call_arguments",
        }[block.kind]

    def _place(self, block: Block) -> dict[str, Any]:
        where = {"item_id": self._item_id(block), "output_index": block.index}
        return where if block.kind == "call" else where | {"content_index": 0}

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        data = encode({"type": kind, "sequence_number": self._number} | fields)
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
