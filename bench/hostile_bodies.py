"""How long one body holds up everybody: ``python -m headstart.bench.hostile_bodies``.

Each kind of body is as large as the server takes, made of as many small things as fit, and goes
through the real app, with an engine behind it that computes nothing. A task beside it on the same
event loop looks at the clock all the time: the longest time that it was not asked is how long a
token of a stream would have waited. Prints a table of kind, bytes, status, ``blocked`` (that time
in ms, the worst of several requests) and ``answered`` (ms until the answer).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import uvloop
from fastapi import FastAPI

from headstart.bench.http_path import SteadyEngine, bench_tokenizer
from headstart.server.http.app import create_app
from headstart.server.http.bounds import has_values
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

TICK = 0.0005
CHUNK = 64 * 1024
CONTEXT = 8192

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HI = '"messages":[{"role":"user","content":"hi"}]'
CALL = '{"id":"a","type":"function","function":{"name":"f","arguments":"%s"}}'


class Kind:
    """``head``, ``unit`` repeated with commas between, ``tail``: a body below ``path``."""

    def __init__(
        self, name: str, path: str, head: str, unit: str, tail: str, between: str = ","
    ) -> None:
        self.name, self.path = name, path
        self._head, self._unit, self._tail, self._between = head, unit, tail, between

    def body(self, size: int) -> bytes:
        """At most ``size`` bytes."""
        start = '{"model":"bench","max_tokens":1,' + self._head
        piece = self._unit + self._between
        count = (size - len(start) - len(self._tail)) // len(piece)
        whole = piece * count
        return (start + whole.removesuffix(self._between) + self._tail).encode()


KINDS = (
    Kind("prompt: ids", TEXT, '"prompt":[', "1", "]}"),
    Kind("prompt: ids that are none", TEXT, '"prompt":[1,', "9999999999", "]}"),
    Kind("prompt: lists of an id", TEXT, '"prompt":[', "[1]", "]}"),
    Kind("prompt: two lists of ids", TEXT, '"prompt":[[1],[', "1", "]]}"),
    Kind("prompt: texts", TEXT, '"prompt":[', '"a"', "]}"),
    Kind("prompt: one text", TEXT, '"prompt":"', "a ", '"}', ""),
    Kind("prompt: escapes", TEXT, '"prompt":"', "\\u0061", '"}', ""),
    Kind("prompt: special tokens", TEXT, '"prompt":"', "<|im_end|>", '"}', ""),
    Kind("prompt: nested lists", TEXT, '"prompt":', "[", "}", ""),
    Kind("input: ids", "/v1/embeddings", '"input":[', "1", "]}"),
    Kind("tokens of /detokenize", "/detokenize", '"tokens":[', "1", "]}"),
    Kind("documents of /rerank", "/v1/rerank", '"query":"a","documents":[', '{"text":""}', "]}"),
    Kind("text_2 of /score", "/v1/score", '"text_1":"a","text_2":[', '""', "]}"),
    Kind("allowed_token_ids", TEXT, '"prompt":"a","allowed_token_ids":[', "1", "]}"),
    Kind("stop_token_ids", TEXT, '"prompt":"a","stop_token_ids":[', "1", "]}"),
    Kind("stop", TEXT, '"prompt":"a","stop":[', '"a"', "]}"),
    Kind("bad_words", TEXT, '"prompt":"a","bad_words":[', '"a"', "]}"),
    Kind("logit_bias", TEXT, '"prompt":"a","logit_bias":{', '"1":1', "}}"),
    Kind("segment_mask", TEXT, '"prompt":"a","segment_mask":{"tokens":[', "[0,1]", "]}}"),
    Kind("unknown fields", TEXT, '"prompt":"a",', '"b":{}', "}"),
    Kind("a number of many digits", TEXT, '"prompt":"a","max_tokens":1', "1", "}", ""),
    Kind("a fraction of many digits", TEXT, '"prompt":"a","temperature":0.1', "1", "}", ""),
    Kind("messages", CHAT, '"messages":[', '{"role":"user","content":""}', "]}"),
    Kind("messages that are none", CHAT, '"messages":[', "{}", "]}"),
    Kind(
        "parts of a message", CHAT, '"messages":[{"role":"user","content":[',
        '{"type":"text","text":""}', "]}]}",
    ),
    Kind(
        "tool calls", CHAT, '"messages":[{"role":"assistant","tool_calls":[', CALL % "",
        ']},{"role":"user","content":"a"}]}',
    ),
    Kind(
        "arguments of a call", CHAT,
        '"messages":[{"role":"assistant","tool_calls":[' + (CALL % "").removesuffix('"}}') +
        '{\\"a\\":[', "1", ']}"}}]},{"role":"user","content":"a"}]}',
    ),
    Kind(
        "arguments of many calls", CHAT, '"messages":[{"role":"assistant","tool_calls":[',
        CALL % ('{\\"a\\":[' + ",".join("1" * 30_000) + "]}"),
        ']},{"role":"user","content":"a"}]}',
    ),
    Kind("tools", CHAT, HI + ',"tools":[', '{"type":"function"}', "]}"),
    Kind("tool_choice", CHAT, HI + ',"tools":[],"tool_choice":{"a":[', "{}", "]}}"),
    Kind("a schema", CHAT, HI + ',"guided_json":{"enum":[', "1", "]}}"),
    Kind(
        "properties of a schema", CHAT,
        HI + ',"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"a":[',
        '{"a":1}', "]}}}}",
    ),
    Kind("guided_choice", CHAT, HI + ',"guided_choice":[', '"a"', "]}"),
    Kind("documents of a chat", CHAT, HI + ',"documents":[', '{"text":""}', "]}"),
    Kind("chat_template_kwargs", CHAT, HI + ',"chat_template_kwargs":{', '"a":1', "}}"),
    Kind("input items", RESPONSES, '"input":[', '{"role":"user","content":""}', "]}"),
    Kind(
        "parts of an item", RESPONSES, '"input":[{"role":"user","content":[',
        '{"type":"input_text","text":""}', "]}]}",
    ),
    Kind("metadata", RESPONSES, '"input":"a","metadata":{', '"":1', "}}"),
    Kind("include", RESPONSES, '"input":"a","include":[', '""', "]}"),
    Kind("blocks", MESSAGES, '"messages":[{"role":"user","content":[',
         '{"type":"text","text":""}', "]}]}"),
    Kind("system blocks", MESSAGES, HI + ',"system":[',
         '{"type":"text","text":""}', "]}"),
    Kind("a text of commas", MESSAGES, '"messages":[{"role":"user","content":"',
         ",", '"}]}', ""),
    Kind("messages of /tokenize", "/tokenize", '"messages":[', '{"role":"user","content":""}',
         "]}"),
)  # fmt: skip


def as_large_as_taken(kind: Kind, settings: ServerSettings) -> Iterator[bytes]:
    """The largest body, and one just below the limit of values, which is looked at longest."""
    yield kind.body(settings.max_body_bytes)
    low, high = 1024, settings.max_body_bytes
    while high - low > 1024:
        size = (low + high) // 2
        if has_values(kind.body(size), settings.max_body_values):
            high = size
        else:
            low = size
    yield kind.body(low)


async def ask(app: FastAPI, path: str, body: bytes) -> int:
    """The status of a POST."""
    chunks = [body[i : i + CHUNK] for i in range(0, len(body), CHUNK)]
    status = 0

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if not chunks:
            await asyncio.Event().wait()
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return status


async def blocked(work: Callable[[], Any]) -> tuple[float, float, int]:
    """Seconds of the longest pause of the event loop while ``work`` ran, of all of it, and what it
    returned."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        before = time.perf_counter()
        while True:
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            longest = max(longest, now - before - TICK)
            before = now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    longest, begin = 0.0, time.perf_counter()
    status = await work()
    seconds = time.perf_counter() - begin
    await asyncio.sleep(2 * TICK)
    ticking.cancel()
    return longest, seconds, status


