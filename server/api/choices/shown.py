"""What of an answer a client asked to see, beside its text."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from headstart.server.http.reply import Choice, Usage

encode = msgspec.json.encode


class TokenNames(Protocol):
    """How tokens are written where log-probabilities name them; the Tokenizer writes their text."""

    def token_bytes(self, token_id: int) -> bytes: ...


class TokenIdNames:
    """Tokens as ``token_id:N``, so that those that are no text by themselves can be told apart."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"token_id:%d" % token_id


@dataclass(frozen=True, slots=True)
class Shown:
    """usage: after a stream. continuous_usage: in each of its events, of its choice so far.
    token_ids: of prompt and answer. tokens_as_ids: log-probabilities name tokens by id.
    request_id: what the answer's id ends with; None: something new.
    """

    usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    request_id: str | None = None

    def answer_id(self, kind: str) -> str:
        return f"{kind}-{self.request_id or uuid.uuid4().hex}"

    @property
    def plain(self) -> bool:
        """Nothing of it differs from event to event."""
        return not (self.continuous_usage or self.token_ids)

    def ids_of(self, token_ids: Sequence[int]) -> bytes:
        """What an event's choice says of its tokens."""
        return b',"token_ids":' + encode(list(token_ids)) if self.token_ids else b""

    def tail_of(self, choice: Choice, more: bytes = b"") -> bytes:
        """What ends an event behind the fields of its choice; ``more``: fields beside those."""
        usage = b""
        if self.continuous_usage:
            usage = b',"usage":' + encode(Usage.of([choice]).json())
        elif self.usage:
            usage = b',"usage":null'
        return b"}]" + more + usage + b"}\n\n"
