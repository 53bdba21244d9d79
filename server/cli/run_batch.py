"""headstart run-batch: a file of requests to a file of answers, in OpenAI's batch format.

    input    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    output   {"id": "batch_req_1", "custom_id": "a", "response": {...}, "error": null}

The app answers in this process, without a socket. Lines are read as they are needed and answers
written as they come, so neither file is ever in memory; what is in memory are the custom_ids and
the lines in flight.

    input ─▶ BatchInput ─▶ N workers, each: app ─▶ answer ─▶ BatchOutput
                  └── a line that is no request ── its error ──▲

``id`` has the number of the line, so that an output says which lines of its input it has.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import msgspec
from fastapi import FastAPI

from headstart.engine.errors import ConfigError, HeadstartError
from headstart.server.cli.batch_progress import Progress
from headstart.server.http.access_log import REQUEST_ID
from headstart.server.http.auth import ADMIN_PATHS
from headstart.server.http.runtime import Runtime

MAX_TRIES_AGAIN = 3
RESTART_LIMIT = 300.0
"""Seconds an engine that died may take to be there again; then the run ends."""
MAX_CUSTOM_ID = 512
ENVELOPE_BYTES = 4096
"""What a line may have beside its body."""
INVALID_LINE = "invalid_line"
SKIPPED_AT_ONCE = 1 << 20


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Body(msgspec.Struct):
    model: Any = msgspec.UNSET
    stream: Any = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line that is a request: ``body`` is JSON and names a model."""

    number: int
    custom_id: str
    url: str
    body: bytes


class BadLine(Exception):
    """A line that is no request, and why."""

    def __init__(self, reason: str, custom_id: str | None = None) -> None:
        super().__init__(reason)
        self.custom_id = custom_id


@dataclass(slots=True)
class Tally:
    """Lines of the input: answered with status 200, failed, and found in the output already."""

    done: int = 0
    failed: int = 0
    kept: int = 0
    kept_failed: int = 0

    @property
    def status(self) -> int:
        """Exit status: 1 when any line has failed, then or now."""
        return 1 if self.failed or self.kept_failed else 0

    def __str__(self) -> str:
        text = f"{self.done} lines done, {self.failed} failed"
        if self.kept:
            text += f"; {self.kept} were there already, {self.kept_failed} of them failed"
        return text


@dataclass(slots=True)
class Written:
    """What an output has: custom_ids of requests, and numbers of lines that were none."""

    custom_ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)
    failed: int = 0

    @property
    def lines(self) -> int:
        return len(self.custom_ids) + len(self.bad_lines)


class _WrittenResponse(msgspec.Struct):
    status_code: int


class _WrittenError(msgspec.Struct):
    code: str


class _WrittenLine(msgspec.Struct):
    id: str
    custom_id: str | None = None
    response: _WrittenResponse | None = None
    error: _WrittenError | None = None


