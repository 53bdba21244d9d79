"""Several keys: no request finds, or tells of, KV that another key's request has left."""

from __future__ import annotations

from array import array
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from headstart.server.cli import main as cli
from headstart.server.http.app import create_app
from headstart.server.http.keys import Keys
from headstart.server.settings import ServerSettings

ONE, OTHER, ADMIN = "the-key-of-one-tenant", "the-key-of-another-tenant", "the-key-of-an-admin"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello world"}]}
COMPUTING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "hello world"},
    "/v1/responses": {"model": "tiny", "input": "hello world"},
    "/v1/messages": CHAT | {"max_tokens": 3},
    "/v1/embeddings": {"model": "tiny", "input": "hello world"},
    "/v1/score": {"model": "tiny", "text_1": "hello world", "text_2": "hello"},
    "/v1/rerank": {"model": "tiny", "query": "hello world", "documents": ["hello"]},
    "/v2/embed": {
        "model": "tiny",
        "texts": ["hello world"],
        "embedding_types": ["float"],
    },
}
SAME = {"/score": "/v1/score", "/rerank": "/v1/rerank", "/v2/rerank": "/v1/rerank"}
COMPUTE_NOTHING = {
    "/v1/messages/count_tokens",
    "/v1/responses/input_tokens",
    "/v1/responses/{response_id}/cancel",
    "/v1/conversations",
    "/v1/conversations/{conversation_id}",
    "/v1/conversations/{conversation_id}/items",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
    "/apply-template",
}


class CachingEngine:
    """Wraps the fake one: a prompt is found when one of equal salt has been there before.

    ``found``: the cached tokens of each prompt.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._seen: set[tuple[bytes, bytes]] = set()
        self.found: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, token_ids: Any, params: Any, *, salt: bytes = b"", **others: Any) -> Any:
        key = (salt, array("i", token_ids).tobytes())
        self.found.append(len(token_ids) if key in self._seen else 0)
        self._seen.add(key)
        self._engine.cached_tokens = self.found[-1]
        return self._engine.add(token_ids, params, salt=salt, **others)


@pytest.fixture
def make_app(engine, tokenizer):
    def make(*keys: str, **settings: Any) -> FastAPI:
        chosen = ServerSettings(keys=Keys.of(keys), **settings)
        return create_app(CachingEngine(engine), tokenizer, model_names=["tiny"], settings=chosen)

    return make


async def cached(app: FastAPI, path: str, key: str = "", **fields: Any) -> int:
    """The cached tokens of a request's first prompt, which its answer tells where it can."""
    engine = app.state.runtime.engine
    engine.found.clear()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = COMPUTING[SAME.get(path, path)] | fields
        answer = await client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert "x-headstart-ignored" not in answer.headers
    found: int = engine.found[0]
    if path == "/v2/embed":
        return found
    told = answer.json()["usage"]
    if path in ("/v1/chat/completions", "/v1/completions"):
        assert (told["prompt_tokens_details"] or {}).get("cached_tokens", 0) == found
    elif path == "/v1/responses":
        assert told["input_tokens_details"]["cached_tokens"] == found
    elif path == "/v1/messages":
        assert told["cache_read_input_tokens"] == found
    return found


def test_every_path_that_computes_is_here(make_app) -> None:
    assert make_app().state.post_paths == {*COMPUTING, *SAME} | COMPUTE_NOTHING


@pytest.mark.parametrize("path", [*COMPUTING, *SAME])
async def test_a_key_finds_what_it_has_sent_and_nothing_else(make_app, path) -> None:
    app = make_app(ONE, OTHER)
    assert await cached(app, path, ONE) == 0
    assert await cached(app, path, OTHER) == 0
    assert await cached(app, path, ONE) > 0
    assert await cached(app, path, OTHER) > 0
    assert await cached(app, path, ONE, cache_salt="mine") == 0


@pytest.mark.parametrize("path", [*COMPUTING, *SAME])
async def test_a_prompt_that_is_marked_is_shared(make_app, path) -> None:
    app = make_app(ONE, OTHER)
    assert await cached(app, path, ONE) == 0
    assert await cached(app, path, ONE, shared_cache=True) == 0  # another place than the key's own
    assert await cached(app, path, OTHER, shared_cache=True) > 0
    assert await cached(app, path, OTHER, shared_cache=False) == 0
    assert await cached(app, path, OTHER, shared_cache=True, cache_salt="ours") == 0
    assert await cached(app, path, ONE, shared_cache=True, cache_salt="ours") > 0


@pytest.mark.parametrize("path", [*COMPUTING, *SAME])
@pytest.mark.parametrize(
    ("keys", "settings", "first", "second"),
    [
        ((), {}, "", ""),
        ((), {}, ONE, OTHER),  # nobody asks who they are
        ((ONE,), {}, ONE, ONE),
        ((ONE, ONE), {}, ONE, ONE),
        ((ONE, OTHER), {"shared_cache": True}, ONE, OTHER),
    ],
)
async def test_where_all_share(make_app, path, keys, settings, first, second) -> None:
    app = make_app(*keys, **settings)
    assert await cached(app, path, first) == 0
    assert await cached(app, path, second) > 0
    added = app.state.runtime.engine.added
    assert {request.salt for request in added} == {b""}  # as it has always been
    await cached(app, path, first, cache_salt="mine")
    assert added[-1].salt == b"mine"


@pytest.mark.parametrize(
    ("keys", "several"),
    [
        (Keys(), False),
        (Keys.of([ONE]), False),
        (Keys.of([ONE, ONE]), False),
        (Keys.of([], [ADMIN, OTHER]), False),  # everybody else needs none
        (Keys.of([ONE], [ADMIN]), True),
        (Keys.of([ONE, OTHER]), True),
    ],
)
def test_which_keys_are_several(keys, several) -> None:
    assert keys.several is several


async def test_no_salt_passes_for_a_key(make_app) -> None:
    app = make_app(ONE, OTHER)
    await cached(app, "/v1/completions", ONE)
    [mine] = app.state.runtime.engine.added
    assert mine.salt.startswith(b"\xff")
    assert len(mine.salt) == 17
    assert not any(digest in mine.salt for digest in app.state.runtime.settings.keys.api)
    with pytest.raises(UnicodeDecodeError):
        mine.salt.decode()


@pytest.mark.parametrize("flags", [[], ["--shared-cache"]])
def test_the_flag(flags) -> None:
    settings = cli.server_settings(cli.parse("serve", "m", *flags))
    assert settings.shared_cache is bool(flags)
