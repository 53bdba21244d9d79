"""Keys of a server: where they are read from, and which one a client has sent.

Of a key its SHA-256 is kept, nothing else; keys are long enough that it tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from headstart.engine.errors import ConfigError
from headstart.server.values import text_of

MIN_KEY_CHARS = 16


@dataclass(frozen=True, slots=True)
class Keys:
    """SHA-256 digests, 32 bytes each, of the keys that open this server."""

    api: tuple[bytes, ...] = field(default=(), repr=False)
    admin: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, api: Sequence[str] = (), admin: Sequence[str] = ()) -> Keys:
        """Raises ConfigError for a key that is both, which would make its users admins."""
        keys = cls(tuple(map(key_digest, api)), tuple(map(key_digest, admin)))
        if set(keys.api) & set(keys.admin):
            raise ConfigError("an API key and an admin key are the same")
        return keys

    @property
    def several(self) -> bool:
        """Callers can be told apart: each has to send a key, and there is more than one."""
        return bool(self.api) and len({*self.api, *self.admin}) > 1

    def owner(self, key: str) -> Literal["api", "admin"] | None:
        """What ``key`` is; compares it with all keys, so that the time taken tells nothing."""
        digest = key_digest(key)
        admin = [hmac.compare_digest(digest, known) for known in self.admin]
        api = [hmac.compare_digest(digest, known) for known in self.api]
        if any(admin):
            return "admin"
        return "api" if any(api) else None


def read_keys(flag: str, given: Sequence[str], file: Path | None, variable: str) -> list[str]:
    """The keys of ``--FLAG``, of ``--FLAG-file`` (one a line, # comments), of the environment.

    Raises ConfigError, without the key, for one that is too short or cannot be a header, for a
    file that cannot be read, and for one without keys: it would leave the server open.
    """
    sources = {flag: list(given), variable: os.environ.get(variable, "").split(",")}
    if file is not None:
        lines = [line.strip() for line in text_of(f"{flag}-file", file).splitlines()]
        sources[f"{flag}-file"] = [line for line in lines if line and not line.startswith("#")]
        if not sources[f"{flag}-file"]:
            raise ConfigError(f"{flag}-file: there is no key in {file}")
    keys = []
    for source, texts in sources.items():
        for key in map(str.strip, texts):
            if not key and source == variable:
                continue  # set to nothing is not set
            if not re.fullmatch(rf"[!-~]{{{MIN_KEY_CHARS},}}", key):
                raise ConfigError(
                    f"{source}: a key has at least {MIN_KEY_CHARS} characters, all of them "
                    "printable ASCII other than spaces"
                )
            keys.append(key)
    return keys


def key_digest(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()
