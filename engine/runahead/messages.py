"""What the engine, the last rank of the chain, and its prefill ranks say to each other.

engine -> rank    Hello, Form, Prepare, Run, Cancel, Bye
rank -> engine    Welcome or Refused; Formed; Prepared or Declined; Finished, Failed

KV goes from rank to rank over links (links.py), never this way. Jobs, one for each prompt that runs
ahead, are numbered by the engine; a session is one life of an engine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.runahead.costs import LinkCosts


class Identity(msgspec.Struct, frozen=True):
    """What has to be equal on all ranks of a chain: whatever KV, or the room for it, depends on.

    ``settings``: of the model's config, as text by name. ``model``: a digest of its weights.
    Fields with defaults came later: a greeting without them differs, and is not lost.
    """

    version: str
    model: str
    weights: str
    page_size: int
    kv_layout: str
    max_model_len: int = 0
    settings: dict[str, str] = {}

    def difference(self, engine: Identity) -> str | None:
        """Why a rank with this identity cannot serve that engine, or None."""
        own, others = self._values(), engine._values()
        for name in {**own, **others}:
            if own.get(name) != others.get(name):
                mine, its = (values.get(name, "not set") for values in (own, others))
                return f"its {name.replace('_', ' ')} is {mine}, the engine's is {its}"
        return None

    def _values(self) -> dict[str, Any]:
        """By name, in the order in which they are worth telling."""
        fields = msgspec.structs.asdict(self)
        settings = fields.pop("settings")
        return {"version": fields.pop("version"), **settings, **fields}


class Hello(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``folder``: the engine's private folder; ``token``: what its file ``token`` holds. A rank
    that can read it is on the engine's machine."""

    session: int
    identity: Identity
    folder: str
    token: str


class Welcome(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``shares``: the rank can read the engine's folder, and others can map its KV memory.
    ``store_port``: of its torch.distributed store, where links between machines meet. ``gpu``: see
    links.Pool."""

    session: int
    costs: PrefillCosts
    shares: bool
    store_port: int
    host: str
    gpu: str


class Refused(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """This rank will not serve that engine."""

    session: int
    reason: str


class LinkEnd(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """One end of a link. ``name`` cannot be guessed, and is the same at both ends.

    transport: "shared" (``path``: a Unix socket, the sender listens), "gloo" or "nccl" (``host``
    and ``port`` of the store where both meet, 0 for one's own).
    """

    name: str
    transport: str
    path: str = ""
    host: str = ""
    port: int = 0


class Form(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Close the links there are and open these. ``origin``: from the engine itself, for what this
    rank's cache lacks when it is the first of a job."""

    generation: int
    upstream: LinkEnd | None
    downstream: LinkEnd
    origin: LinkEnd


class Formed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """``error``: why not. ``costs``: of the link from upstream, if there is one."""

    generation: int
    costs: LinkCosts | None
    error: str | None = None


class Prepare(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A prompt will run ahead: find what of it is cached. ``adapter``: folder, digest."""

    job: int
    token_ids: bytes
    namespace: bytes
    segments: list[tuple[int, int]]
    adapter: tuple[str, bytes] | None


class Prepared(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """KV of tokens ``[0, held)`` is here."""

    job: int
    held: int


class Declined(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """This rank cannot take part in the job; it can in others, and its links are as they were."""

    job: int
    reason: str


class Run(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Compute KV of tokens ``[start, end)``, those before come from ``source``: "upstream",
    "origin" or "" where nothing is lacking. Send what the next rank lacks below ``end``: it holds
    ``[0, next_held)``."""

    job: int
    start: int
    end: int
    source: str
    next_held: int


class Cancel(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Drop the job, whatever has become of it; its end is not reported."""

    job: int


class Bye(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine ends: close the links."""


class Finished(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The chunk is computed and handed to its link. ``busy``: seconds of computing; ``idle``: of
    waiting for KV; ``sent_bytes``: of keys and values."""

    job: int
    busy: float
    idle: float
    sent_bytes: int


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The job cannot go on here, for what has become of a link."""

    job: int
    reason: str


ToRank = Hello | Form | Prepare | Run | Cancel | Bye
FromRank = Welcome | Refused | Formed | Prepared | Declined | Finished | Failed
