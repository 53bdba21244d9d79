"""Links: the KV of a prompt's beginning on its way from one rank to the next, layer by layer.

    offer(job, pages)      which pages of the sender's pool are going to be sent
    send(job, layer)       their KV of this layer is complete      expect(job, pages)
                           ── whole pages, as they lie in the pool ─▶ arrived(job, layer)

Nothing waits for anybody: sends are asynchronous, receives are posted early (KV-Runahead, arXiv
2405.05329, section 4). Transports are in shared_links.py and group_links.py; opening.py opens them.

An end that fails keeps the reason in ``error`` and says no to everything from then on.
"""

from __future__ import annotations

import select
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from headstart.engine.models.runner import ModelRunner
from headstart.engine.runahead.costs import LinkCosts
from headstart.kernels.memory import SharedMemory

UNEXPECTED = "what came is not what was expected"


class Pool(NamedTuple):
    """A rank's KV memory: ``pages`` uint8 ``[layers, num_pages, bytes]``."""

    pages: Tensor
    memory: SharedMemory | None

    @classmethod
    def of(cls, runner: ModelRunner) -> Pool:
        return cls(runner.backend.kv_pages(runner.kv), runner.backend.kv_memory(runner.kv))

    @property
    def gpu(self) -> str:
        """Which GPU it lies on, a name that no other has; "": in the host's memory."""
        if not self.pages.is_cuda:
            return ""
        return str(torch.cuda.get_device_properties(self.pages.device).uuid)

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return self.pages[:, 0].numel()


class Sender(Protocol):
    """The near end of a link."""

    error: str | None

    def offer(self, job: int, pages: list[int]) -> None:
        """These pages will be sent, layer after layer."""
        ...

    def send(self, job: int, layer: int) -> bool:
        """Send them as they are in this layer; False: too much is under way, ask again."""
        ...

    def taken(self, job: int) -> bool:
        """Whether the pages may be changed. Ask once all that is wanted of them has been sent."""
        ...

    def drop(self, job: int) -> None:
        """Send no more of it. ``taken`` says when its pages may be changed."""
        ...

    def close(self) -> None:
        """Say goodbye. ``join`` waits until that is done, for some seconds at most."""
        ...

    def join(self, timeout: float) -> None: ...


class Receiver(Protocol):
    """The far end. ``fileno()`` is readable when something may have arrived."""

    error: str | None
    costs: LinkCosts

    def fileno(self) -> int: ...

    def read(self) -> None:
        """Take note of what has come, so that ``fileno()`` is not readable any more."""
        ...

    def expect(self, job: int, pages: list[int]) -> None:
        """Its pages belong into these of the own pool, in their order."""
        ...

    def arrived(self, job: int, layer: int) -> bool:
        """Whether this layer is in the own pool; puts it there if it has come."""
        ...

    def drop(self, job: int) -> None:
        """Take no more of it."""
        ...

    def close(self) -> None:
        """Take nothing more. ``join`` waits for the other end's goodbye, for some seconds."""
        ...

    def join(self, timeout: float) -> None: ...


def readable(ends: list[Any], timeout: float) -> None:
    """Wait until something has come over one of the links, or for ``timeout`` seconds."""
    poller = select.poll()
    for end in ends:
        poller.register(end, select.POLLIN)
    poller.poll(timeout * 1000)
