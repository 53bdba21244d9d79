"""From the command to the first answer: when the port opens, and what the log says."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import msgspec
import pytest

from headstart.engine.errors import ConfigError
from headstart.server.cli import main as cli
from headstart.server.generation.defaults import GenerationDefaults
from headstart.server.http.app import create_app
from headstart.server.http.keys import Keys
from headstart.server.http.ready import summary
from headstart.server.http.serving import serve
from headstart.server.settings import ServerSettings

SERVER = """
import asyncio, sys
from pathlib import Path
from headstart.engine.models import store
from headstart.engine.process import client
from headstart.server.cli import main as cli
sys.path.insert(0, sys.argv[1])
from conftest import FakeEngine

def fetch(*_):
    print("fetching", file=sys.stderr, flush=True)
    sys.stdin.readline()
    return Path(sys.argv[2])

class LoadingEngine(FakeEngine):
    async def start(self):
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        self.ready = True

store.resolve = fetch
client.EngineClient = lambda _: LoadingEngine(lambda _: [70], 2, ready=False)
sys.exit(cli.main(["serve", "tiny", "--port", sys.argv[3]]))
"""


def status(url: str) -> int | str:
    try:
        return int(urllib.request.urlopen(url, timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        return type(error.reason).__name__


def test_the_port_opens_with_the_files_and_the_log_says_when_the_model_is_ready(
    model_folder, request
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(request.path.parent), str(model_folder), str(port)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr.readline() == "fetching\n"
            assert status(f"{url}/live") == "ConnectionRefusedError"
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stderr.readline()
            assert f"listening on {url} (not ready: the model is loading, " in line
            assert (status(f"{url}/live"), status(f"{url}/health")) == (200, 503)
            process.stdin.write("\n")
            process.stdin.flush()
            lines = iter(process.stderr.readline, "")
            assert any(re.search(r": ready after \d+\.\d s$", line) for line in lines)
            assert any(line.split() == ["URL", url] for line in lines)
            assert status(f"{url}/health") == 200
        finally:
            process.terminate()
            assert process.wait(20) == 0


def test_another_that_began_to_listen_meanwhile_is_one_line(engine, tokenizer):
    app = create_app(engine, tokenizer, model_names=["tiny"])
    first = cli.bind("127.0.0.1", 0)
    second = cli.bind("127.0.0.1", first.getsockname()[1])
    with first, second:
        first.listen()
        with pytest.raises(ConfigError, match=r"^cannot listen on http://127\.0\.0\.1:\d+: "):
            serve(app, second, [], drain_seconds=1)


def test_an_address_of_ipv6():
    with cli.bind("::1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2], timeout=20):
            pass


def test_the_summary(engine, tokenizer):
    keys = Keys.of(api=["k" * 16, "l" * 16])
    app = create_app(
        engine,
        tokenizer,
        model_names=["tiny", "other"],
        settings=ServerSettings(keys=keys),
        defaults=GenerationDefaults(temperature=0.2),
    )
    lines = summary(app.state.runtime, engine.model, "http://a:1", 3.14159).splitlines()
    assert re.fullmatch(
        r"  memory    \d+\.\d\d GiB server, \d+\.\d\d GiB engine, resident now", lines.pop(5)
    )
    assert lines == [
        "ready after 3.1 s",
        "  model     tiny, other",
        "  weights   f32",
        "  kernels   fake, 1 thread",
        "  KV cache  1,024 tokens in 0.00 GiB",
        "  context   256 tokens",
        "  relay     off",
        "  answers   tool calls hermes, thoughts not read",
        "  defaults  temperature 0.2",
        "  keys      2 for the API, 0 for admins",
        "  URL       http://a:1",
    ]
    app = create_app(engine, tokenizer, model_names=["tiny"])
    chosen = msgspec.structs.replace(
        engine.model, weights="int8", weights_reason="it is good", trained_context=131072
    )
    lines = summary(app.state.runtime, chosen, "http://a:1", 0).splitlines()
    assert "  weights   int8: it is good" in lines
    assert "  keys      none: whoever reaches the URL may do everything" in lines
    assert "  context   256 tokens of the model's 131,072" in lines
    assert not any("asked as" in line for line in lines)  # nothing looks at it
    settings = ServerSettings(allowed_hosts=("0.0.0.0", "llm"))
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    lines = summary(app.state.runtime, engine.model, "http://a:1", 0).splitlines()
    assert lines[-2].startswith("  asked as  llm, localhost and this machine's addresses only ")
