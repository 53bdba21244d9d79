"""Progress of a batch on stderr: a line rewritten in place on a terminal, now and then in a log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Protocol, TextIO

from headstart.server.generation.engine_client import EngineClient

BAR_CELLS = 24
TERMINAL_SECONDS = 0.5
LOG_SECONDS = 10.0


class _Tally(Protocol):
    done: int
    failed: int


class _Source(Protocol):
    """How far the input has been read, in bytes, and what has become of its lines."""

    size: int
    position: int

    @property
    def tally(self) -> _Tally: ...


class TokenMeter:
    """Tokens that were generated, whichever engine counted them: a new one begins at 0."""

    def __init__(self) -> None:
        self.total = 0
        self._last = 0

    def read(self, count: int) -> None:
        """``count``: what the engine says now."""
        self.total += count - self._last if count >= self._last else count
        self._last = count


class Progress:
    """``interval``: seconds between two lines; None: what suits ``stream``."""

    def __init__(self, stream: TextIO, interval: float | None = None) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._interval = interval or (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)

    @contextlib.asynccontextmanager
    async def shown(self, source: _Source, engine: EngineClient) -> AsyncIterator[None]:
        """Shows it while the block runs; on a terminal its end, too."""
        task = asyncio.create_task(self._show(source, engine))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._terminal:
                print(file=self._stream, flush=True)

    async def _show(self, source: _Source, engine: EngineClient) -> None:
        meter, since, before = TokenMeter(), time.monotonic(), 0
        while True:
            try:
                await asyncio.sleep(self._interval)
            finally:
                meter.read(engine.stats.generation_tokens)
                now = time.monotonic()
                rate = (meter.total - before) / max(now - since, 1e-3)
                since, before = now, meter.total
                if self._terminal:
                    self._write("\r\x1b[K" + self._bar(source) + self._text(source, rate))
            if not self._terminal:
                self._write(self._text(source, rate) + "\n")

    def _bar(self, source: _Source) -> str:
        cells = BAR_CELLS * source.position // max(source.size, 1)
        return f"[{'=' * cells}{' ' * (BAR_CELLS - cells)}] "

    def _text(self, source: _Source, rate: float) -> str:
        percent = 100 * source.position // max(source.size, 1)
        tally = source.tally
        return f"{percent:3d}% read, {tally.done} done, {tally.failed} failed, {rate:.0f} tokens/s"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
