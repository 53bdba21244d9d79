"""The command line: flags, sizes, one-line errors; signals, with a fake engine in a process."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest

from headstart import __version__
from headstart.engine.errors import ConfigError, ModelError
from headstart.engine.models.store import FORMAT
from headstart.kernels.backend import KV_FORMATS, WEIGHT_FORMATS
from headstart.kernels.devices import instruction_sets
from headstart.server.cli import main as cli
from headstart.server.cli.configure import SECRET_VARIABLE
from headstart.server.settings import (
    Limits,
    Overload,
    ServerSettings,
    SharedLimits,
    settings_of,
)
from headstart.server.text.templates import ChatTemplate

parse = cli.parse
SHARED = {field.name: setting for field, setting in settings_of(SharedLimits)}
LIMITS = {field.name: setting for field, setting in settings_of(Limits)} | SHARED


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 1024**3),
        ("500MB", 500 * 1000**2),
        ("1.5G", 1536 * 1024**2),
        ("64k", 65536),
        ("1 tib", 1024**4),
        ("4096", 4096),
    ],
)
def test_sizes(text, size):
    assert parse("serve", "m", "--kv-memory", text).kv_memory == size


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serve"],
        ["serve", "m", "--kv-memory", "lots"],
        ["serve", "m", "--kv-memory", "0"],
        ["serve", "m", "--kv-memory", "-1GB"],
        ["serve", "m", "--port", "70000"],
        ["serve", "m", "--threads", "0"],
        ["serve", "m", "--threads", "²"],
        ["serve", "m", "--backend", "tpu"],
        ["serve", "m", "--relay", "sometimes"],
        ["serve", "m", "--relay"],
        ["serve", "m", "--relay-check", "-1"],
        ["serve", "m", "--relay-check", "1.5"],
        ["serve", "m", "--relay-check", "never"],
        ["serve", "m", "--segment-mask", "full"],
        ["serve", "m", "--pooling", "max"],
        ["serve", "m", "--max-loras", "0"],
        ["serve", "m", "--lora"],
        ["plan", "m", "--lora", "a=/"],
        ["plan", "m", "--prefix", "0"],
        ["plan", "m", "--batch", "many"],
        ["plan", "m", "--suffix", "-5"],
        ["plan", "m", "--port", "8000"],
        ["pull"],
        ["dance"],
    ],
)
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"headstart {__version__}\n"


def test_every_flag_gets_where_it_belongs(tmp_path):
    args = parse(
        *("serve", "m", "--backend", "cpu", "--isa", "avx2", "--weights", "int8"),
        *("--kv-memory", "1GiB", "--max-model-len", "4096", "--max-batched-tokens", "256"),
        *("--max-running", "8", "--threads", "2", "--no-prefix-caching"),
        *("--max-body-size", "1MiB", "--max-n", "2", "--max-prompts", "3"),
        *("--max-choices", "4", "--max-stop", "5"),
        *("--relay", "on", "--relay-check", "100", "--cache-dir", "/somewhere/else"),
        *("--log-level", "debug", "--tool-call-parser", "mistral", "--reasoning-parser", "think"),
    )
    config = cli.engine_config(args, tmp_path)
    assert (config.backend, config.isa, config.weights) == ("cpu", "avx2", "int8")
    assert (config.kv_memory, config.max_model_len) == (1024**3, 4096)
    assert (config.max_batched_tokens, config.max_running, config.threads) == (256, 8, 2)
    assert config.prefix_caching is False
    assert (config.relay, config.relay_check) == ("on", 100)
    assert (config.cache_dir, config.log_level) == ("/somewhere/else", "debug")
    assert config.model_path == str(tmp_path)
    settings = cli.server_settings(args)
    assert (settings.max_body_bytes, settings.max_n, settings.max_prompts) == (1024**2, 2, 3)
    assert (settings.max_choices, settings.max_stop) == (4, 5)
    assert (settings.tool_call_parser, settings.reasoning_parser) == ("mistral", "think")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--weights", WEIGHT_FORMATS),
        ("--kv-format", KV_FORMATS),
        ("--isa", instruction_sets()),
    ],
)
def test_whatever_the_kernels_have_can_be_asked_for(flag, values, tmp_path):
    field = flag[2:].replace("-", "_")
    for value in values:
        args = parse("serve", "m", flag, value)
        assert getattr(cli.engine_config(args, tmp_path), field) == value


def test_every_limit_has_a_flag_that_is_read():
    named = {field.name for field in dataclasses.fields(ServerSettings)}
    wanted = {name for name in named if name.startswith(("max_", "rate_"))} | {
        "grammar_timeout",
        "template_timeout",
        "ttft_slo",
    }
    flags = {name: setting.flag_of(name) for name, setting in LIMITS.items()}
    flags |= {field.name: setting.flag_of(field.name) for field, setting in settings_of(Overload)}
    assert sorted(flags) == sorted(wanted)
    values = {name: 1000 + i for i, name in enumerate(flags)}
    argv = [word for name, flag in flags.items() for word in (flag, str(values[name]))]
    settings = cli.server_settings(parse("serve", "m", *argv))
    assert {name: getattr(settings, name) for name in values} == values
    for flag in flags.values():
        with pytest.raises(SystemExit):
            parse("serve", "m", flag, "0")


def test_limits_of_all_requests_together_do_not_concern_a_file(capsys):
    settings = cli.batch_settings(parse("run-batch", "in", "out"))
    assert settings.max_queue == sys.maxsize
    for name, setting in SHARED.items():
        assert getattr(settings, name) == sys.maxsize
        with pytest.raises(SystemExit):
            parse("run-batch", "in", "out", setting.flag_of(name), "1")
    assert "unrecognized arguments: --max-waiting-grammars" in capsys.readouterr().err


def test_all_bodies_together_are_no_smaller_than_one():
    args = parse("serve", "m", "--max-body-size", "9MiB", "--max-bodies-size", "8MiB")
    with pytest.raises(ConfigError, match="--max-bodies-size is smaller than --max-body-size"):
        cli.server_settings(args)


def test_the_help_has_the_default_of_every_limit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse("serve", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, setting in LIMITS.items():
        value = getattr(ServerSettings(), name)
        default = f"{value:g}" if isinstance(value, float) else str(value)
        if setting.metavar == "SIZE":
            default = {8 << 20: "8MiB", 64 << 20: "64MiB", 65536: "64KiB"}[value]
        flag = f"{setting.flag_of(name)} {setting.metavar} {setting.help}"
        assert f"{flag} (default: {default})" in text


def test_times(monkeypatch):
    args = parse("serve", "m", "--body-timeout", "3", "--request-timeout", "0.5")
    settings = cli.server_settings(args)
    assert (settings.body_timeout, settings.request_timeout) == (3, 0.5)
    assert cli.server_settings(parse("serve", "m")).request_timeout is None
    assert parse("serve", "m").head_timeout == 20
    for flag in ("--request-timeout", "--head-timeout", "--template-timeout"):
        with pytest.raises(SystemExit):
            parse("serve", "m", flag, "0")


def test_silences(tmp_path):
    args = parse("serve", "m")
    assert cli.server_settings(args).ping_interval == 10
    assert cli.engine_config(args, tmp_path).stuck_after == 120
    args = parse("serve", "m", "--ping-interval", "0", "--engine-stuck-after", "7.5")
    assert cli.server_settings(args).ping_interval == 0
    assert cli.engine_config(args, tmp_path).stuck_after == 7.5
    for flag in ("--ping-interval", "--engine-stuck-after"):
        with pytest.raises(SystemExit):
            parse("serve", "m", flag, "-1")


def test_scheduling_policy(tmp_path):
    args = parse("serve", "m", "--scheduling-policy", "priority")
    assert cli.engine_config(args, tmp_path).scheduling_policy == "priority"


def test_runahead_flags(tmp_path, monkeypatch):
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    (tmp_path / "secret").write_text("of the file, long enough\n")
    args = parse(
        *("serve", "m", "--runahead", "3", "--runahead-hosts", "a:1", "b:2"),
        *("--runahead-hosts", "c:3", "--runahead-secret-file", str(tmp_path / "secret")),
        *("--runahead-min", "500", "--runahead-cuts", "even", "--runahead-timeout", "0.5"),
        *("--runahead-transport", "gloo"),
    )
    config = cli.engine_config(args, tmp_path)
    assert (config.runahead, config.runahead_hosts) == (3, ["a:1", "b:2", "c:3"])
    assert config.runahead_secret == "of the file, long enough"
    assert (config.runahead_min, config.runahead_cuts) == (500, "even")
    assert (config.runahead_timeout, config.runahead_transport) == (0.5, "gloo")


def test_tensor_parallel(tmp_path):
    assert cli.engine_config(parse("serve", "m"), tmp_path).tensor_parallel == 1
    args = parse("serve", "m", "--tensor-parallel", "3")
    assert cli.engine_config(args, tmp_path).tensor_parallel == 3
    args = parse("serve", "m", "--tensor-parallel", "3", "--runahead", "env")
    with pytest.raises(ConfigError, match="--tensor-parallel and --runahead cannot be combined"):
        cli.run_serve(args)


def test_the_secret_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "of the environment")
    args = parse("runahead-rank", "m", "--listen", "127.0.0.1:7000")
    config = cli.engine_config(args, tmp_path)
    assert (config.runahead_secret, config.runahead) == ("of the environment", 1)


def test_pooling_flag():
    assert cli.server_settings(parse("serve", "m")).pooling is None
    assert cli.server_settings(parse("serve", "m", "--pooling", "mean")).pooling == "mean"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runahead", "0"], "--runahead: '0' is not a whole number above 0"),
        (["--runahead", "all"], "--runahead: 'all' is not a whole number above 0"),
        (["--runahead-min", "-1"], "--runahead-min: '-1' is not a whole number above 0"),
        (["--runahead-cuts", "odd"], "--runahead-cuts: invalid choice: 'odd'"),
        (["--runahead-timeout", "0"], "--runahead-timeout: '0' is not a number of seconds above 0"),
        (["--runahead-timeout", "nan"], "'nan' is not a number of seconds above 0"),
        (["--runahead-timeout", "soon"], "'soon' is not a number of seconds above 0"),
        (["--runahead-hosts", "a:1", "nonsense"], "--runahead-hosts: 'nonsense' is not HOST:PORT"),
        (["--runahead-hosts", "a:0"], "'a:0' is not HOST:PORT"),
        (["--runahead-hosts", "a:22x"], "'22x' is not a port"),
        (["--runahead-transport", "nccl"], "--runahead-transport: invalid choice: 'nccl'"),
    ],
)
def test_wrong_runahead_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("serve", "m", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["runahead-rank", "m", "--listen", "a:1"], {}, "a rank needs --runahead-secret-file"),
        (
            ["runahead-rank", "m", "--listen", "a:1", "--runahead-secret-file", "missing"],
            {},
            "--runahead-secret-file: [Errno 2] No such file or directory: 'missing'",
        ),
        (["runahead-tune", "m"], {}, "there is nothing to tune"),
        (["serve", "m", "--runahead", "env"], {}, "--runahead env needs RANK, WORLD_SIZE"),
        (
            ["serve", "m", "--runahead", "env"],
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK 2 of WORLD_SIZE 2: there is no chain of these",
        ),
        (
            ["serve", "m", "--runahead", "env"],
            {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "'x' is missing or no number",
        ),
    ],
)
def test_ranks_that_cannot_be(argv, environment, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in (SECRET_VARIABLE, "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("headstart: error: ")
    assert message in error


def test_adapter_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "a=b"):
        (tmp_path / name).mkdir()
    args = parse(
        *("serve", "m", "--lora", "legal/1=one", f"x y={tmp_path}/two", "--lora", "z=a=b"),
        *("--max-loras", "3", "--lora-dir", ".", "--segment-mask", "turns"),
    )
    config = cli.engine_config(args, tmp_path)
    assert config.adapters == {
        "legal/1": str(tmp_path / "one"),
        "x y": str(tmp_path / "two"),
        "z": str(tmp_path / "a=b"),
    }
    assert config.max_adapters == 3
    settings = cli.server_settings(args)
    assert (settings.segment_mask, settings.lora_dir) == ("turns", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "one"], "--lora: 'one' is not NAME=PATH"),
        (["--lora", "a="], "--lora: 'a=' is not NAME=PATH"),
        (["--lora", "=one"], "--lora: '=one': a name has 1 to 128 characters, not 0"),
        (["--lora", "x" * 129 + "=one"], "a name has 1 to 128 characters, not 129"),
        (["--lora", "a\n=one"], "a name has printable characters only"),
        (["--lora", "a=missing"], "--lora: 'missing' is no folder"),
        (["--lora", "a=file"], "--lora: 'file' is no folder"),
        (["--lora", "a=\udcff"], "is no folder"),
        (["--lora", "a=one", "b=two", "--lora", "a=two"], "--lora: the name 'a' is given twice"),
        (["--lora", "m=one"], "--lora: 'm' is the model's name"),
        (
            ["--served-model-name", "x", "y", "--lora", "m=one", "y=two"],
            "--lora: 'y' is the model's name",
        ),
        (["--max-loras", "1", "--lora", "a=one", "b=two"], "--lora: 2 adapters, and --max-loras 1"),
        (["--lora-dir", "missing"], "--lora-dir: 'missing' is no folder"),
    ],
)
def test_wrong_adapter_flags_are_told_before_anything_else(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(cli, "bind", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "m", *flags])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("headstart serve: error: argument --lora")
    assert message in last


def test_defaults_are_those_of_the_config(tmp_path):
    from headstart.engine.config import EngineConfig

    args = parse("serve", "m")
    # An engine by itself counts tokens: what it does then does not depend on a clock.
    expected = EngineConfig(
        model_path=str(tmp_path), cache_dir=str(args.cache_dir), step_time=args.step_time
    )
    assert args.step_time > 0
    assert cli.engine_config(args, tmp_path) == expected
    served = ServerSettings(allowed_hosts=("127.0.0.1",))
    assert cli.server_settings(args) == served
    # "plan" has the engine's flags, too, but its output is all there should be to read.
    args = parse("plan")
    assert args.model == "smollm2-135m"
    assert (args.prefix, args.batch, args.suffix, args.measure) == (2048, 16, 128, False)
    config = cli.engine_config(args, tmp_path)
    assert msgspec.structs.replace(config, log_level="info") == expected
    assert config.log_level == "warning"


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
@pytest.mark.parametrize("every", ["0", "1", "5000"])
def test_relay_flags(mode, every, tmp_path):
    args = parse("serve", "m", "--relay", mode, "--relay-check", every)
    config = cli.engine_config(args, tmp_path)
    assert (config.relay, config.relay_check) == (mode, int(every))


def test_model_names(tmp_path):
    assert cli.model_names(parse("serve", "org/model")) == ["org/model"]
    assert cli.model_names(parse("serve", str(tmp_path))) == [tmp_path.name]
    assert cli.model_names(parse("serve", "m", "--served-model-name", "a", "b")) == ["a", "b"]


def test_a_chat_template_in_place_of_the_models_own(model_folder):
    file = model_folder / "other.jinja"
    file.write_text("{{ messages[0]['content'] }} é", encoding="utf-8")
    for_tools = model_folder / "additional_chat_templates" / "tool_use.jinja"
    for_tools.parent.mkdir()
    for_tools.write_text("tools")
    args = parse("serve", str(model_folder), "--chat-template", str(file))
    tokenizer = cli.tokenizer_of(args, model_folder)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        rendered = ChatTemplate(tokenizer).render([{"role": "user", "content": "hi"}], tools)
        assert rendered == "hi é" if tools is None else rendered.endswith("\n\nhi é")
    own = cli.tokenizer_of(parse("serve", str(model_folder)), model_folder).chat_template
    assert own != tokenizer.chat_template
    file.write_bytes(b"\xff")
    for path in (file, model_folder / "missing.jinja"):
        args = parse("serve", str(model_folder), "--chat-template", str(path))
        with pytest.raises(ConfigError, match=f"--chat-template {path}: "):
            cli.tokenizer_of(args, model_folder)
    file.write_text("{% if %}")
    args = parse("serve", str(model_folder), "--chat-template", str(file))
    with pytest.raises(ModelError, match="chat template is broken"):
        ChatTemplate(cli.tokenizer_of(args, model_folder))


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("HEADSTART_HOME", "/somewhere")
    assert parse("pull", "m").cache_dir == Path("/somewhere")
    monkeypatch.delenv("HEADSTART_HOME")
    assert parse("pull", "m").cache_dir == Path.home() / ".cache" / "headstart"


@pytest.fixture(scope="module")
def plan(tiny_model, tmp_path_factory):
    """``plan(*flags)``: runs "headstart plan" with a tiny model that needs no conversion."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "headstart.json").write_text(json.dumps({"format": FORMAT}))

    def run(*flags: str) -> int:
        size = ("--kv-memory", "8MiB", "--threads", "2", "--cache-dir", str(home))
        return cli.main(["plan", str(folder), *size, *flags])

    run.home = home
    return run


