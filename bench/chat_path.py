"""Which code a streamed chat passes: ``python -m headstart.bench.chat_path``.

An engine that computes nothing stands behind the real app. One chat of one token is sent to it in
this process, and every file of server/ of which a function runs meanwhile is listed with its lines,
and with the lines of those functions.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import headstart.server
from headstart.bench.http_path import SteadyEngine, bench_tokenizer, request
from headstart.server.http.app import create_app

SERVER = Path(headstart.server.__path__[0]).resolve()


async def chat_path() -> dict[Path, set[CodeType]]:
    """The functions that run, by their files below ``SERVER``."""
    tokenizer = bench_tokenizer()
    engine = SteadyEngine(tokenizer.encode("go on", add_special_tokens=False), 0.01)
    app = create_app(engine, tokenizer, model_names=["bench"])
    head, _, body = request(1).partition(b"\r\n\r\n")
    path = head.split()[1].decode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []
    found: dict[Path, set[CodeType]] = {}
    files: dict[str, Path] = {}

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename not in files:
                files[code.co_filename] = Path(code.co_filename).resolve()
            path = files[code.co_filename]
            if path.is_relative_to(SERVER):
                found.setdefault(path.relative_to(SERVER), set()).add(code)

    async with app.router.lifespan_context(app):
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            await app(scope, receive, send)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    if sent[0]["status"] != 200:
        raise ValueError(sent)
    return found


def lines_of(codes: set[CodeType]) -> int:
    """How many lines the functions have, one inside another counted once."""
    spans = (
        (code.co_firstlineno, max(end or 0 for _, _, end in code.co_lines())) for code in codes
    )
    return len({line for first, last in spans for line in range(first, last + 1)})


def main() -> None:
    found = asyncio.run(chat_path())
    files = lines = 0
    for path, codes in sorted(found.items()):
        whole = len((SERVER / path).read_text().splitlines())
        print(f"{path!s:40} {whole:5} lines, {lines_of(codes):4} in what runs")
        files, lines = files + whole, lines + lines_of(codes)
    print(f"{len(found)} files with {files} lines; {lines} in functions that run")


if __name__ == "__main__":
    main()
