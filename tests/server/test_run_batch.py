"""run-batch over a fake engine: what lines may be, what becomes of them, and going on later."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal

import pytest

from headstart.engine.errors import ConfigError, EngineDeadError, HeadstartError
from headstart.engine.process.messages import Stats
from headstart.server.cli import main as cli
from headstart.server.cli import run_batch
from headstart.server.cli.batch_progress import Progress, TokenMeter
from headstart.server.cli.run_batch import BatchOutput, request_urls
from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings


def line(custom_id="a", url="/v1/completions", **body):
    body = {"prompt": "hi"} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


@pytest.fixture
def batch(tmp_path, engine, tokenizer, settings):
    """``await batch(lines)``: the tally, and the lines of the output."""

    async def run(lines, *, resume=False, concurrency=4, stream=None, interval=None):
        source, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(
            b"".join(s if isinstance(s, bytes) else s.encode() + b"\n" for s in lines)
        )
        output = BatchOutput(path, resume=resume)
        progress = Progress(stream or io.StringIO(), interval)
        app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
        try:
            tally = await run_batch.run_batch(
                app, [], source, output, concurrency=concurrency, progress=progress
            )
        finally:
            output.close()
        return tally, read(path)

    run.path = tmp_path / "out.jsonl"
    return run


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


async def test_every_line_has_an_answer(batch, engine, say):
    tally, answers = await batch([line(f"id-{i}", max_tokens=i + 1) for i in range(20)])
    assert (tally.done, tally.failed, tally.status) == (20, 0, 0)
    assert sorted(a["custom_id"] for a in answers) == sorted(f"id-{i}" for i in range(20))
    for answer in answers:
        assert set(answer) == {"id", "custom_id", "response", "error"}
        number = int(answer["custom_id"].removeprefix("id-")) + 1
        assert answer["id"] == f"batch_req_{number}"
        assert answer["error"] is None
        response = answer["response"]
        assert response["status_code"] == 200
        assert len(response["request_id"]) == 32
        assert response["body"]["model"] == "tiny"
        assert response["body"]["usage"]["completion_tokens"] == min(
            number, len(say("hello world")) + 1
        )
    assert (engine.started, engine.stopped) == (1, 1)


async def test_a_byte_order_mark_is_no_part_of_the_first_line(batch):
    tally, _ = await batch([b"\xef\xbb\xbf" + line("one").encode() + b"\n", line("two")])
    assert (tally.done, tally.failed) == (2, 0)
    tally, _ = await batch([line("one"), b"\xef\xbb\xbf{}\n"], resume=True)
    assert (tally.done, tally.failed) == (0, 1)


async def test_every_endpoint(batch, engine):
    engine.vector = [1.0] * 8
    chat = [{"role": "user", "content": "hi"}]
    bodies = {
        "/v1/chat/completions": {"messages": chat},
        "/v1/completions": {"prompt": "hi"},
        "/v1/embeddings": {"input": "hi"},
        "/v1/score": {"text_1": "hi", "text_2": "ho"},
        "/v1/rerank": {"query": "hi", "documents": ["ho"]},
        "/tokenize": {"prompt": "hi"},
    }
    lines = [
        json.dumps({"custom_id": url, "method": "POST", "url": url, "body": body})
        for url, body in bodies.items()
    ]
    tally, answers = await batch(lines)
    assert {a["custom_id"]: a["response"]["status_code"] for a in answers} == dict.fromkeys(
        bodies, 200
    )
    assert tally.status == 0


def test_what_changes_the_server_is_no_line(app):
    urls = request_urls(app)
    assert {"/v1/chat/completions", "/v1/embeddings", "/score"} <= urls
    assert not {url for url in urls if "lora" in url}


async def test_bad_lines_say_what_is_wrong_with_them(batch, monkeypatch):
    monkeypatch.setattr(run_batch, "SKIPPED_AT_ONCE", 1000)
    long = line("long", prompt="x" * 70000)
    bad = [
        ("{", "not JSON"),
        (b'{"custom_id": "\xff"}\n', "not JSON"),
        ("[]", "not a JSON object with an object as its body"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions"}', "not a JSON object"),
        (line(None), "custom_id has to be a string"),
        (line(""), "custom_id has to be a string of 1 to 512 characters"),
        (line("good"), "the custom_id 'good' was there before"),
        (line("u", url="/v1/nothing"), "url '/v1/nothing' is none of /apply-template"),
        (line("v", url="/v1/load_lora_adapter"), "is none of"),
        (line("w", url=["x"]), "is none of"),
        (line("s", stream=True), "stream: answers in a file are whole"),
        (line("m").replace("POST", "GET"), "method has to be 'POST', not 'GET'"),
        (long, "longer than 69632 bytes"),
        ("[" * 60000, "not "),
    ]
    lines = [line("good"), "", *(text for text, _ in bad), line("last")]
    tally, answers = await batch(lines, concurrency=1)
    assert (tally.done, tally.failed, tally.status) == (2, len(bad), 1)
    assert [a["custom_id"] for a in answers if a["response"]] == ["good", "last"]
    errors = [a for a in answers if a["error"]]
    for i, (error, (_, reason)) in enumerate(zip(errors, bad, strict=True)):
        assert error["id"] == f"batch_req_{i + 3}"
        assert error["error"]["code"] == "invalid_line"
        assert error["error"]["message"].startswith(f"line {i + 3}: ")
        assert reason in error["error"]["message"]
    assert [e["custom_id"] for e in errors[6:12]] == ["good", "u", "v", "w", "s", "m"]


async def test_an_answer_that_is_an_error_is_kept_as_one(batch):
    tally, answers = await batch([line("a", temperature=9), line("b", model="other"), line("c")])
    found = {a["custom_id"]: a["response"] for a in answers}
    assert {key: r["status_code"] for key, r in found.items()} == {"a": 400, "b": 404, "c": 200}
    assert found["a"]["body"]["error"]["param"] == "temperature"
    assert (tally.done, tally.failed, tally.status) == (1, 2, 1)


async def test_bodies_reach_the_app_as_they_were_written(batch):
    body = '{"custom_id":"a","method":"POST","url":"/tokenize","body": %s }'
    empty = body.replace('"a"', '"e"') % "{ }"
    wide = body % r'{"prompt":"\u00e9\ud83d\ude00","add_special_tokens":false}'
    _, answers = await batch([wide, empty], concurrency=1)
    assert [a["response"]["status_code"] for a in answers] == [200, 400]
    assert answers[0]["response"]["body"]["count"] > 1
    assert "prompt, or messages, is required" in answers[1]["response"]["body"]["error"]["message"]


async def test_no_more_at_a_time_than_asked_for(batch, engine, monkeypatch):
    running = most = 0
    post = run_batch.httpx.AsyncClient.post

    async def counted(*args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await post(*args, **kwargs)
        finally:
            running -= 1

    monkeypatch.setattr(run_batch.httpx.AsyncClient, "post", counted)
    await batch([line(f"{i}") for i in range(9)], concurrency=3)
    assert most == 3
    batch.path.unlink()
    most = 0
    await batch([line(f"{i}") for i in range(80)], concurrency=None)
    assert most == engine.model.max_running == 64


async def test_the_input_is_read_as_it_is_needed(batch, engine):
    engine.hold = True
    task = asyncio.create_task(batch([line(f"{i}") for i in range(1000)], concurrency=5))
    while len(engine.added) < 5:
        await asyncio.sleep(0.01)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(engine.added) == 5
    assert batch.path.read_bytes() == b""
    engine.added[3].stream.gate.set()
    while not batch.path.read_bytes().endswith(b"\n"):  # written while the others run
        await asyncio.sleep(0.01)
    assert len(read(batch.path)) == 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert [a["custom_id"] for a in read(batch.path)] == ["3"]
    assert all(added.stream.aborted for i, added in enumerate(engine.added) if i != 3)
    assert engine.stopped == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_keeps_what_is_done(batch, engine, number):
    engine.hold = True
    task = asyncio.create_task(batch([line(f"{i}") for i in range(9)], concurrency=2))
    while len(engine.added) < 2:
        await asyncio.sleep(0.01)
    engine.added[1].stream.gate.set()
    while not batch.path.read_bytes():
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), number)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [a["custom_id"] for a in read(batch.path)] == ["1"]
    engine.hold = False
    tally, answers = await batch([line(f"{i}") for i in range(9)], resume=True)
    assert sorted(a["custom_id"] for a in answers) == [f"{i}" for i in range(9)]
    assert (tally.done, tally.kept, tally.status) == (8, 1, 0)


async def test_resume_skips_what_is_there_and_drops_half_a_line(batch, engine):
    lines = ["{", line("a"), line("b"), line("a"), line("c", temperature=9), line("d")]
    first, whole = await batch(lines, concurrency=1)
    assert (first.done, first.failed) == (3, 3)
    text = batch.path.read_bytes()
    # Everything up to any byte of the output may be there.
    for cut in (0, 5, len(text) // 3, len(text) // 2, len(text) - 1, len(text)):
        batch.path.write_bytes(text[:cut])
        engine.added.clear()
        tally, answers = await batch(lines, concurrency=1, resume=True)
        assert sorted(a["id"] for a in answers) == sorted(a["id"] for a in whole)
        assert len(answers) == 6
        kept = text[:cut].count(b"\n")
        assert (tally.kept, tally.done + tally.failed, tally.status) == (kept, 6 - kept, 1)
    assert not engine.added


async def test_a_duplicate_that_was_told_first_does_not_hide_the_request(batch):
    error = {"code": "invalid_line", "message": "line 2: ..."}
    batch.path.write_text(
        json.dumps({"id": "batch_req_2", "custom_id": "a", "response": None, "error": error}) + "\n"
    )
    tally, answers = await batch([line("a"), line("a")], resume=True)
    assert [(a["id"], a["custom_id"]) for a in answers] == [
        ("batch_req_2", "a"),
        ("batch_req_1", "a"),
    ]
    assert (tally.done, tally.kept, tally.status) == (1, 1, 1)


async def test_files_that_are_in_the_way(batch, tmp_path, app):
    batch.path.write_text("something else\n")
    with pytest.raises(ConfigError, match=r"exists: --resume goes on"):
        BatchOutput(batch.path, resume=False)
    with pytest.raises(ConfigError, match=r"line 1: no output of run-batch"):
        BatchOutput(batch.path, resume=True)
    assert batch.path.read_text() == "something else\n"
    with pytest.raises(ConfigError, match="cannot write"):
        BatchOutput(tmp_path / "no" / "out", resume=False)
    output = BatchOutput(tmp_path / "new", resume=True)
    progress = Progress(io.StringIO())
    with pytest.raises(ConfigError, match=r"cannot read .*missing"):
        await run_batch.run_batch(
            app, [], tmp_path / "missing", output, concurrency=1, progress=progress
        )


async def test_an_engine_that_dies_costs_no_line(batch, engine):
    deaths = 2
    add = engine.add

    def dying(*args, **kwargs):
        nonlocal deaths
        stream = add(*args, **kwargs)
        if deaths and len(engine.added) % 5 == 0:
            deaths -= 1
            stream.outputs.clear()
            stream.error = EngineDeadError("the engine process ended")
            engine.ready = False
            asyncio.get_running_loop().call_later(0.15, setattr, engine, "ready", True)
        return stream

    engine.add = dying
    tally, answers = await batch([line(f"{i}") for i in range(12)], concurrency=3)
    assert deaths == 0
    assert sorted(a["custom_id"] for a in answers) == sorted(f"{i}" for i in range(12))
    assert (tally.done, tally.failed) == (12, 0)


async def test_a_line_is_tried_again_three_times(batch, engine, monkeypatch):
    engine.fail_after = (0, EngineDeadError("the engine process ended"))
    monkeypatch.setattr(run_batch, "MAX_TRIES_AGAIN", 3)
    tally, (answer,) = await batch([line("a")])
    assert len(engine.added) == 4
    assert answer["response"]["status_code"] == 503
    assert tally.status == 1


async def test_an_engine_that_stays_away_ends_the_run(batch, engine, monkeypatch):
    monkeypatch.setattr(run_batch, "RESTART_LIMIT", 0.2)

    def die(*_, **__):
        engine.ready = False
        raise EngineDeadError("the engine has died")

    engine.add = die
    with pytest.raises(HeadstartError, match=r"was not back after 0\.2 s; --resume goes on"):
        await batch([line("a"), line("b")])
    assert read(batch.path) == []  # neither is lost: both are asked when the run goes on


async def test_an_engine_that_does_not_start(tokenizer, engine, tmp_path):
    async def fail():
        engine.ready = False
        raise HeadstartError("the file is truncated")

    engine.ready, engine.start = False, fail
    failures = []
    app = create_app(
        engine,
        tokenizer,
        model_names=["tiny"],
        settings=ServerSettings(),
        on_start_failure=failures.append,
    )
    (tmp_path / "in").write_text(line("a"))
    output = BatchOutput(tmp_path / "out", resume=False)
    with pytest.raises(HeadstartError, match="the file is truncated"):
        await run_batch.run_batch(
            app, failures, tmp_path / "in", output, concurrency=1, progress=Progress(io.StringIO())
        )


class Terminal(io.StringIO):
    def isatty(self):
        return True


async def test_progress(batch, engine):
    engine.hold = True
    engine.stats = Stats(generation_tokens=500)
    for stream in (Terminal(), io.StringIO()):
        batch.path.unlink(missing_ok=True)
        engine.added.clear()
        lines = ["{", line("a"), line("b")]
        task = asyncio.create_task(batch(lines, concurrency=1, stream=stream, interval=0.05))
        while stream.getvalue().count("done") < 3:
            await asyncio.sleep(0.01)
        for _ in range(2):
            engine.added[-1].stream.gate.set()
            count = len(engine.added)
            while len(engine.added) == count and not task.done():
                await asyncio.sleep(0.005)
        await task
        text = stream.getvalue()
        assert "0 done, 1 failed, 0 tokens/s" in text
        if stream.isatty():
            assert text.startswith("\r\x1b[K[")
            assert text.endswith("100% read, 2 done, 1 failed, 0 tokens/s\n")
            assert text.count("\n") == 1
        else:
            assert "\r" not in text
            assert text.endswith("tokens/s\n")


def test_tokens_of_engines_that_follow_each_other():
    meter = TokenMeter()
    for count in (0, 10, 25, 25, 4, 9):
        meter.read(count)
    assert meter.total == 34


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["in", "out", "--concurrency", "0"], 2, "--concurrency: '0' is not a whole number"),
        (["in"], 2, "the following arguments are required: OUTPUT"),
        (["in", "out", "--port", "1"], 2, "unrecognized arguments: --port 1"),
        (["in", "out", "--lora-dir", "."], 2, "unrecognized arguments: --lora-dir"),
        (["in", "out", "--runahead", "env"], 1, "--runahead env is for servers"),
        (["in", "."], 1, ". exists: --resume goes on with it"),
    ],
)
def test_wrong_usage(argv, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        got = cli.main(["run-batch", *argv])
    except SystemExit as ended:
        got = ended.code
    assert got == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_flags_get_where_they_belong(tmp_path):
    args = cli.parse(
        *("run-batch", "in", "out", "--model", "m", "--max-running", "8", "--max-n", "2"),
        *("--served-model-name", "x", "--pooling", "mean", "--segment-mask", "turns"),
    )
    assert cli.engine_config(args, tmp_path).max_running == 8
    assert cli.model_names(args) == ["x"]
    settings = cli.batch_settings(args)
    assert (settings.max_n, settings.pooling, settings.segment_mask) == (2, "mean", "turns")
    assert not settings.keys.api