def test_plan_prints_a_table(plan, capsys):
    flags = ("--prefix", "256", "--batch", "8", "--suffix", "16", "--weights", "f32")
    assert plan(*flags, "--relay", "on") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{plan.home / 'tiny'}, weights f32, cpu ")
    assert lines[2] == (
        "8 sequences share 256 tokens and have 16 of their own each; 256 tokens are read once"
    )
    assert lines[4].split() == ["plain", "relay", "ratio"]
    rows = ["attention, predicted", "step, predicted", "tokens, predicted"]
    assert [line[:28].strip() for line in lines[5:8]] == rows
    for line in lines[5:7]:
        assert re.fullmatch(r"\s+\d+\.\d\d ms\s+\d+\.\d\d ms\s+\d+\.\d\d", line[28:])
    assert re.fullmatch(r"\s+\d+ /s\s+\d+ /s", lines[7][28:])
    assert lines[9].startswith("reading this prefix once ")
    assert len(lines) == 10
    # What was measured of this machine is kept beside the models.
    kept = {file: file.read_bytes() for file in (plan.home / "machine").iterdir()}
    assert sorted(file.name.partition("-")[0] for file in kept) == ["attention", "steps"]
    assert plan(*flags, "--relay", "off", "--measure") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("; 0 tokens are read once")
    rows += [row.replace("predicted", "measured") for row in rows]
    assert [line[:28].strip() for line in lines[5:11]] == rows
    assert kept == {file: file.read_bytes() for file in (plan.home / "machine").iterdir()}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ("--prefix", "100000"),
            r"100000 \+ 128 tokens are more than the model's 512, or --max-model-len",
        ),
        (
            ("--prefix", "256", "--batch", "9999999", "--measure"),
            "this needs KV memory for .* tokens, and there is room for 16384: "
            "use a larger --kv-memory",
        ),
        (("--backend", "reference", "--weights", "int8"), "the reference backend computes in f32"),
        (("--max-model-len", "513"), "--max-model-len 513 is beyond the model's 512 tokens"),
    ],
)
def test_plan_of_what_cannot_be_is_one_line(plan, flags, reason, capsys):
    assert plan("--weights", "f32", *flags) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert re.match(f"headstart: error: {reason}", error)
    assert error.count("\n") == 1