def bench_app(tokenizer: Tokenizer, settings: ServerSettings) -> FastAPI:
    """An app whose model has a context of CONTEXT tokens."""
    engine = SteadyEngine([1], 0.01)
    assert engine.model is not None
    engine.model = msgspec.structs.replace(engine.model, max_model_len=CONTEXT)
    return create_app(engine, tokenizer, model_names=["bench"], settings=settings)


async def measure(repeats: int, only: str) -> None:
    """Print the table."""
    settings = ServerSettings()
    app = bench_app(bench_tokenizer(), settings)
    print(f"{'kind':<28}{'bytes':>10}{'status':>8}{'blocked':>10}{'answered':>10}", flush=True)
    async with app.router.lifespan_context(app):
        await ask(app, TEXT, b"{}")
        gc.collect()
        gc.freeze()  # as serve does
        for kind in KINDS:
            if only not in kind.name:
                continue
            for body in as_large_as_taken(kind, settings):
                found = [
                    await blocked(lambda: ask(app, kind.path, body))  # noqa: B023
                    for _ in range(repeats)
                ]
                longest = 1000 * max(pause for pause, _, _ in found)
                seconds = 1000 * max(whole for _, whole, _ in found)
                status = found[0][2]
                print(
                    f"{kind.name:<28}{len(body):>10,}{status:>8}{longest:>10.1f}{seconds:>10.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3, help="requests of each kind")
    parser.add_argument("--only", default="", help="kinds whose names have this in them")
    args = parser.parse_args()
    uvloop.run(measure(args.repeats, args.only))


if __name__ == "__main__":
    main()
