"""Keys, request ids, CORS, TLS, slow bodies: what stands between a socket and an endpoint."""

from __future__ import annotations

import asyncio
import hmac
import http.client
import json
import logging
import re
import socket
import ssl
import subprocess
import sys
import urllib.request

import httpx
import pytest

from headstart.engine.errors import ConfigError
from headstart.server.cli import main as cli
from headstart.server.http.access_log import log_bare_lines
from headstart.server.http.app import create_app
from headstart.server.http.auth import ADMIN_PATHS, OPEN_PATHS
from headstart.server.http.keys import Keys
from headstart.server.http.tls import Certificate
from headstart.server.settings import ServerSettings

API, OTHER_API, ADMIN = "api-key-of-sixteen", "another-api-key-of-sixteen", "admin-key-of-sixteen"
WRONG = "wrong-key-of-sixteen"
BOTH = Keys.of([API, OTHER_API], [ADMIN])


@pytest.fixture
def connect(engine, tokenizer):
    """``connect(**settings)``: a client of an app with such settings."""

    def make(**settings) -> httpx.AsyncClient:
        app = create_app(
            engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**settings)
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://test")
        client.app = app
        return client

    return make


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def paths(app) -> set[str]:
    """Every path, those of routers that are included too, with a value for each parameter."""
    found = {re.sub(r"\{.*?\}", "tiny", path) for path in app.openapi()["paths"]}
    found |= {"/openapi.json", "/", "/nowhere"}
    assert {"/health", "/version", "/v1/models/tiny", *ADMIN_PATHS} <= found
    return found


def expected(path: str, key: str, keys: Keys) -> int | None:
    """The status of a refusal, None if the endpoint is reached."""
    for_admins = bool(keys.admin) and path in ADMIN_PATHS
    if (
        path in ("/health", "/live", "/ready")
        or not (for_admins or keys.api)
        or (key == ADMIN and keys.admin)
    ):
        return None
    if key in (API, OTHER_API) and keys.api:
        return 403 if for_admins else None
    return 401


@pytest.mark.parametrize(
    "keys",
    [Keys(), Keys.of([API, OTHER_API]), Keys.of([], [ADMIN]), BOTH],
    ids=["none", "api", "admin", "both"],
)
async def test_every_path_with_every_key(connect, keys, tmp_path):
    client = connect(keys=keys, lora_dir=tmp_path)  # without one there are other 403s
    for path in paths(client.app):
        for key in ("", WRONG, API, OTHER_API, ADMIN, API[:-1], API + "x", API.upper()):
            for headers in (bearer(key), {"x-api-key": key}):
                for method in ("GET", "POST", "HEAD", "OPTIONS"):
                    answer = await client.request(method, path, headers=headers if key else {})
                    refused = answer.status_code if answer.status_code in (401, 403) else None
                    assert refused == expected(path, key, keys), (method, path, key)


async def test_refusals_say_what_to_do_and_nothing_of_keys(connect, caplog):
    caplog.set_level(logging.DEBUG)
    client = connect(keys=BOTH)
    answers = [
        await client.get("/v1/models"),
        await client.get("/v1/models", headers=bearer(WRONG)),
        await client.get("/metrics", headers={"x-api-key": API}),
        await client.get("/v1/models", headers=bearer(API)),
    ]
    assert [answer.status_code for answer in answers] == [401, 401, 403, 200]
    for answer in answers[:2]:
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "'Authorization: Bearer KEY' or as 'x-api-key: KEY'" in error["message"]
    assert answers[2].json()["error"]["code"] == "admin_key_required"
    assert "www-authenticate" not in answers[2].headers
    seen = caplog.text + repr(BOTH)
    seen += "".join(f"{answer.headers} {answer.text}" for answer in answers)
    assert not any(key in seen for key in (API, OTHER_API, ADMIN, WRONG))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("authorization", f"bearer   {API} ")], 200),
        ([("authorization", "Basic YTpi"), ("x-api-key", API)], 200),
        ([("authorization", "Bearer "), ("x-api-key", API)], 200),
        ([("authorization", API)], 401),
        ([("authorization", f"Basic {API}")], 401),
        ([("authorization", f"Bearer {WRONG}"), ("x-api-key", API)], 401),
        ([("authorization", f"Bearer {WRONG}"), ("authorization", f"Bearer {API}")], 401),
        ([("authorization", f"Bearer {API},{WRONG}")], 401),
        ([("authorization", b"Bearer \xff\xfe\x00")], 401),
        ([("cookie", API), ("api-key", API)], 401),
    ],
)
async def test_how_a_key_is_sent(connect, headers, status):
    client = connect(keys=BOTH)
    assert (await client.get("/v1/models", headers=headers)).status_code == status
    assert (await client.get(f"/v1/models?api_key={API}")).status_code == 401