def test_plan_of_no_model_is_one_line(tmp_path, capsys):
    missing = tmp_path / "missing"
    assert cli.main(["plan", str(missing), "--cache-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"headstart: error: {missing}: no such file or folder")
    assert error.count("\n") == 1


def test_port_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port}: Address already in use"):
            cli.bind("127.0.0.1", port)
        assert cli.main(["serve", "m", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("headstart: error: cannot listen on 127.0.0.1 port")
    assert error.count("\n") == 1


def test_host_unknown_is_one_line():
    with pytest.raises(ConfigError, match=r"cannot listen on 256\.0\.0\.1"):
        cli.bind("256.0.0.1", 0)


SERVER = """
import asyncio, socket, sys, time
from pathlib import Path
from headstart.engine.errors import ModelError
from headstart.engine.process.messages import ModelInfo, Output, Stats
from headstart.server.cli import main as cli
from headstart.server.http.app import create_app
from headstart.server.http.serving import serve
from headstart.server.text.tokenizer import Tokenizer

class Stream:
    async def __aiter__(self):
        for i in range(20):
            await asyncio.sleep(float(sys.argv[2]))
            yield Output(0, [70], "length" if i == 19 else None)
    def abort(self): print("aborted", flush=True)

class Engine:
    ready = True
    stats = Stats()
    restarts = 0
    adapters = {}
    model = ModelInfo(max_model_len=256, vocab_size=400, hidden_size=8, page_size=16, num_pages=9,
                      eos_token_ids=[0], backend="fake", weights="f32", version="0")
    async def start(self):
        if sys.argv[3] == "fail":
            raise ModelError("the file is truncated")
    def add(self, token_ids, params, **where): return Stream()
    async def stop(self): print("stopped", flush=True)

listener = cli.bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
failures = []
app = create_app(Engine(), Tokenizer.from_folder(Path(sys.argv[1])), model_names=["tiny"],
                 on_start_failure=failures.append)
serve(app, listener, failures, drain_seconds=1)
print("failures", [str(f) for f in failures], flush=True)
"""


@pytest.fixture
def launch(model_folder):
    processes = []

    def start(seconds_per_token: float, how: str = "fine") -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(model_folder), str(seconds_per_token), how],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        port = int(process.stdout.readline())
        deadline = time.monotonic() + 300
        while how == "fine":
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=300)
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        return process, port

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def stream_request(port: int) -> socket.socket:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 20, "stream": True}).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=300)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    assert connection.recv(15) == b"HTTP/1.1 200 OK"
    return connection


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_then_exits_0(launch, number):
    process, port = launch(0.02)
    connection = stream_request(port)
    process.send_signal(number)
    data = read_all(connection)
    assert data.count(b'"text":"') >= 19
    assert b'"finish_reason":"length"' in data
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert process.wait(20) == 0
    assert process.stdout.read() == "stopped\nfailures []\n"


