"""What goes wrong is logged with its reason and counted; so is what is ignored."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

import headstart
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.errors import EngineDeadError, RequestError
from headstart.engine.process.messages import Output, Stats, Times
from headstart.server.http.access_log import MAX_ERROR_CHARS, MAX_TOLD
from headstart.server.http.app import create_app
from headstart.server.http.keys import Keys
from headstart.server.http.metrics import MAX_FIELDS, ChoiceTimer, Metrics
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"


@pytest.fixture
def lines(caplog):
    """``lines()``: of the access log, so far."""
    caplog.set_level(logging.INFO, "headstart.access")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "headstart.access"]


@pytest.fixture
def told(caplog):
    """``told()``: the fields of which it was said that they are ignored."""
    caplog.set_level(logging.INFO, "headstart.server.http.access_log")
    said = re.compile(rf"{CHAT}: the field (\S+) is ignored")
    return lambda: [m[1] for r in caplog.records if (m := said.match(r.getMessage()))]


@pytest.fixture
def counted(client):
    """``await counted(name)``: labels, as they are written, to value."""

    async def of(name: str) -> dict[str, float]:
        shown = (await client.get("/metrics")).text.splitlines()
        found = [line for line in shown if line.startswith(f"headstart:{name}{{")]
        return {
            line.partition("{")[2].rpartition("}")[0]: float(line.rsplit(" ", 1)[1])
            for line in found
        }

    return of


async def test_requests_are_counted_by_route(client, counted, chat_body):
    await client.post(CHAT, json=chat_body())
    await client.post(CHAT, json=chat_body())
    await client.get("/v1/models/tiny")
    await client.get("/v1/models/gone")
    await client.get("/wp-login.php")
    await client.get("/v1/nothing/at/all")
    assert await counted("http_requests_total") == {
        'path="/v1/chat/completions",status="200"': 2,
        'path="/v1/models/{name:path}",status="200"': 1,
        'path="/v1/models/{name:path}",status="404"': 1,
        'path="other",status="404"': 2,
    }
    assert await counted("http_errors_total") == {
        'code="model_not_found",path="/v1/models/{name:path}",status="404"': 1,
        'code="not_found_error",path="other",status="404"': 2,
    }


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"temperature": 9}, 400, "temperature", "at most 2.0"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"model": "gpt-9"}, 404, "model", "does not exist"),
        ({"best_of": 2}, 400, "best_of", "not supported"),
    ],
)
async def test_errors_are_logged_with_their_reason(
    client, counted, chat_body, lines, fields, status, param, words
):
    body = chat_body(messages=[{"role": "user", "content": "secret"}]) | fields
    response = await client.post(CHAT, json=body)
    assert response.status_code == status
    [line] = lines()
    assert line.startswith(f"POST {CHAT} status={status} ms=")
    assert f'param="{param}"' in line
    assert words in line
    assert "secret" not in line
    assert f'status="{status}"' in "".join(await counted("http_errors_total"))
    shown = response.json()["error"]
    assert f'code="{shown["code"] or shown["type"]}"' in line


async def test_an_error_in_json(engine, tokenizer, connect_to, lines, chat_body):
    settings = ServerSettings(access_log_format="json")
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    await connect_to(app).post(CHAT, json=chat_body(model="gpt-9"))
    line = json.loads(lines()[0])
    assert (line["status"], line["code"], line["param"]) == (404, "model_not_found", "model")
    assert "'gpt-9' does not exist" in line["error"]


async def test_what_a_client_sends_stays_on_its_line(client, lines, chat_body):
    await client.post(CHAT, json=chat_body(model='x"\nPOST /admin status=200' + "y" * 5000))
    [line] = lines()
    assert "\n" not in line
    assert len(line) < MAX_ERROR_CHARS + 400


async def test_a_template_that_quotes_the_chat_is_not_logged(
    engine, backend, connect_to, lines, chat_body
):
    template = "{{ raise_exception('I do not like ' + messages[0]['content']) }}"
    app = create_app(engine, Tokenizer(backend, chat_template=template), model_names=["tiny"])
    body = chat_body(messages=[{"role": "user", "content": "a secret"}])
    response = await connect_to(app).post(CHAT, json=body)
    assert "I do not like a secret" in response.json()["error"]["message"]
    [line] = lines()
    assert 'error="the model\'s chat template refuses the messages"' in line
    assert "secret" not in line


async def test_errors_of_answers_that_have_begun(client, engine, counted, chat_body, lines):
    engine.fail_after = (2, EngineDeadError("the engine process ended"))
    response = await client.post(CHAT, json=chat_body(stream=True))
    assert response.status_code == 200
    [line] = lines()
    assert "status=200" in line
    assert ' code="service_unavailable" error="the engine process ended" request_id=' in line
    assert await counted("http_errors_total") == {
        f'code="service_unavailable",path="{CHAT}",status="503"': 1
    }


@pytest.mark.parametrize(
    ("error", "level"),
    [(EngineDeadError("it ended"), logging.WARNING), (RequestError("no"), logging.INFO)],
)
async def test_what_is_our_fault_is_a_warning(client, engine, chat_body, caplog, error, level):
    caplog.set_level(logging.INFO, "headstart.access")
    engine.fail_after = (0, error)
    await client.post(CHAT, json=chat_body())
    [record] = [r for r in caplog.records if r.name == "headstart.access"]
    assert record.levelno == level


async def test_faults_of_the_program(client, engine, counted, chat_body, lines):
    def broken(*_, **__):
        raise KeyError("oh")

    engine.add = broken
    response = await client.post(CHAT, json=chat_body())
    assert response.status_code == 500
    assert "internal error" in lines()[0]
    assert await counted("http_errors_total") == {
        f'code="server_error",path="{CHAT}",status="500"': 1
    }


async def test_refusals_of_keys_are_counted(engine, tokenizer, connect_to):
    settings = ServerSettings(keys=Keys.of(["k" * 20]))
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    assert (await connect_to(app).get("/v1/models")).status_code == 401
    assert (await connect_to(app).get("/admin.php")).status_code == 401
    shown = app.state.runtime.metrics.expose().decode()
    assert 'http_requests_total{path="/v1/models",status="401"} 1.0' in shown
    assert 'http_requests_total{path="other",status="401"} 1.0' in shown


async def test_ignored_fields_are_counted_and_each_is_told_once(client, counted, chat_body, told):
    for i in range(3):
        body = chat_body(user="me", **{f"x{i}": 1, "y": None, "store": True})
        response = await client.post(CHAT, json=body)
        assert response.status_code == 200, response.text
    assert await counted("ignored_fields_total") == {
        'field="other"': 3,
        'field="store"': 3,
        'field="user"': 3,
    }
    assert sorted(told()) == ["store", "user", "x0", "x1", "x2"]


async def test_names_of_clients_do_not_pile_up(client, chat_body, told, app):
    for start in range(0, 2 * MAX_TOLD, 32):
        await client.post(CHAT, json=chat_body(**{f"x{start + i}": 1 for i in range(32)}))
    assert len(told()) == MAX_TOLD
    http = app.state.runtime.metrics.http
    for i in range(2 * MAX_FIELDS):
        http.ignored(f"field{i}")
    shown = app.state.runtime.metrics.expose().decode()
    assert shown.count("headstart:ignored_fields_total{") <= MAX_FIELDS + 1


async def test_times_of_a_request(engine):
    metrics = Metrics(engine, "tiny")
    moments = iter((100.0, 103.0, 103.5, 104.0, 105.0))
    timer = ChoiceTimer(metrics.of("tiny"), lambda: next(moments))
    timer.begin(98.0)
    times = Times(
        arrived=98.2, ready=98.25, scheduled=98.5, computed=100.9, made=101.0, seconds=2.4
    )
    timer.take(Output(1, [5], times=times))
    timer.take(Output(1, [6]))
    timer.take(Output(1, [7, 8]))
    timer.finished("stop", 10, 4)
    shown = dict(
        line.rsplit(" ", 1)
        for line in metrics.expose().decode().splitlines()
        if line.startswith("headstart:")
    )
    for name, total, count in (
        ("time_to_first_token_seconds", 5.0, 1),
        ("request_queue_time_seconds", 0.25, 1),
        ("request_prefill_time_seconds", 2.5, 1),
        ("request_decode_time_seconds", 1.0, 1),
        ("request_inference_time_seconds", 3.5, 1),
        ("request_time_per_output_token_seconds", 1 / 3, 1),
        ("inter_token_latency_seconds", 1.0, 3),
        ("time_per_output_token_seconds", 1.0, 3),
        ("e2e_request_latency_seconds", 7.0, 1),
    ):
        label = '{model_name="tiny"}'
        assert float(shown[f"headstart:{name}_sum{label}"]) == pytest.approx(total), name
        assert float(shown[f"headstart:{name}_count{label}"]) == count, name


async def test_logits_that_are_no_numbers_after_some_tokens(client, engine, chat_body, say):
    engine.reason = "error"
    response = await client.post(CHAT, json=chat_body())
    assert response.status_code == 500
    assert "not numbers" in response.json()["error"]["message"]
    metrics = Metrics(engine, "tiny")
    timer = ChoiceTimer(metrics.of("tiny"))
    timer.take(Output(1, [5]))
    timer.take(Output(1, [], "error"))  # no token, and so no time between two
    timer.finished("error", 1, 1)


async def test_the_page_for_operators_lists_the_metrics(client, chat_body, engine):
    """Each one that is exposed, and no other; ``relay_...`` stands for many."""
    engine.stats = Stats(prefill=PrefillCosts(0.0, 1e-3, 0.0))
    for fields in ({}, {"model": "gone"}, {"user": "me"}):
        await client.post(CHAT, json=chat_body(**fields))
    text = (await client.get("/metrics")).text
    exposed = {
        name.removeprefix("headstart:") + ("_total" if kind == "counter" else "")
        for name, kind in re.findall(r"^# TYPE (headstart:\w+?)(?:_total)? (\w+)$", text, re.M)
        if not name.endswith("_created")
    }
    root = (Path(headstart.__file__).parent / "server").resolve().parent
    table = (
        (root / "docs" / "operations.md")
        .read_text()
        .partition("| metric | |")[2]
        .partition("\n\n")[0]
    )
    rows = table.splitlines()[2:]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    many = tuple(re.findall(r"`(\w+_)\.\.\.`", table))
    assert {name for name in exposed if not name.startswith(many)} == listed
    assert all(any(name.startswith(start) for name in exposed) for start in many)
