"""Opening: both ends of a link find each other, each in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
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
        work = (sends, spec, pool, store, timeout, listener)
        self._thread = threading.Thread(target=self._run, args=work, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._closed = True
        if self.end is not None:
            self.end.close()

    def _run(
        self,
        sends: bool,
        spec: LinkEnd,
        pool: Pool,
        store: Store | None,
        timeout: float,
        listener: socket.socket | None,
    ) -> None:
        try:
            if spec.transport == "shared":
                connection = _connection(spec, listener, timeout)
                connection.settimeout(timeout)
                self.end = (SharedSender if sends else SharedReceiver)(connection, pool)
            else:
                groups = _groups(sends, spec, pool, store, timeout)
                if sends:
                    self.end = GroupSender(groups, pool)
                else:
                    self.end = GroupReceiver(groups, pool)
                    self.end.probed(timeout)
        except (OSError, RuntimeError, ValueError, IndexError, msgspec.MsgspecError) as error:
            self.error = reason(error) or type(error).__name__
        if self._closed and self.end is not None:
            self.end.close()


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
