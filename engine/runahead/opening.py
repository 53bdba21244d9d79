"""Opening: both ends of a link find each other, each in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import distributed

from headstart.engine.process import groups as process_groups
from headstart.engine.process.groups import Store, meeting, own_address
from headstart.engine.runahead.group_links import GroupReceiver, Groups, GroupSender, reason
from headstart.engine.runahead.links import Pool
from headstart.engine.runahead.messages import LinkEnd
from headstart.engine.runahead.shared_links import SharedReceiver, SharedSender

dist: Any = distributed  # which does not declare what it has

OPENING_SECONDS = 10.0
"""How long the other end of a link may take to appear."""


class Opening:
    """An end of a link while it is being opened, in a thread. ``end``, or ``error``, once done."""

    def __init__(
        self, sends: bool, spec: LinkEnd, pool: Pool, store: Store | None, timeout: float
    ) -> None:
        self.end: Any = None
        self.error: str | None = None
        self._closed = False
        # Here, not in the thread: it has to be there when the receiver looks for it.
        listener = _listener(spec) if sends and spec.transport == "shared" else None

        def find() -> None:
            if spec.transport == "shared":
                connection = _connection(spec, listener, timeout)
                connection.settimeout(timeout)
                self.end = (SharedSender if sends else SharedReceiver)(connection, pool)
                return
            groups = _groups(sends, spec, pool, store, timeout)
            self.end = (GroupSender if sends else GroupReceiver)(groups, pool)
            if not sends:
                self.end.probed(timeout)

        self._thread = threading.Thread(target=self._run, args=(find,), daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._closed = True
        if self.end is not None:
            self.end.close()

    def _run(self, find: Callable[[], None]) -> None:
        try:
            find()
        except (OSError, RuntimeError, ValueError, IndexError, msgspec.MsgspecError) as error:
            self.error = reason(error) or type(error).__name__
        if self._closed and self.end is not None:
            self.end.close()


class Ends:
    """One rank's ends of its links, by name, from when they are being opened. See Opening."""

    def __init__(
        self,
        sends: dict[str, LinkEnd],
        receives: dict[str, LinkEnd],
        pool: Pool,
        store: Store | None,
    ) -> None:
        self._openings = {
            name: Opening(name in sends, end, pool, store, OPENING_SECONDS)
            for name, end in {**sends, **receives}.items()
        }
        self._closed: dict[str, Opening] = {}

    @property
    def done(self) -> bool:
        """Whether each is open, or has failed."""
        return all(opening.done for opening in self._openings.values())

    @property
    def error(self) -> str | None:
        """Why links could not be opened."""
        failed = ((name, opening.error) for name, opening in self._openings.items())
        return "; ".join(f"{name}: {error}" for name, error in failed if error) or None

    def get(self, name: str) -> Any:
        """The Sender or Receiver of this name; None where there is none, and until all are open."""
        return self._openings[name].end if self.done and name in self._openings else None

    def close(self) -> None:
        """There is none any more. ``join`` waits for the other ends, for some seconds each."""
        self._closed, self._openings = self._openings, {}
        for opening in self._closed.values():
            opening.close()

    def join(self, timeout: float) -> None:
        for opening in self._closed.values():
            if opening.end is not None:
                opening.end.join(timeout)


def _listener(spec: LinkEnd) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(OSError):
        listener.bind(spec.path)
        listener.listen(1)
    return listener


def _connection(spec: LinkEnd, listener: socket.socket | None, timeout: float) -> socket.socket:
    if listener is not None:
        listener.settimeout(timeout)
        try:
            return listener.accept()[0]
        finally:
            listener.close()
            Path(spec.path).unlink(missing_ok=True)
    deadline = time.monotonic() + timeout
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(spec.path)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _groups(sends: bool, spec: LinkEnd, pool: Pool, store: Store | None, timeout: float) -> Groups:
    if spec.port:
        host, port, own = spec.host, spec.port, own_address(spec.host)
    else:
        assert store is not None
        host, port, own = store.host, store.port, store.host
    rank, patience = 0 if sends else 1, timedelta(seconds=timeout)
    # A connection for each opening: while one waits for its other end, no other gets through.
    store_there = meeting(host, port, False, patience)
    prefixed = dist.PrefixStore(spec.name, store_there)
    headers = process_groups.gloo_group(prefixed, rank, 2, own, patience)
    if spec.transport != "nccl":
        return Groups(headers, headers, torch.device("cpu"))
    prefixed = dist.PrefixStore(f"{spec.name}/nccl", store_there)
    with torch.cuda.device(pool.pages.device) if pool.pages.is_cuda else contextlib.nullcontext():
        payloads = process_groups.nccl_group(prefixed, rank, 2, patience)
    return Groups(headers, payloads, pool.pages.device)