async def ask(app, path: str, *headers: tuple[bytes, bytes]) -> int:
    """The status for a path exactly as given, which HTTP clients would tidy up."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return sent[0]["status"]


TRICKS = (
    "{}/",
    "/{}",
    "{}\n",
    "{}\n\n",
    "{}\r",
    "{} ",
    "{}\0",
    "{};x",
    "{}%0a",
    "{}?",
    "{}/../v1/models",
    "/health/..{}",
    "/health{}",
    "/health/{}",
    "/health\n{}",
    "/./{}",
    "http://x/health{}",
)


@pytest.mark.parametrize("trick", TRICKS)
async def test_tricks_with_paths(connect, trick):
    app = connect(keys=BOTH).app
    for path in paths(app):
        for odd in {trick.format(path), path.upper(), path[1:]}:
            if odd.rstrip("/") in OPEN_PATHS:  # a slash at the end changes nothing
                continue
            assert await ask(app, odd) == 401, odd
            # An API key may find that there is nothing, never what is for admins.
            status = await ask(app, odd, (b"x-api-key", API.encode()))
            assert status in (404, 403, 405) or path not in ADMIN_PATHS, odd


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "/health", "localhost", ""])
async def test_tricks_with_headers(connect, host):
    app = connect(keys=BOTH).app
    tricks = ((b"host", host), (b"x-forwarded-host", host), (b"x-original-url", "/health"))
    headers = [(name, value.encode()) for name, value in tricks]
    assert await ask(app, "/v1/models", *headers) == 401
    assert await ask(app, "/metrics", *headers, (b"x-api-key", API.encode())) == 403


@pytest.mark.parametrize("key", [API, OTHER_API, ADMIN, WRONG, "", "x" * 9999])
def test_every_key_is_compared_whichever_is_sent(key, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    BOTH.owner(key)
    assert sorted(compared) == sorted(BOTH.api + BOTH.admin)


def settings_of(*flags: str) -> ServerSettings:
    return cli.server_settings(cli.parse("serve", "m", *flags))


def test_where_keys_come_from(tmp_path, monkeypatch):
    assert settings_of().keys == Keys()
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n  {API}  \n\n{OTHER_API}\n")
    monkeypatch.setenv("HEADSTART_API_KEY", f" {WRONG}, {WRONG}2 ,")
    monkeypatch.setenv("HEADSTART_ADMIN_KEY", "")
    flags = ("--api-key", "k" * 16, "l" * 16, "--api-key", "m" * 16, "--admin-key", ADMIN)
    keys = settings_of(*flags, "--api-key-file", str(file)).keys
    for key in (API, OTHER_API, WRONG, f"{WRONG}2", "k" * 16, "l" * 16, "m" * 16):
        assert keys.owner(key) == "api"
    assert keys.owner(ADMIN) == "admin"
    assert keys.owner("# of the team") is None
    assert keys.owner("") is None


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--api-key", "fifteen-letters"], "", "--api-key: a key has at least 16 characters"),
        (["--admin-key", ""], "", "--admin-key: a key has at least 16 characters"),
        (["--api-key", "with a space in the middle"], "", "printable ASCII"),
        ([], "fifteen-letters", "HEADSTART_API_KEY: a key has at least 16 characters"),
        (["--api-key-file", "missing"], "", "--api-key-file: [Errno 2] No such file"),
        (["--admin-key-file", "empty"], "", "--admin-key-file: there is no key in empty"),
        (["--api-key-file", "binary"], "", "--api-key-file: 'utf-8' codec can't decode"),
        (["--api-key", API, "--admin-key", API], "", "an API key and an admin key are the same"),
        (["--ssl-certfile", "c"], "", "TLS needs both --ssl-certfile and --ssl-keyfile"),
        (["--ssl-keyfile", "c"], "", "TLS needs both --ssl-certfile and --ssl-keyfile"),
        (["--ssl-keyfile-password-file", "c"], "", "TLS needs both"),
        (["--ssl-certfile", "c", "--ssl-keyfile", "k"], "", "[Errno 2] No such file"),
        (["--ssl-certfile", "empty", "--ssl-keyfile", "empty"], "", "--ssl-keyfile empty: "),
    ],
)
def test_what_cannot_be_is_one_line(flags, environment, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSTART_API_KEY", environment)
    (tmp_path / "empty").write_text("# none yet\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert cli.main(["serve", "m", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("headstart: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not any(key in error for key in ("fifteen-letters", "with a space", API))


@pytest.mark.parametrize(
    "text", ["chat.example.com", "https://a.example/", "https://a/b", "", "**"]
)
def test_what_is_no_origin(text, capsys):
    with pytest.raises(SystemExit):
        settings_of("--allowed-origins", text)
    assert "is no origin" in capsys.readouterr().err


def test_other_flags():
    settings = settings_of(
        *("--allowed-origins", "https://a.example:8443", "http://b", "--body-timeout", "2.5"),
        *("--access-log-format", "json"),
    )
    assert settings.allowed_origins == ("https://a.example:8443", "http://b")
    assert (settings.body_timeout, settings.access_log_format) == (2.5, "json")
    assert cli.parse("serve", "m").keep_alive_timeout == 5


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("Ab.9_-", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a=b", False),
        (b"caf\xe9", False),
        ("x\ty", False),
    ],
)
async def test_request_ids(connect, caplog, sent, kept):
    caplog.set_level(logging.INFO, "headstart.access")
    client = connect(keys=BOTH)
    ids = []
    for path in ("/v1/models", "/health"):  # refused, and not
        answer = await client.get(path, headers={"x-request-id": sent})
        [own] = answer.headers.get_list("x-request-id")
        assert (own == sent) if kept else re.fullmatch("[0-9a-f]{32}", own)
        ids.append(own)
    assert (ids[0] == ids[1]) is kept
    [record] = [record for record in caplog.records if record.name == "headstart.access"]
    assert record.getMessage().endswith(f" request_id={ids[0]}")


async def test_an_internal_error_has_the_request_id(connect, engine, chat_body, caplog):
    caplog.set_level(logging.INFO, "headstart.access")
    client = connect()
    engine.add = None  # a bug
    headers = {"x-request-id": "mine"}
    answer = await client.post("/v1/chat/completions", headers=headers, json=chat_body())
    assert answer.status_code == 500
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert "status=500" in caplog.text
    assert "request_id=mine" in caplog.text


async def test_access_log_as_json(connect, chat_body, capfd, monkeypatch):
    logger = logging.getLogger("headstart.access")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "_cache", {})
    log_bare_lines(sys.stderr)
    client = connect(access_log_format="json")
    secret = chat_body(messages=[{"role": "user", "content": "secret"}])
    await client.post("/v1/chat/completions?x=secret", json=secret)
    await client.get("/evil%0a%22")
    lines = capfd.readouterr().err.splitlines()
    first, second = map(json.loads, lines)
    usage = ("prompt_tokens", "completion_tokens")
    fields = ["time", "method", "path", "status", "ms", *usage, "client", "request_id"]
    assert list(first) == fields
    assert (first["method"], first["path"], first["status"]) == (
        "POST",
        "/v1/chat/completions",
        200,
    )
    assert first["completion_tokens"] > 0
    assert (second["path"], second["status"]) == ('/evil\n"', 404)
    assert "secret" not in "".join(lines)


PREFLIGHT = {
    "origin": "https://a.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-os",
}


async def test_cors_is_off_by_default(connect):
    client = connect()
    answer = await client.get("/v1/models", headers={"origin": "https://a.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    answer = await client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 405


@pytest.mark.parametrize("allowed", ["https://a.example", "*"])
async def test_cors(connect, allowed):
    client = connect(keys=BOTH, allowed_origins=(allowed,))
    answer = await client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == allowed
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    # What is no preflight needs a key, and a page may read the refusal.
    for method in ("OPTIONS", "GET"):
        answer = await client.request(method, "/v1/models", headers={"origin": PREFLIGHT["origin"]})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == allowed
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    other = PREFLIGHT | {"origin": "https://a.example.evil"}
    answer = await client.options("/v1/chat/completions", headers=other)
    assert answer.status_code == (200 if allowed == "*" else 400)
    assert answer.headers.get("access-control-allow-origin") == ("*" if allowed == "*" else None)


class TestSlowBodies:
    @pytest.fixture
    def settings(self):
        return ServerSettings(body_timeout=0.3)

    @pytest.mark.parametrize("drip", [False, True])
    async def test_a_body_that_does_not_come_is_a_408(self, live_url, engine, drip):
        port = int(live_url.rsplit(":", 1)[1])
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        async with asyncio.timeout(300):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            # To the end, since the connection is closed; but who goes on sending then is reset.
            reading = reader.readuntil(b"}}") if drip else reader.read()
            answer = asyncio.create_task(reading)
            while drip and not answer.done():  # each piece is in time, the body is not
                writer.write(b" ")
                await asyncio.sleep(0.05)
            status, _, rest = (await answer).partition(b"\r\n")
        assert status.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in rest
        error = json.loads(rest.split(b"\r\n\r\n")[1])["error"]
        assert error["message"] == "the body was not complete within 0.3 s"
        assert error["code"] == "request_timeout"
        assert engine.added == []
        writer.close()

    async def test_an_answer_may_take_longer(self, live_url, engine, chat_body):
        engine.hold = True
        async with httpx.AsyncClient() as client, asyncio.timeout(300):
            url = f"{live_url}/v1/chat/completions"
            answer = asyncio.create_task(client.post(url, json=chat_body()))
            while not engine.added:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            engine.added[0].stream.gate.set()
            assert (await answer).status_code == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed one for localhost, its key with a password."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key, plain = folder / "cert.pem", folder / "key.pem", folder / "plain.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-passout", "pass:open sesame"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        ["openssl", "ec", "-in", str(key), "-passin", "pass:open sesame", "-out", str(plain)],
        check=True,
        capture_output=True,
    )
    (folder / "password").write_text("open sesame\n")
    return folder


def test_the_password_is_needed_and_not_asked_for(certificate):
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    found = Certificate(cert, key, "open sesame")
    assert "sesame" not in repr(found)
    for password in ("", "close sesame"):
        with pytest.raises(ConfigError, match="--ssl-keyfile"):
            Certificate(cert, key, password)
    Certificate(cert, certificate / "plain.pem")


HTTPS = """
import sys
from pathlib import Path
from headstart.engine.process import client
from headstart.engine.models import store
from headstart.server.cli import main as cli
sys.path.insert(0, sys.argv[1])
from conftest import FakeEngine

