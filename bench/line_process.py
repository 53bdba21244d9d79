"""A process that answers lines: one JSON object in on stdin, one out on stdout, until stdin closes.

While it waits for a line it computes nothing. What it says on stderr goes to ours.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from headstart.bench.http_client import BenchError

PATIENCE = 5.0
"""Seconds a process may take to end once its stdin is closed."""


class LineProcess:
    """The parent's side. ``name`` stands in errors; no answer takes longer than ``timeout`` s."""

    def __init__(self, name: str, command: Sequence[str], timeout: float) -> None:
        self.name = name
        self._timeout = timeout
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._pending = b""

    def send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        """The next object; lines that are none are passed over.

        Raises BenchError if the process ended, or does not answer in time.
        """
        give_up = time.monotonic() + self._timeout
        while True:
            line, end, rest = self._pending.partition(b"\n")
            if not end:
                self._pending += self._read(give_up)
                continue
            self._pending = rest
            if line.startswith(b"{"):
                answer: dict[str, Any] = json.loads(line)
                return answer

    def ask(self, message: Any) -> dict[str, Any]:
        self.send(message)
        return self.receive()

    def _read(self, give_up: float) -> bytes:
        assert self._process.stdout is not None
        left = max(0.0, give_up - time.monotonic())
        if not select.select([self._process.stdout], [], [], left)[0]:
            raise BenchError(f"{self.name}: no answer within {self._timeout:.0f} s")
        data: bytes = self._process.stdout.read(1 << 16)
        if not data:
            raise self._ended()
        return data

    def _ended(self) -> BenchError:
        return BenchError(f"{self.name} ended with status {self._process.wait()} (see above)")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ended(self._process, 0.0 if error else PATIENCE)


def ended(process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """Close its stdin, at which it should end; what has not within ``patience`` s is killed."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def answer_lines(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: ``answer`` each object of stdin."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
