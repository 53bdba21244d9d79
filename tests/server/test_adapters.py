"""LoRA adapters over HTTP: who answers, /v1/models, loading and unloading, metrics."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.engine.errors import EngineDeadError, RequestError
from headstart.engine.process.messages import AdapterInfo
from headstart.server.api.adapter_names import find_adapter
from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def info(name: str, path: str = "/adapters/x", segment_mask: str | None = None) -> AdapterInfo:
    return AdapterInfo(
        name=name, path=path, rank=32, targets=["q_proj"], num_bytes=9, segment_mask=segment_mask
    )


@pytest.fixture
def root(tmp_path):
    """A folder for --lora-dir with adapters in it, and things that are none of its business."""
    for folder in ("one", "deep/er/two", "broken"):
        (tmp_path / "root" / folder).mkdir(parents=True)
        (tmp_path / "root" / folder / "adapter_config.json").write_text("{}")
    (tmp_path / "root" / "broken" / "broken").touch()
    (tmp_path / "root" / "file").touch()
    (tmp_path / "outside" / "secret").mkdir(parents=True)
    (tmp_path / "rooted").mkdir()
    return tmp_path / "root"


@pytest.fixture
async def admin(engine, tokenizer, root):
    """A client of an app that may load what is in ``root``."""
    app = create_app(
        engine, tokenizer, model_names=["tiny", "alias"], settings=ServerSettings(lora_dir=root)
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert "\n" not in error["message"]
    return error


# --- who answers ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "name", "adapter"),
    [("tiny", "tiny", None), ("also-tiny", "tiny", None), ("legal/é", "legal/é", "legal/é")],
)
async def test_the_name_picks_who_answers(
    client, engine, chat_body, events, model, name, adapter, stream
):
    engine.adapters = {"legal/é": info("legal/é")}
    text = {"model": model, "prompt": "x", "stream": stream}
    for url, body in ((CHAT, chat_body(model=model, stream=stream)), (TEXT, text)):
        response = await client.post(url, json=body)
        assert response.status_code == 200, response.text
        answers = events(response.text)[:-1] if stream else [response.json()]
        assert {answer["model"] for answer in answers} == {name}
    assert [added.adapter for added in engine.added] == [adapter] * 2


async def test_unknown_names_are_told_what_there_is(client, engine, chat_body):
    engine.adapters = {"legal": info("legal")}
    for response in (
        await client.post(CHAT, json=chat_body(model="gone")),
        await client.post(TEXT, json={"model": "gone", "prompt": "x"}),
        await client.get("/v1/models/gone"),
    ):
        error = error_of(response, 404)
        assert (
            "'gone' does not exist; this server has 'tiny', 'also-tiny', 'legal'"
            in (error["message"])
        )
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert engine.added == []


async def test_before_the_first_start_nobody_knows_the_adapters(client, engine, chat_body):
    engine.ready, engine.model = False, None
    error_of(await client.post(CHAT, json=chat_body(model="legal")), 503)
    error_of(await client.get("/v1/models/legal"), 503)
    assert (await client.get("/v1/models/tiny")).json()["segment_mask"] is None


async def test_a_model_that_is_being_started_again_keeps_its_adapters(client, engine, chat_body):
    engine.adapters = {"legal": info("legal")}
    engine.ready = False
    error_of(await client.post(CHAT, json=chat_body(model="legal")), 503)
    error_of(await client.post(CHAT, json=chat_body(model="other")), 404)


async def test_the_model_keeps_its_name(client, engine, chat_body):
    engine.adapters = {"tiny": info("tiny")}
    await client.post(CHAT, json=chat_body())
    assert engine.added[0].adapter is None


async def test_models(client, engine):
    engine.adapters = {
        "legal": info("legal", "/adapters/of/legal-v2", "turns"),
        "plain": info("plain"),
    }
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "also-tiny", "legal", "plain"]
    assert len({frozenset(model) for model in listed[:2]}) == 1
    base, _, legal, plain = listed
    assert (base["parent"], base["root"], base["segment_mask"]) == (None, "tiny", "causal")
    assert legal["parent"] == plain["parent"] == "tiny"
    assert legal["root"] == "legal-v2"
    assert (legal["segment_mask"], plain["segment_mask"]) == ("turns", "causal")
    assert legal["rank"] == 32
    assert legal["max_model_len"] == 256
    assert (await client.get("/v1/models/legal")).json() == legal


# --- loading and unloading ---


@pytest.mark.parametrize(("url", "body"), [(LOAD, {}), (UNLOAD, {"lora_name": "x"})])
async def test_closed_without_a_folder(client, engine, url, body):
    engine.adapters = {"x": info("x")}
    error = error_of(await client.post(url, json=body), 403)
    assert "--lora-dir DIR" in error["message"]
    assert engine.asked == []


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("one", "one"),
        ("./one/", "one"),
        ("one/../one", "one"),
        ("../root/one", "one"),
        ("deep/er/two", "deep/er/two"),
        ("{root}/one", "one"),
        ("link", "one"),
    ],
)
async def test_load_use_unload(admin, engine, chat_body, root, path, folder):
    (root / "link").symlink_to(root / "one")
    body = {"lora_name": "mine", "lora_path": path.format(root=root)}
    response = await admin.post(LOAD, json=body)
    assert response.status_code == 200, response.text
    assert engine.asked == [("load", "mine", str(root / folder))]
    described = response.json()
    assert described["id"] == "mine"
    assert described["root"] == Path(folder).name
    assert described["parent"] == "tiny"
    assert (await admin.get("/v1/models")).json()["data"][-1] == described
    answer = (await admin.post(CHAT, json=chat_body(model="mine"))).json()
    assert answer["model"] == "mine"

    response = await admin.post(UNLOAD, json={"lora_name": "mine"})
    assert response.status_code == 200, response.text
    assert response.json() == {"id": "mine", "object": "model", "deleted": True}
    assert engine.asked[1:] == [("unload", "mine")]
    error_of(await admin.post(CHAT, json=chat_body(model="mine")), 404)
    error = error_of(await admin.post(UNLOAD, json={"lora_name": "mine"}), 404)
    assert error["param"] == "lora_name"
    assert "'mine' does not exist; this server has 'tiny', 'alias'" in error["message"]


async def test_an_adapter_of_the_command_line_can_be_unloaded(admin, engine):
    engine.adapters = {"x": info("x", "/elsewhere/x")}
    assert (await admin.post(UNLOAD, json={"lora_name": "x"})).status_code == 200
    assert engine.adapters == {}


OUT = "outside of the folder of --lora-dir"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "1 to 4096 characters"),
        ("x" * 4097, "1 to 4096 characters"),
        ("one\0", "none of them NUL"),
        ("missing", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("file", "Not a directory"),
        ("loop", ""),
        ("..", OUT),
        ("../outside/secret", OUT),
        ("../outside/missing", OUT),
        ("../rooted", OUT),
        ("one/../../outside", OUT),
        ("{root}/../outside", OUT),
        ("/", OUT),
        ("/etc", OUT),
        ("/missing", OUT),
        ("link", OUT),
        ("link/secret", OUT),
        ("one-linked", OUT),
        ("https://example.com/adapter", "nothing is fetched"),
        ("hf://someone/adapter", "nothing is fetched"),
        ("file:///etc", "nothing is fetched"),
        ("broken", "adapter_model.safetensors: truncated"),
    ],
)
async def test_paths_that_are_not_loaded(admin, engine, root, path, words):
    (root / "link").symlink_to(root.parent / "outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "one-linked").mkdir()
    (root / "one-linked" / "adapter_model.safetensors").symlink_to(root.parent / "outside/secret")
    body = {"lora_name": "mine", "lora_path": path.format(root=root)}
    error = error_of(await admin.post(LOAD, json=body), 400)
    assert error["param"] == "lora_path"
    assert words in error["message"]
    assert len(error["message"]) < 500
    assert engine.adapters == {}
    assert path == "broken" or engine.asked == []


async def test_a_folder_of_no_name_in_unicode(admin, engine, root):
    os.mkdir(os.fsencode(root / "one") + b"/\xff")
    (root / "link").symlink_to(os.fsdecode(os.fsencode(root / "one") + b"/\xff"))
    response = await admin.post(LOAD, json={"lora_name": "mine", "lora_path": "link"})
    assert "not UTF-8" in error_of(response, 400)["message"]
    assert engine.asked == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "lora_name", "required"),
        ({"lora_name": "a"}, "lora_path", "required"),
        ({"lora_name": 1, "lora_path": "one"}, "lora_name", "valid string"),
        ({"lora_name": "", "lora_path": "one"}, "lora_name", "1 to 128 characters, not 0"),
        ({"lora_name": "a" * 129, "lora_path": "one"}, "lora_name", "1 to 128 characters, not 129"),
        ({"lora_name": "a\n", "lora_path": "one"}, "lora_name", "printable"),
        ({"lora_name": "a\u202e", "lora_path": "one"}, "lora_name", "printable"),
        ({"lora_name": "tiny", "lora_path": "one"}, "lora_name", "'tiny' is the model's name"),
        ({"lora_name": "alias", "lora_path": "one"}, "lora_name", "'alias' is the model's name"),
        ({"lora_name": "old", "lora_path": "one"}, "lora_name", "'old' is loaded; unload it first"),
        (
            {"lora_name": "a", "lora_path": "one", "load_inplace": True},
            "load_inplace",
            "not supported",
        ),
    ],
)
async def test_bad_bodies(admin, engine, body, param, words):
    engine.adapters = {"old": info("old")}
    error = error_of(await admin.post(LOAD, json=body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert engine.asked == []


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "lora_name"),
        ({"lora_name": None}, 400, "lora_name"),
        ({"lora_name": "x", "lora_int_id": 3}, 400, "lora_int_id"),
        ({"lora_name": "tiny"}, 400, "lora_name"),
        ({"lora_name": "x" * 9999}, 404, "lora_name"),
    ],
)
async def test_bad_bodies_of_unload(admin, engine, body, status, param):
    error = error_of(await admin.post(UNLOAD, json=body), status)
    assert error["param"] == param
    assert len(error["message"]) < 500


async def test_names_of_the_longest_kind(admin):
    name = "é" * 128
    body = {"lora_name": name, "lora_path": "one"}
    assert (await admin.post(LOAD, json=body)).json()["id"] == name
    assert (await admin.get(f"/v1/models/{name}")).json()["id"] == name


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (
            RequestError("8 adapters are loaded, which is --max-loras", "lora_name"),
            400,
            "lora_name",
        ),
        (RequestError("adapter_config.json: r is 0"), 400, "lora_path"),
        (EngineDeadError("the engine process ended (signal 9)"), 503, None),
        (ValueError("a bug"), 500, None),
    ],
)
async def test_what_the_engine_says(admin, engine, error, status, param):
    async def fail(*_):
        raise error

    engine.load_adapter = fail
    shown = error_of(await admin.post(LOAD, json={"lora_name": "a", "lora_path": "one"}), status)
    assert shown["param"] == param
    assert (str(error) in shown["message"]) == (status != 500)


async def test_two_at_once(admin, engine):
    body = {"lora_name": "a", "lora_path": "one"}
    responses = await asyncio.gather(*(admin.post(LOAD, json=body) for _ in range(2)))
    assert sorted(response.status_code for response in responses) == [200, 400]


@pytest.mark.parametrize("url", [LOAD, UNLOAD])
@pytest.mark.parametrize("state", ["dead", "draining"])
async def test_unavailable(engine, tokenizer, root, url, state):
    app = create_app(
        engine, tokenizer, model_names=["tiny"], settings=ServerSettings(lora_dir=root)
    )
    engine.ready = state != "dead"
    app.state.runtime.draining = state == "draining"
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        body = {"lora_name": "a"} | ({"lora_path": "one"} if url == LOAD else {})
        error_of(await http.post(url, json=body), 503)
    assert engine.asked == []


def test_a_root_that_is_a_link_itself(root):
    link = root.parent / "here"
    link.symlink_to(root)
    for path in ("one", str(root / "one"), str(link / "one")):
        assert find_adapter(link, path) == str(root / "one")


PIECES = ["one", "..", ".", "", "/", "root", "outside", "link", "loop", "\0", "é", "~", "secret"]


@given(path=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("/".join))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_leads_out(root, path):
    for name, target in (("link", root.parent / "outside"), ("loop", root / "loop")):
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
    try:
        found = find_adapter(root, path)
    except ValueError:
        return
    assert os.path.samefile(os.path.commonpath((os.path.realpath(found), root)), root)
    assert os.path.isdir(found)


JSON = st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.just([])


@given(
    url=st.sampled_from([LOAD, UNLOAD]),
    body=st.dictionaries(
        st.sampled_from(["lora_name", "lora_path", "load_inplace", "lora_int_id"])
        | st.text(max_size=2),
        JSON | st.sampled_from(["one", "mine", "broken"]),
        max_size=3,
    ),
)
@settings(
    max_examples=2 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_bodies_are_never_a_5xx(engine, tokenizer, root, url, body):
    app = create_app(
        engine, tokenizer, model_names=["tiny"], settings=ServerSettings(lora_dir=root)
    )

    async def run() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            response = await http.post(url, json=body)
            assert response.status_code in (200, 400, 404), response.text

    asyncio.run(run())


# --- metrics ---


async def test_metrics_by_adapter(admin, engine, chat_body):
    async def lines() -> list[str]:
        return (await admin.get("/metrics")).text.splitlines()

    def success(model: str, count: str) -> str:
        label = f'finished_reason="stop",model_name="{model}"'
        return f"headstart:request_success_total{{{label}}} {count}"

    assert 'headstart:num_lora_adapters{model_name="tiny"} 0.0' in await lines()
    await admin.post(LOAD, json={"lora_name": "mine", "lora_path": "one"})
    for model in ("mine", "mine", "alias"):
        await admin.post(CHAT, json=chat_body(model=model))
    shown = await lines()
    assert 'headstart:num_lora_adapters{model_name="tiny"} 1.0' in shown
    assert success("mine", "2.0") in shown
    assert success("tiny", "1.0") in shown
    count = 'headstart:time_to_first_token_seconds_count{model_name="mine"} 2.0'
    assert count in shown
    # One that runs while its adapter goes is not the adapter's any more.
    engine.hold = True
    running = asyncio.create_task(admin.post(CHAT, json=chat_body(model="mine")))
    while len(engine.added) < 4:
        await asyncio.sleep(0.001)
    await admin.post(UNLOAD, json={"lora_name": "mine"})
    engine.added[-1].stream.gate.set()
    assert (await running).status_code == 200
    assert not any("mine" in line for line in await lines())
