"""Without keys, a server answers under its own names, and to no page of another site."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import httpx
import pytest

from headstart.server.cli import main as cli
from headstart.server.http.app import create_app
from headstart.server.http.hosts import canonical, described
from headstart.server.settings import ServerSettings, SharedLimits

KEY = "api-key-of-sixteen"
BOUND = "192.168.1.5"
Headers = list[tuple[bytes, bytes]]


async def ask(
    app: Any, headers: Headers, *, method: str = "GET", path: str = "/v1/models",
    version: str = "1.1", server: tuple[str, int] | None = (BOUND, 8000),
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Status and body of a request with exactly these headers."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "http_version": version, "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": headers, "client": ("10.0.0.9", 1), "server": server,
    }  # fmt: skip
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body) if body.startswith(b"{") else {}


@pytest.fixture
def make_app(engine, tokenizer):
    def make(*flags: str) -> Any:
        args = cli.parse("serve", "m", *flags)
        settings = cli.server_settings(args)
        return create_app(engine, tokenizer, model_names=["tiny"], settings=settings)

    return make


def host(*values: str) -> Headers:
    return [(b"host", value.encode("latin-1")) for value in values]


LOCAL = ("localhost", "localhost:8000", "LocalHost:1", "localhost.", "localhost.:8000",
         "localhost:", "127.0.0.1", "127.0.0.1:8000", "127.9.8.7", "[::1]", "[::1]:8000",
         "[0:0::0:1]:8000", "[::ffff:127.0.0.1]:8000")  # fmt: skip
FOREIGN = ("evil.example", "evil.example:8000", "localhost.evil.example", "evil.localhost",
           "10.0.0.1", "127.0.0.1.evil.example", "2130706433", "127.1", "0x7f.0.0.1", "[fe80::1]",
           "[::2]", "", ":8000", "localhost:8000:1", "user@localhost", "localhost/x", "local host",
           "[::1", "::1", "localhost,evil.example", "localhost#", "127.0.0.1:x", "loc\xe4lhost",
           "*", "localhost..")  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
async def test_names_of_this_machine(make_app, name) -> None:
    assert (await ask(make_app(), host(name)))[0] == 200
    assert (await ask(make_app("--host", "::1"), host(name)))[0] == 200


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nowhere", "/v1/messages"])
async def test_other_names(make_app, name, path) -> None:
    status, body = await ask(make_app(), host(name), path=path)
    assert status == 403
    assert "--allowed-hosts" in body["error"]["message"]
    assert "--api-key-file" in body["error"]["message"]
    if path != "/v1/messages":
        assert body["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    ("name", "server", "status"),
    [
        (BOUND, (BOUND, 8000), 200),  # as a probe of Kubernetes comes
        (f"{BOUND}:8000", (BOUND, 8000), 200),
        (f"{BOUND}:30080", (BOUND, 8000), 200),  # another port leads here
        (f"{BOUND}.", (BOUND, 8000), 200),
        ("192.168.1.6", (BOUND, 8000), 403),
        (BOUND, None, 403),
        ("[fd00::5]:8000", ("fd00::5", 8000), 200),
        ("[FD00:0::5]", ("fd00::5", 8000), 200),
        ("[fd00::6]", ("fd00::5", 8000), 403),
        ("10.1.2.3", ("::ffff:10.1.2.3", 8000), 200),
        ("app.sock", ("app.sock", 8000), 403),  # a name, whatever it is the name of
    ],
)
async def test_the_address_that_the_connection_came_to(make_app, name, server, status) -> None:
    assert (await ask(make_app("--host", "0.0.0.0"), host(name), server=server))[0] == status


@pytest.mark.parametrize(
    ("flags", "name", "status"),
    [
        (["--host", "10.2.3.4"], "10.2.3.4:8000", 200),
        (["--host", "my-laptop"], "My-Laptop.:8000", 200),
        (["--allowed-hosts", "headstart", "llm.example.com"], "headstart:8000", 200),
        (["--allowed-hosts", "headstart", "llm.example.com"], "LLM.example.com", 200),
        (["--allowed-hosts", "LLM.example.com."], "llm.example.com", 200),
        (["--allowed-hosts", "llm.example.com"], "x.llm.example.com", 403),
        (["--allowed-hosts", "fd00::7"], "[FD00::7]:8000", 200),
        (["--allowed-hosts", "[fd00::7]"], "[fd00::7]", 200),
        (["--allowed-hosts", "*"], "whatever", 200),
        (["--allowed-hosts", "a", "--allowed-hosts", "b"], "b", 200),
        (["--api-key", KEY], "whatever", 401),  # the key protects
        (["--admin-key", KEY], "whatever", 403),  # it protects the admins' paths only
    ],
)
async def test_what_is_allowed_beside(make_app, flags, name, status) -> None:
    assert (await ask(make_app(*flags), host(name)))[0] == status
    assert (await ask(make_app(*flags), host("localhost")))[0] == (401 if status == 401 else 200)


@pytest.mark.parametrize(
    ("values", "version", "status"),
    [((), "1.0", 200), ((), "1.1", 403), (("localhost", "localhost"), "1.1", 403),
     (("localhost", "evil.example"), "1.1", 403)],
)  # fmt: skip
async def test_no_host_and_several(make_app, values, version, status) -> None:
    assert (await ask(make_app(), host(*values), version=version))[0] == status
    # A page has sent it, which would have a Host, too.
    headers = [*host(*values), (b"origin", b"http://localhost")]
    assert (await ask(make_app(), headers, version=version))[0] == 403


ORIGINS = [
    ("localhost:8000", "http://localhost:8000", 200),
    ("localhost:8000", "http://LOCALHOST:8000", 200),
    ("localhost", "http://localhost:80", 200),
    ("localhost", "https://localhost", 200),  # TLS ended before the server
    ("localhost:443", "https://localhost", 200),
    ("[::1]:8000", "http://[::1]:8000", 200),
    ("localhost:8000", "http://localhost", 403),
    ("localhost:8000", "http://localhost:3000", 403),
    ("localhost:8000", "http://127.0.0.1:8000", 403),
    ("localhost:8000", "http://evil.example", 403),
    ("localhost:8000", "http://evil.example:8000", 403),
    ("localhost:8000", "null", 403),
    ("localhost:8000", "", 403),
    ("localhost:8000", "localhost:8000", 403),
    ("localhost:8000", "file://localhost:8000", 403),
    ("localhost:8000", "chrome-extension://abcdef", 403),
    ("evil.example", "http://evil.example", 403),  # a name that has moved here
]


@pytest.mark.parametrize(("name", "origin", "status"), ORIGINS)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
async def test_pages(make_app, name, origin, status, method) -> None:
    headers = [*host(name), (b"origin", origin.encode())]
    if method == "OPTIONS":
        headers.append((b"access-control-request-method", b"POST"))
    path = "/v1/models" if method == "GET" else "/v1/completions"
    answered, body = await ask(make_app(), headers, method=method, path=path)
    if status == 403:
        assert answered == 403
        flag = "--allowed-hosts" if name == "evil.example" else "--allowed-origins"
        assert flag in body["error"]["message"]
    else:
        assert answered == {"GET": 200, "OPTIONS": 405, "POST": 400}[method]
    with_key = [*headers, (b"x-api-key", KEY.encode())]
    answered, _ = await ask(make_app("--api-key", KEY), with_key, method=method, path=path)
    assert answered == {"GET": 200, "OPTIONS": 405, "POST": 400}[method]


@pytest.mark.parametrize(
    ("allowed", "origin", "status"),
    [
        ("https://chat.example", "https://chat.example", 200),
        ("https://chat.example", "http://chat.example", 403),
        ("https://chat.example", "https://chat.example.evil", 403),
        ("*", "https://anything.example", 200),
        ("*", "null", 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_pages_that_are_allowed(make_app, allowed, origin, status, method) -> None:
    app = make_app("--allowed-origins", allowed)
    headers = [(b"origin", origin.encode()), (b"access-control-request-method", b"GET")]
    assert (await ask(app, [*host("localhost"), *headers], method=method))[0] == status
    assert (await ask(app, [*host("evil.example"), *headers], method=method))[0] == 403


async def test_two_origins_are_none(make_app) -> None:
    headers = [(b"origin", b"http://localhost:8000"), (b"origin", b"http://evil.example")]
    assert (await ask(make_app(), [*host("localhost:8000"), *headers]))[0] == 403


async def test_refusals_are_logged_and_have_an_id(make_app, caplog) -> None:
    caplog.set_level("INFO", "headstart.access")
    transport = httpx.ASGITransport(app=make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://evil.example") as client:
        answer = await client.get("/v1/models", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (403, "mine")
    assert "status=403" in caplog.text


def test_an_app_without_a_socket_looks_at_neither() -> None:
    assert ServerSettings().allowed_hosts is None
    batch = cli.batch_settings(cli.parse("run-batch", "a", "b"))
    serve = cli.server_settings(cli.parse("serve", "m"))
    assert batch.allowed_hosts is None
    # What decides answers is the same, whichever way they are asked for.
    shared = {field.name for field in fields(SharedLimits)} | {"max_queue"}
    for field in fields(ServerSettings):
        if field.name not in {"allowed_hosts", *shared}:
            assert getattr(batch, field.name) == getattr(serve, field.name), field.name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "localhost and this machine's addresses only (see --allowed-hosts)"),
        (["--host", "0.0.0.0"], "localhost and this machine's addresses only"),
        (["--host", "::"], "localhost and this machine's addresses only"),
        (["--host", "10.0.0.1", "--allowed-hosts", "B", "b."], "10.0.0.1, b, localhost and "),
        (["--allowed-hosts", "*"], "any Host (--allowed-hosts *)"),
    ],
)
def test_the_log_says_what_is_allowed(flags, said) -> None:
    settings = cli.server_settings(cli.parse("serve", "m", *flags))
    assert settings.allowed_hosts is not None
    assert described(settings.allowed_hosts).startswith(said)


@pytest.mark.parametrize("text", ["", "a:8000", "http://a", "a b", "[::1]:8000", "**", "a/b"])
def test_what_is_no_host(text, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.parse("serve", "m", "--allowed-hosts", text)
    assert "without a port" in capsys.readouterr().err


def test_one_form_of_a_host() -> None:
    assert canonical("[::FFFF:10.0.0.1]") == canonical("10.0.0.1.") == "10.0.0.1"
    assert canonical("LLM.Example.com.") == "llm.example.com"


class TestBehindASocket:
    @pytest.fixture
    def settings(self):
        return ServerSettings(allowed_hosts=("0.0.0.0",))

    @pytest.mark.parametrize(
        ("name", "status"),
        [(None, 200), ("127.0.0.1", 200), ("0.0.0.0:1", 200), ("evil.example", 403), ("", 403)],
    )
    async def test_what_the_server_tells_of_a_connection(self, live_url, name, status) -> None:
        headers = {} if name is None else {"host": name}
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"{live_url}/v1/models", headers=headers)
            assert answer.status_code == status
            page = {"origin": live_url, **headers}
            answer = await client.get(f"{live_url}/v1/models", headers=page)
            assert answer.status_code == (200 if name is None else 403)
