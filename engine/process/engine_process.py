"""EngineProcess: the engine's process, begun at once, awaited by an event loop later.

Not asyncio's own: a process can be begun before there is a loop, and import torch while the server
imports what it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec

from headstart.engine.config import EngineConfig
from headstart.engine.process.cores import kernel_environment


class EngineProcess:
    """Runs ``COMMAND ENDPOINT``, whose first line of input is ``config``. Raises OSError where no
    process can be had. The input stays open: its end tells of the end of this process."""

    COMMAND: Sequence[str] = (sys.executable, "-m", "headstart.engine.process.service")

    def __init__(self, endpoint: str, config: EngineConfig) -> None:
        self.endpoint = endpoint
        self._process = subprocess.Popen(
            [*self.COMMAND, endpoint], stdin=subprocess.PIPE, env=kernel_environment()
        )
        self._ended: asyncio.Future[int] | None = None
        assert self._process.stdin is not None
        # One that has ended already cannot be written to; its exit status says more.
        with contextlib.suppress(OSError):
            self._process.stdin.write(msgspec.json.encode(config) + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or minus a signal; None until the end was waited for."""
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        """The return code, once it has ended. Always asked by the same event loop."""
        if self._ended is None:
            loop = asyncio.get_running_loop()
            self._ended = loop.create_future()
            # A thread that only waits: what asyncio does itself where there are no pidfds.
            threading.Thread(target=self._tell, args=(loop, self._ended), daemon=True).start()
        return await asyncio.shield(self._ended)

    def _tell(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Future[int]) -> None:
        status = self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was not read
            self._process.stdin.close()

        def tell() -> None:
            if not ended.done():
                ended.set_result(status)

        with contextlib.suppress(RuntimeError):  # the loop has ended, too
            loop.call_soon_threadsafe(tell)
