"""What rank 0 tells the other ranks (msgspec over a socket pair), and what they answer.

rank 0 -> others   Begin; Allocate; then in any order Run, Beside, Advance, Drop, Prepare,
                   Load, Forget
others -> rank 0   Loaded; Allocated; AdapterRead for each Load; or Failed

All that is computed together is computed by every rank in the order of these messages.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from headstart.engine.batch import AdapterRows, Batch, Read
from headstart.engine.config import EngineConfig
from headstart.engine.models.reading import Unread
from headstart.engine.sequence import Adapter
from headstart.kernels.ranges import KVRanges

_LENGTH = 4  # bytes before each message


class WireBatch(msgspec.Struct, array_like=True, frozen=True):
    """A Batch as bytes: arrays are int32, logit_rows int64. ``adapters``: number, rows.
    ``reads``: first row, end, whether it needs logits.
    """

    token_ids: bytearray
    positions: bytearray
    slots: bytearray
    ranges: list[bytearray]
    logit_rows: bytearray | None
    adapters: list[tuple[int, bytearray]]
    reads: list[tuple[int, int, bool]]

    @classmethod
    def of(cls, batch: Batch, number: Callable[[Adapter], int]) -> WireBatch:
        ranges = batch.kv_ranges
        return cls(
            _bytes(batch.token_ids),
            _bytes(batch.positions),
            _bytes(batch.slots),
            [bytearray(getattr(ranges, name)) for name in KVRanges.__slots__],
            None if batch.logit_rows is None else _bytes(batch.logit_rows),
            [(number(entry.adapter), bytearray(entry.rows)) for entry in batch.adapters],
            [(read.first, read.end, read.reader.needs_logits) for read in batch.reads],
        )

    def batch(self, adapters: Mapping[int, Adapter]) -> Batch:
        """The same batch, over the rank's own adapters."""
        rows = self.logit_rows
        return Batch(
            token_ids=_tensor(self.token_ids, torch.int32),
            positions=_tensor(self.positions, torch.int32),
            slots=_tensor(self.slots, torch.int32),
            kv_ranges=KVRanges(*(np.frombuffer(data, dtype=np.int32) for data in self.ranges)),
            logit_rows=None if rows is None else _tensor(rows, torch.int64),
            adapters=[
                AdapterRows(adapters[number], np.frombuffer(data, dtype=np.int32))
                for number, data in self.adapters
            ],
            reads=[Read(first, end, Unread(logits)) for first, end, logits in self.reads],
        )


def _bytes(tensor: Tensor) -> bytearray:
    return bytearray(tensor.numpy())


def _tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


class Begin(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Be ``rank``, and load your share of the model. ``config``: nothing in it is left open.

    ``store_port``: of the torch.distributed store where all meet.
    """

    config: EngineConfig
    rank: int
    store_port: int


class Allocate(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Make KV memory of so many pages, and meet the others."""

    num_pages: int


class Run(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Compute it."""

    batch: WireBatch


class Beside(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Begin to compute it in pieces, the first when told to advance; others are in other places."""

    batch: WireBatch
    tile_rows: int
    place: int


class Advance(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Compute the next piece of what was begun there."""

    place: int


class Drop(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Compute no more of what was begun there."""

    place: int


class Prepare(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Have the memory of pages ``[first, last)`` ready."""

    first: int
    last: int


class Load(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Read the adapter in folder ``path``, whose digest is this, and call it ``number``."""

    number: int
    path: str
    digest: bytes


class Forget(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """No batch will name this adapter any more."""

    number: int


class Loaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The weights are there."""


class Allocated(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """So is the KV memory."""


class AdapterRead(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``error``: why it was not."""

    error: str | None


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The rank cannot start, and ends; ``message`` is one line."""

    message: str


ToRank = Begin | Allocate | Run | Beside | Advance | Drop | Prepare | Load | Forget
FromRank = Loaded | Allocated | AdapterRead | Failed


class Channel:
    """Messages over one end of a stream socket. Every method raises OSError when the other end
    is gone, and TimeoutError, which is one, by the socket's own timeout."""

    def __init__(self, connection: socket.socket, receives: Any) -> None:
        self.connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)

    def send(self, message: ToRank | FromRank) -> None:
        self.send_encoded(self.encode(message))

    def encode(self, message: ToRank | FromRank) -> bytes:
        data = self._encoder.encode(message)
        return len(data).to_bytes(_LENGTH, "little") + data

    def send_encoded(self, data: bytes) -> None:
        self.connection.sendall(data)

    def receive(self) -> Any:
        size = int.from_bytes(self._exactly(_LENGTH), "little")
        return self._decoder.decode(self._exactly(size))

    def close(self) -> None:
        self.connection.close()

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self.connection.recv_into(view)
            if not count:
                raise ConnectionResetError("the other end closed the connection")
            view = view[count:]
        return data
