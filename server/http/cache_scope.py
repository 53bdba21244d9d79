"""Who shares the KV of a prompt with whom.

    keys of the server    --shared-cache, or shared_cache: true    otherwise
    none or one           all                                      all
    several               all                                      who has the same key

``cache_salt`` cuts each of these once more. A prompt that others' KV is found for answers sooner,
and says so (``cached_tokens``): with several keys nobody may learn that way what another has sent.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field
from starlette.types import Scope

from headstart.server.http.auth import sent_key
from headstart.server.http.keys import key_digest
from headstart.server.http.policy import Body
from headstart.server.settings import ServerSettings

_SALT = "headstart.salt"


class CacheBody(Body):
    """The body of a request that computes a prompt. ``shared_cache``: with several keys, look KV up
    and leave it where those of all keys do; others then see by the time taken that it was sent."""

    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    shared_cache: bool | None = None

    def note(self, scope: Scope, settings: ServerSettings) -> None:
        salt = (self.cache_salt or "").encode()
        if settings.keys.several and not (settings.shared_cache or self.shared_cache):
            # No UTF-8 begins with this byte, so that no salt passes for a key.
            salt = b"\xff" + _owner(key_digest(sent_key(scope))) + salt
        scope[_SALT] = salt


def salt_of(scope: Scope) -> bytes:
    """KV is shared only among requests of equal salt. KeyError where the body was no CacheBody."""
    salt: bytes = scope[_SALT]
    return salt


def _owner(digest: bytes) -> bytes:
    # Engines on other machines see salts: they need not see what keys are compared with.
    return hashlib.blake2b(digest, digest_size=16, person=b"kv cache").digest()