def test_what_does_not_end_in_time_gets_an_error(launch):
    process, port = launch(0.5)
    connection = stream_request(port)
    process.send_signal(signal.SIGTERM)
    assert b"the server is shutting down" in read_all(connection)
    assert process.wait(20) == 0
    assert process.stdout.read().startswith("aborted\nstopped\n")


def test_a_second_signal_does_not_wait(launch):
    process, port = launch(0.05)
    connection = stream_request(port)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert b"the server is shutting down" in read_all(connection)
    assert process.wait(20) == 0


def test_an_engine_that_does_not_start_ends_the_server(launch):
    process, _ = launch(0.01, "fail")
    assert process.wait(20) == 0
    assert "failures ['the file is truncated']" in process.stdout.read()


SLOW_FETCH = """
import sys, time
from headstart.engine.models import store
from headstart.server.cli import main as cli

def slow(*_):
    try:
        print("fetching", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)

store.resolve = store.pull = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("argv", "status"), [(["serve", "m", "--port", "0"], 0), (["pull", "m"], 143)]
)
def test_sigterm_before_there_is_a_server(argv, status):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_FETCH, *argv], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "fetching\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == status
        assert process.stdout.read() == "tidied up\n"


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [
        (False, "download:   0%\ndownload:  50%\ndownload: 100%\n"),
        (True, "\rdownload:   0%\rdownload:   1%\rdownload:  60%\rdownload: 100%\n"),
    ],
)
def test_progress(terminal, shown, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress = cli.ProgressLines()
    for done in (0, 1, 60, 60, 100, 70, 100):
        progress("download", done, 100)
    assert capsys.readouterr().err == shown


def test_progress_says_how_long_it_will_take(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    times = iter((0.0, 2.0, 4.0, 30.0, 40.0))
    progress = cli.ProgressLines(lambda: next(times))
    for done in (0, 5, 10, 75, 100):
        progress("int8 weights", done, 100)
    assert capsys.readouterr().err.split("\r")[1:] == [
        "int8 weights:   0%",
        "int8 weights:   5%",
        "int8 weights:  10%, 36 s to go",
        "int8 weights:  75%, 10 s to go",
        "int8 weights: 100%            \n",
    ]
