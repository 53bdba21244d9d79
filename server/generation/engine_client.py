"""What the server needs of the engine; ``engine.process.client.EngineClient`` supplies it."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from headstart.engine.process.messages import AdapterInfo, ModelInfo, Output, Stats
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams


class Stream(Protocol):
    """The tokens of one request, as they come.

    Iterating raises RequestError when the engine refuses the request, and EngineDeadError when
    the engine ends first. The iteration ends after the Output that has a ``finish_reason``.
    """

    def __aiter__(self) -> AsyncIterator[Output]: ...

    @property
    def reported(self) -> bool:
        """The engine's latest counters are from after it had heard of the request."""

    def abort(self) -> None:
        """Stop the request and free what it holds; may be called again, or after the end."""


class EngineClient(Protocol):
    """A running engine, or one that is being started."""

    @property
    def ready(self) -> bool:
        """The engine has loaded its model and lives."""

    @property
    def model(self) -> ModelInfo | None:
        """Set when ready."""

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The LoRA adapters that are loaded, by name."""

    @property
    def stats(self) -> Stats:
        """The engine's latest counters."""

    @property
    def restarts(self) -> int:
        """How often the engine was started again after it had died."""

    async def start(self) -> None:
        """Start the engine and wait until it is ready; raises HeadstartError when it cannot."""

    def add(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        *,
        salt: bytes = b"",
        segments: Sequence[Span] = (),
        adapter: str | None = None,
        priority: int = 0,
        owner: bytes = b"",
    ) -> Stream:
        """Start a request; raises EngineDeadError when the engine is not ready.

        ``segments``: spans of ``token_ids`` whose tokens see each other whole. ``adapter``: the
        name of a loaded LoRA adapter. ``priority``: lower ones come first. ``owner``: only who has
        the same, and the same salt, may be told of this prompt. With PoolingParams the one Output
        has a vector.
        """

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the adapter in folder ``path``.

        Raises RequestError, which says what is wrong with its name or files, or EngineDeadError.
        """

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for it. Raises RequestError if unknown, or EngineDeadError."""

    async def stop(self) -> None:
        """End the engine; running requests are dropped."""
