"""Emulated links: their names, the commands that make them, and that nothing of them stays."""

import os
import shutil
import subprocess
import sys

import pytest

from headstart.bench import links
from headstart.bench.http_client import BenchError
from headstart.bench.links import Link, linked, main, namespaces, parse_link, setup_commands

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="needs root and iproute2",
)


def ours() -> list[str]:
    return [name for name in namespaces() if name.startswith(f"headstart-{os.getpid()}-")]


def test_names() -> None:
    assert parse_link("loopback") == Link("loopback", None, False)
    assert parse_link("10gbit") == Link("10gbit", 10.0, False)
    assert parse_link("0.5gbit+jitter") == Link("0.5gbit+jitter", 0.5, True)
    assert parse_link("0.5gbit+jitter").quiet == "0.5gbit"
    for name in ("", "gbit", "1mbit", "0gbit", "1gbit+noise", "loopback+jitter", "1gbit "):
        with pytest.raises(ValueError, match="a link is loopback, RATEgbit"):
            parse_link(name)


def test_every_end_is_limited() -> None:
    commands = [" ".join(command) for command in setup_commands("run-", 1.0, 3)]
    limited = [c for c in commands if c.startswith("tc ")]
    assert limited == [
        f"tc -n run-{end} root tbf rate 1000mbit burst 131072 limit 2500000"
        for rank in range(3)
        for end in (f"{rank} qdisc add dev eth0", f"switch qdisc add dev port{rank}")
    ]
    assert "ip -n run-2 addr add 10.77.0.3/24 dev eth0" in commands
    assert sum(c.startswith("ip netns add") for c in commands) == 4


@pytest.mark.parametrize(
    ("gbit", "expected"),
    [
        (0.5, "tbf rate 500mbit burst 131072 limit 1250000"),
        (0.05, "tbf rate 50mbit burst 131072 limit 1048576"),
        (10.0, "tbf rate 10000mbit burst 250000 limit 25000000"),
    ],
)
def test_limits(gbit: float, expected: str) -> None:
    assert links.limit(gbit) == expected


def test_loopback_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_call", lambda command: pytest.fail(str(command)))
    with linked(parse_link("loopback"), 3) as places:
        assert [(place.prefix, place.address) for place in places] == [((), "127.0.0.1")] * 3


def test_without_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["1gbit"]) == 1
    assert capsys.readouterr().err == (
        "error: links need root, for network namespaces; loopback does not\n"
    )
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert main(["1gbit"]) == 1
    assert "there is no `ip`" in capsys.readouterr().err


@needs_namespaces
def test_places_reach_one_another_and_go() -> None:
    with linked(parse_link("1gbit+jitter"), 2) as places:
        assert len(ours()) == 3
        assert links.sent_bytes(places[0]) is not None
        ping = "import socket, sys; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto"
        subprocess.run(
            [*places[0].prefix, sys.executable, "-c", f"{ping}(b'x', ('{places[1].address}', 9))"],
            check=True,
        )
    assert ours() == []


@needs_namespaces
def test_nothing_stays_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), linked(parse_link("1gbit"), 2):
        raise KeyError
    assert ours() == []
    # Half made.
    monkeypatch.setattr(links, "limit", lambda gbit: "no-such-qdisc")
    with (
        pytest.raises(BenchError, match=r"^tc -n .* no-such-qdisc: "),
        linked(parse_link("1gbit"), 2),
    ):
        pytest.fail("it was made")
    assert ours() == []


@needs_namespaces
def test_leftovers_of_a_dead_run_go() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    subprocess.run(["ip", "netns", "add", f"headstart-{dead.pid}-0-switch"], check=True)
    links.remove_leftovers()
    assert f"headstart-{dead.pid}-0-switch" not in namespaces()
