"""headstart explain: two requests of files, compared without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headstart.engine.errors import ConfigError
from headstart.server.cli import main as cli
from headstart.server.cli.explain import read_request

SYSTEM = "You are the assistant of a small library, and it is {} now. Answer in one sentence. "
LONG = "Where is the book about the history of the lighthouse on the northern coast? "


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is kept: it is converted once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def run(
    tiny_model: Callable[..., Path],
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Explains bodies, or names of files; what is printed."""

    def run(first: Any, second: Any, *flags: str, status: int = 0) -> str:
        names = []
        for name, body in (("first.json", first), ("second.json", second)):
            if not isinstance(body, str):
                (tmp_path / name).write_text(json.dumps(body))
                body = str(tmp_path / name)
            names.append(body)
        model = tiny_model("llama")
        where = ("--model", str(model), "--cache-dir", str(models))
        assert cli.main(["explain", *names, *where, *flags]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def chat(system: str, user: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"model": "any", "messages": messages} | fields


def test_where_the_second_leaves_the_first(run: Callable[..., str]) -> None:
    printed = run(chat(SYSTEM.format("14:50"), LONG), chat(SYSTEM.format("14:51"), LONG))
    assert "template_drift: a date or time in message 0 (system) has changed" in printed
    assert "They part at token" in printed
    assert "second  '1 now. Answer" in printed


def test_the_object_of_answers(run: Callable[..., str]) -> None:
    body = chat(SYSTEM.format("noon"), LONG)
    found = json.loads(run(body, body, "--json"))
    assert found["cause"] == "fully_cached"
    assert found["cached_tokens"] == (found["prompt_tokens"] - 1) // 32 * 32
    found = json.loads(run(body, body, "--json", "--page-size", "16"))
    assert found["page_size"] == 16


def test_each_kind_of_body(run: Callable[..., str]) -> None:
    user = [{"role": "user", "content": LONG}]
    for path, body in (
        ("/v1/completions", {"prompt": LONG, "stream": True, "stream_options": {}}),
        ("/v1/responses", {"input": LONG, "instructions": SYSTEM}),
        ("/v1/messages", {"system": SYSTEM, "messages": user, "max_tokens": 3}),
        ("/v1/chat/completions", {"messages": user, "n": 2}),
    ):
        assert json.loads(run(body, body, "--json"))["cause"] == "fully_cached"
        line = {"custom_id": "a", "method": "POST", "url": path, "body": body}
        assert json.loads(run(line, body, "--json"))["cause"] == "fully_cached"


def test_lines_of_a_batch(run: Callable[..., str], tmp_path: Path) -> None:
    lines = [
        json.dumps({"custom_id": str(i), "url": "/v1/completions", "body": {"prompt": LONG + end}})
        for i, end in enumerate(("one", "two"))
    ]
    (tmp_path / "batch.jsonl").write_text("\n".join(lines))
    name = str(tmp_path / "batch.jsonl")
    assert "text_changed: the text in the prompt differs" in run(f"{name}:1", f"{name}:2")
    assert f"{name}:N is line N" in run(name, name, status=1)
    assert "has 2 lines, and no line 3" in run(f"{name}:1", f"{name}:3", status=1)


def test_what_keeps_them_apart_beside_their_tokens(run: Callable[..., str]) -> None:
    first = chat(SYSTEM, LONG, cache_salt="a")
    printed = run(first, first | {"cache_salt": "b", "model": "other"})
    assert "cache_salt is 'a' and 'b': KV is never shared" in printed
    assert "model is 'any' and 'other'" in printed


def test_segments(run: Callable[..., str]) -> None:
    first, second = chat(SYSTEM, LONG * 2 + "one"), chat(SYSTEM, LONG * 2 + "two")
    found = json.loads(run(first, second, "--json", "--segment-mask", "turns"))
    assert found["cause"] == "segment_changed"


def test_what_cannot_be_explained(run: Callable[..., str], tmp_path: Path) -> None:
    good = chat(SYSTEM, LONG)
    assert "cannot read" in run("missing.json", good, status=1)
    assert "has no request" in run([1], good, status=1)
    assert "name what it is with --url" in run({"text": "x"}, good, status=1)
    line = {"url": "/v1/embeddings", "body": {"input": "x"}}
    assert "'/v1/embeddings' cannot be explained" in run(line, good, status=1)
    bad = run(good, good | {"messages": [{"role": "nobody", "content": "x"}]}, status=1)
    assert bad.splitlines()[-1].startswith(f"headstart: error: {tmp_path}/second.json: messages[0]")


def test_what_a_body_is_asked_at(tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_text(json.dumps({"messages": [], "thinking": {}}))
    assert read_request(str(path), None).url == "/v1/messages"
    assert read_request(str(path), "/v1/chat/completions").url == "/v1/chat/completions"
    with pytest.raises(ConfigError):
        read_request(f"{path}:2", None)