store.resolve = lambda *_: Path(sys.argv[2])
client.EngineClient = lambda _: FakeEngine(lambda _: [70], 2)
sys.exit(cli.main(["serve", "tiny", "--port", "0", *sys.argv[3:]]))
"""


def test_https_and_idle_connections(certificate, model_folder, request):
    tests = str(request.path.parent)
    flags = ["--ssl-certfile", str(certificate / "cert.pem")]
    flags += ["--ssl-keyfile", str(certificate / "key.pem")]
    flags += ["--ssl-keyfile-password-file", str(certificate / "password")]
    flags += ["--keep-alive-timeout", "1", "--shutdown-timeout", "1", "--api-key", API]
    flags += ["--access-log-format", "json", "--allowed-origins", "*"]
    process = subprocess.Popen(
        [sys.executable, "-c", HTTPS, tests, str(model_folder), *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        port = int(re.search(r" listening on https://127\.0\.0\.1:(\d+) ", line)[1])
        trusted = ssl.create_default_context(cafile=certificate / "cert.pem")
        connection = http.client.HTTPSConnection("localhost", port, timeout=300, context=trusted)
        connection.request("GET", "/v1/models", headers=bearer(API) | {"origin": "https://a"})
        answer = connection.getresponse()
        assert answer.headers["access-control-allow-origin"] == "*"
        assert json.loads(answer.read())["data"][0]["id"] == "tiny"
        assert answer.status == 200
        line = next(line for line in process.stderr if line.startswith("{"))
        assert json.loads(line)["path"] == "/v1/models"
        assert connection.sock.recv(1) == b""  # closed by the server when idle for a second
        connection.close()
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"https://localhost:{port}/health", timeout=300)
        with socket.create_connection(("127.0.0.1", port), timeout=300) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stderr.close()
