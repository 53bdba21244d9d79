"""Who shares the KV of a prompt with whom.

    keys of the server    --shared-cache, or shared_cache: true    otherwise
    none or one           all                                      all
    several               all                                      who has the same key

``cache_salt`` cuts each of these once more. A prompt that others' KV is found for answers sooner,
and says so (``cached_tokens``): with several keys nobody may learn that way what another has sent.
``cache_explain`` shows texts of earlier prompts: those of the same key alone, shared cache or not.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field
from starlette.types import Scope

from headstart.server.http.auth import sent_key
from headstart.server.http.errors import bad_request
from headstart.server.http.keys import key_digest
from headstart.server.http.policy import Body
from headstart.server.settings import ServerSettings

_SALT = "headstart.salt"
_OWNER = "headstart.owner"


class CacheBody(Body):
    """The body of a request that computes a prompt. ``shared_cache``: with several keys, look KV up
    and leave it where those of all keys do; others then see by the time taken that it was sent."""

    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    shared_cache: bool | None = None

    def note(self, scope: Scope, settings: ServerSettings) -> None:
        salt = (self.cache_salt or "").encode()
        owner = _owner(key_digest(sent_key(scope))) if settings.keys.several else b""
        if owner and not (settings.shared_cache or self.shared_cache):
            # No UTF-8 begins with this byte, so that no salt passes for a key.
            salt = b"\xff" + owner + salt
        scope[_SALT], scope[_OWNER] = salt, owner


class ExplainedBody(CacheBody):
    """``cache_explain``: the answer says why the cache did not have more of the prompt."""

    cache_explain: bool | None = None

    def note(self, scope: Scope, settings: ServerSettings) -> None:
        super().note(scope, settings)
        if self.cache_explain and not settings.cache_explain:
            raise bad_request(
                "cache_explain is turned off on this server (--no-cache-explain)", "cache_explain"
            )


def salt_of(scope: Scope) -> bytes:
    """KV is shared only among requests of equal salt. KeyError where the body was no CacheBody."""
    salt: bytes = scope[_SALT]
    return salt


def owner_of(scope: Scope) -> bytes:
    """Who may be told of the prompts of whom: of equal salt, and equal owner. KeyError as above."""
    owner: bytes = scope[_OWNER]
    return owner


def _owner(digest: bytes) -> bytes:
    # Engines on other machines see salts: they need not see what keys are compared with.
    return hashlib.blake2b(digest, digest_size=16, person=b"kv cache").digest()