class BatchOutput:
    """The file of answers: one line each, in the order in which they come, written at once."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Opens the file. Without ``resume`` it must not exist; with it, ``written`` is what it
        has, and a last line that is not whole is cut off. Raises ConfigError."""
        self.written = Written()
        try:
            self._file = path.open("r+b" if resume and path.exists() else "xb", buffering=0)
            if resume:
                self._read(path)
        except FileExistsError:
            raise ConfigError(
                f"{path} exists: --resume goes on with it; else move it away"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        decoder = msgspec.json.Decoder(_WrittenLine)
        end = 0
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    self._note(decoder.decode(raw))
                except (msgspec.DecodeError, ValueError) as error:
                    raise ConfigError(
                        f"{path}, line {number}: no output of run-batch: {error}"
                    ) from error
                end += len(raw)
        self._file.truncate(end)
        self._file.seek(end)

    def _note(self, line: _WrittenLine) -> None:
        if line.response is None or line.response.status_code != 200:
            self.written.failed += 1
        if line.error is not None and line.error.code == INVALID_LINE:
            self.written.bad_lines.add(int(line.id.rpartition("_")[2]))
        elif line.custom_id is not None:
            self.written.custom_ids.add(line.custom_id)

    def write(
        self,
        number: int,
        custom_id: str | None,
        *,
        response: dict[str, Any] | None = None,
        error: dict[str, str] | None = None,
    ) -> None:
        """One line, whole or not at all for who reads it later. Raises HeadstartError."""
        line = {
            "id": f"batch_req_{number}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        rest = memoryview(msgspec.json.encode(line) + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as failure:
            raise HeadstartError(f"cannot write the output: {failure.strerror}") from failure

    def close(self) -> None:
        self._file.close()


class BatchInput:
    """The requests of a file, in order; ``position`` of ``size`` bytes have been read.

    Lines that are none become errors of ``output`` and count as failed in ``tally``; what
    ``output`` has already is passed over.
    """

    def __init__(
        self, file: BinaryIO, runtime: Runtime, urls: frozenset[str], output: BatchOutput
    ) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.tally = Tally(kept=output.written.lines, kept_failed=output.written.failed)
        self._file = file
        self._urls = urls
        self._output = output
        self._model = msgspec.json.encode(runtime.model_name)
        self._limit = runtime.settings.max_body_bytes + ENVELOPE_BYTES
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[BatchRequest]:
        written = self._output.written
        for number, raw in enumerate(self._lines(), 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                request = self._request(number, raw)
            except BadLine as bad:
                if number not in written.bad_lines:
                    self.tally.failed += 1
                    message = f"line {number}: {bad}"
                    error = {"code": INVALID_LINE, "message": message}
                    self._output.write(number, bad.custom_id, error=error)
            else:
                if request.custom_id not in written.custom_ids:
                    yield request

    def _lines(self) -> Iterator[bytes]:
        """Lines, of which those that are too long are cut: they stay too long."""
        while raw := self._file.readline(self._limit + 1):
            last = raw
            while not last.endswith(b"\n") and (last := self._file.readline(SKIPPED_AT_ONCE)):
                self.position += len(last)
            self.position += len(raw)
            yield raw

    def _request(self, number: int, raw: bytes) -> BatchRequest:
        if len(raw) > self._limit:
            raise BadLine(f"longer than {self._limit} bytes, the largest body and a little")
        try:
            line = msgspec.json.decode(raw, type=_Line)
            body = msgspec.json.decode(line.body, type=_Body)
        except (msgspec.ValidationError, RecursionError) as error:
            raise BadLine(f"not a JSON object with an object as its body: {error}") from error
        except ValueError as error:
            raise BadLine(f"not JSON: {error}") from error
        custom_id = line.custom_id
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
            raise BadLine(f"custom_id has to be a string of 1 to {MAX_CUSTOM_ID} characters")
        if custom_id in self._seen:
            raise BadLine(f"the custom_id {custom_id!r} was there before", custom_id)
        self._seen.add(custom_id)
        if line.method != "POST":
            raise BadLine(f"method has to be 'POST', not {line.method!r:.80}", custom_id)
        if not isinstance(line.url, str) or line.url not in self._urls:
            known = ", ".join(sorted(self._urls))
            raise BadLine(f"url {line.url!r:.80} is none of {known}", custom_id)
        if body.stream not in (None, False):
            raise BadLine("stream: answers in a file are whole", custom_id)
        content = bytes(line.body)
        if body.model is msgspec.UNSET:
            # Before the fields that there are, which stay as they were written.
            inside = content.strip()[1:]
            comma = b"" if inside.strip() == b"}" else b","
            content = b'{"model":' + self._model + comma + inside
        return BatchRequest(number, custom_id, line.url, content)


class Batch:
    """Answers to the requests of ``source``, in ``output``; ``app`` has been started."""

    def __init__(self, app: FastAPI, source: BatchInput, output: BatchOutput) -> None:
        self._runtime: Runtime = app.state.runtime
        self._source = source
        self._output = output
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None, trust_env=False
        )

    async def run(self, concurrency: int) -> None:
        """Until the input ends, ``concurrency`` lines at a time. Raises HeadstartError."""
        requests = iter(self._source)  # shared: each worker takes the next one
        async with self._client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(concurrency):
                        group.create_task(self._work(requests))
            except* HeadstartError as errors:
                raise errors.exceptions[0] from None

    async def _work(self, requests: Iterator[BatchRequest]) -> None:
        tally = self._source.tally
        for request in requests:
            response = await self._answer(request)
            if response.status_code == 200:
                tally.done += 1
            else:
                tally.failed += 1
            shown = {
                "status_code": response.status_code,
                "request_id": response.headers[REQUEST_ID],
                "body": msgspec.Raw(response.content),
            }
            self._output.write(request.number, request.custom_id, response=shown)

    async def _answer(self, request: BatchRequest) -> httpx.Response:
        """The answer; a 503, of an engine that died, is asked again when there is a new one."""
        tries_again = 0
        while True:
            response = await self._client.post(
                request.url, content=request.body, headers={"content-type": "application/json"}
            )
            # The app answers a request that is cancelled with a 503, and goes on.
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError
            if response.status_code != 503 or tries_again == MAX_TRIES_AGAIN:
                return response
            tries_again += 1
            await self._wait_for_engine()

    async def _wait_for_engine(self) -> None:
        # The streams of a dead engine fail a moment before the client says that it is not ready.
        await asyncio.sleep(0.1)
        try:
            async with asyncio.timeout(RESTART_LIMIT):
                while not self._runtime.engine.ready:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise HeadstartError(
                f"the engine ended and was not back after {RESTART_LIMIT:g} s; "
                "--resume goes on from here"
            ) from None


def request_urls(app: FastAPI) -> frozenset[str]:
    """What a line may ask: everything that takes a POST and leaves the server as it is."""
    paths: frozenset[str] = app.state.post_paths
    return paths - ADMIN_PATHS


async def run_batch(
    app: FastAPI,
    failures: list[HeadstartError],
    source: Path,
    output: BatchOutput,
    *,
    concurrency: int | None,
    progress: Progress,
) -> Tally:
    """Start the app's engine, answer the lines of ``source``, and stop it again.

    ``failures``: where ``create_app`` tells of an engine that does not start. ``concurrency``:
    lines at a time; None: as many as the engine computes at a time. Raises HeadstartError. A
    SIGINT or SIGTERM cancels the run; the lines that are done are in ``output``.
    """
    runtime: Runtime = app.state.runtime
    try:
        file = source.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from error
    with file, _cancelled_by_signals():
        lines = BatchInput(file, runtime, request_urls(app), output)
        async with app.router.lifespan_context(app):
            while not runtime.engine.ready:
                if failures:
                    raise failures[0]
                await asyncio.sleep(0.02)
            async with progress.shown(lines, runtime.engine):
                model = runtime.require_model()
                await Batch(app, lines, output).run(concurrency or model.max_running)
        return lines.tally


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
