"""Emulated links between processes of this machine: a network namespace per rank, limited by tc.

    rank 0 ─ eth0 ═══ port0 ─╮          ═══  a veth pair, each end limited to the link's rate (tbf):
    rank 1 ─ eth0 ═══ port1 ─┤ bridge        what a rank sends, and what it receives
    rank 2 ─ eth0 ═══ port2 ─╯

So every rank has a full-duplex port of a switch. A link is called "loopback" (no namespaces, no
limit), "RATEgbit", or "RATEgbit+jitter": then bursts of others' traffic, simulated by lowering the
rate of what a rank sends, leave it a tenth of its link for 10 to 50 ms, after 20 to 100 ms each.
Nothing adds latency. Needs root and iproute2, except for loopback.

    python -m headstart.bench.links 10gbit 1gbit 0.5gbit+jitter      # what TCP gets through each
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError
from headstart.bench.report import markdown

LOOPBACK = "loopback"
LEFT_BY_OTHERS = 0.1
"""Share of a link that is left during a burst of others' traffic."""
QUIET_SECONDS = (0.02, 0.1)
BURST_SECONDS = (0.01, 0.05)
CHECK_SECONDS = 1.0

_PREFIX = "headstart-"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Link:
    """``gbit``: gigabit per second, each way; None: loopback. ``jitter``: others use it too."""

    name: str
    gbit: float | None
    jitter: bool

    @property
    def quiet(self) -> str:
        """The name of the same link without jitter."""
        return self.name.removesuffix("+jitter")


class Place(NamedTuple):
    """Where a rank runs: what its command begins with, and its IP address."""

    prefix: tuple[str, ...]
    address: str


def parse_link(name: str) -> Link:
    """The link called ``name``. Raises ValueError for what is none."""
    if name == LOOPBACK:
        return Link(name, None, False)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)gbit(\+jitter)?", name)
    if found is None or not float(found[1]):
        raise ValueError(f"a link is {LOOPBACK}, RATEgbit or RATEgbit+jitter, not {name!r}")
    return Link(name, float(found[1]), found[2] is not None)


@contextmanager
def linked(link: Link, ranks: int) -> Iterator[list[Place]]:
    """A place for each rank, joined by ``link`` until the block ends, however it ends."""
    if link.gbit is None:
        yield [Place((), "127.0.0.1")] * ranks
        return
    require_namespaces()
    remove_leftovers()
    run = f"{_PREFIX}{os.getpid()}-{next(_numbers)}-"
    with ExitStack() as stack:
        stack.callback(_remove, run)
        for command in setup_commands(run, link.gbit, ranks):
            _call(command)
        if link.jitter:
            for rank in range(ranks):
                stack.enter_context(_disturbed(f"{run}{rank}", link.gbit, random.Random(rank)))
        places = [
            Place(("ip", "netns", "exec", f"{run}{rank}"), _address(rank)) for rank in range(ranks)
        ]
        yield places


def setup_commands(run: str, gbit: float, ranks: int) -> list[list[str]]:
    """What makes the namespaces ``run``switch, ``run``0, ``run``1, ... and the links."""
    switch = f"{run}switch"
    lines = [
        f"ip netns add {switch}",
        f"ip -n {switch} link add bridge type bridge",
        f"ip -n {switch} link set bridge up",
    ]
    for rank in range(ranks):
        mine, port = f"{run}{rank}", f"port{rank}"
        lines += [
            f"ip netns add {mine}",
            f"ip -n {switch} link add {port} type veth peer name eth0 netns {mine}",
            f"ip -n {switch} link set {port} master bridge up",
            f"ip -n {mine} addr add {_address(rank)}/24 dev eth0",
            f"ip -n {mine} link set lo up",
            f"ip -n {mine} link set eth0 up",
            f"tc -n {mine} qdisc add dev eth0 root {limit(gbit)}",
            f"tc -n {switch} qdisc add dev {port} root {limit(gbit)}",
        ]
    return [line.split() for line in lines]


def limit(gbit: float) -> str:
    """The token bucket of one end of a link.

    Segments reach a veth device unsplit, 64 KiB at a time: a smaller bucket would split them, at
    the processor's cost. The queue holds 20 ms, but at least 1 MiB: a switch with deep buffers.
    """
    bytes_per_ms = gbit * 1e9 / 8 / 1000
    burst = max(128 << 10, int(0.2 * bytes_per_ms))
    queue = max(1 << 20, int(20 * bytes_per_ms))
    return f"tbf rate {gbit * 1000:g}mbit burst {burst} limit {queue}"


def require_namespaces() -> None:
    """Raises BenchError where links cannot be made."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise BenchError(f"links need iproute2: there is no `{missing[0]}`; loopback needs none")
    if os.geteuid() != 0:
        raise BenchError("links need root, for network namespaces; loopback does not")


def remove_leftovers() -> None:
    """Remove the namespaces of runs whose process is gone."""
    for name in namespaces():
        found = re.match(rf"{_PREFIX}(\d+)-", name)
        if found and not _is_alive(int(found[1])):
            _call(["ip", "netns", "del", name])


def namespaces() -> list[str]:
    """The names of all network namespaces."""
    return [line.split()[0] for line in _call(["ip", "netns", "list"]).splitlines() if line]


def _remove(run: str) -> None:
    """The links go with the namespaces they are in."""
    for name in namespaces():
        if name.startswith(run):
            _call(["ip", "netns", "del", name])


@contextmanager
def _disturbed(namespace: str, gbit: float, chance: random.Random) -> Iterator[None]:
    """Bursts of others' traffic on what ``namespace`` sends, from a thread; tc reads a pipe."""
    done = threading.Event()
    with subprocess.Popen(
        ["tc", "-n", namespace, "-batch", "-"], stdin=subprocess.PIPE, text=True
    ) as tc:
        assert tc.stdin is not None
        pipe = tc.stdin

        def leave(share: float) -> None:
            pipe.write(f"qdisc change dev eth0 root {limit(gbit * share)}\n")
            pipe.flush()

        def disturb() -> None:
            with contextlib.suppress(BrokenPipeError):  # told below
                while not done.wait(chance.uniform(*QUIET_SECONDS)):
                    leave(LEFT_BY_OTHERS)
                    done.wait(chance.uniform(*BURST_SECONDS))
                    leave(1.0)

        thread = threading.Thread(target=disturb, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        if tc.wait():
            raise BenchError(f"the jitter of {namespace} ended early: tc, status {tc.returncode}")


def _address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise BenchError(f"{' '.join(command)}: {reason[0]}")
    return done.stdout


def sent_bytes(place: Place) -> int | None:
    """Bytes this place has sent so far, headers included; None on loopback."""
    if not place.prefix:
        return None
    return int(_call([*place.prefix, "cat", "/sys/class/net/eth0/statistics/tx_bytes"]))


# ------------------------------------------------------------------ what gets through


def measure(link: Link, both_ways: bool) -> list[float]:
    """Gigabits per second that TCP gets through ``link``: one way, or each of two at a time."""
    here = [sys.executable, "-m", "headstart.bench.links"]
    with linked(link, 2) as places, ExitStack() as stack:
        receivers = []
        for way in range(1 + both_ways):
            to, source = places[way], places[1 - way]
            port = free_port()
            receiver = stack.enter_context(
                subprocess.Popen(
                    [*to.prefix, *here, "--receive", f"{to.address}:{port}"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            send = [*source.prefix, *here, "--send", f"{to.address}:{port}"]
            stack.enter_context(subprocess.Popen(send))
            receivers.append(receiver)
        return [float(receiver.communicate()[0]) for receiver in receivers]


def free_port() -> int:
    """A TCP port nobody listens on; none is taken in a namespace just made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _receive(address: tuple[str, int]) -> None:
    """Print the rate of what one connection brings."""
    buffer = bytearray(1 << 20)
    with socket.create_server(address) as server:
        connection, _ = server.accept()
    with connection:
        connection.recv_into(buffer)  # what the full bucket let through at once
        begin, total = time.perf_counter(), 0
        while count := connection.recv_into(buffer):
            total += count
        seconds = time.perf_counter() - begin
    print(total * 8 / 1e9 / seconds)


def _send(address: tuple[str, int]) -> None:
    data = bytes(1 << 20)
    give_up = time.perf_counter() + 20
    while True:  # until the other side listens
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection(address)
            break
        if time.perf_counter() > give_up:
            raise BenchError(f"nobody listens on {address[0]}:{address[1]}")
        time.sleep(0.05)
    with connection:
        end = time.perf_counter() + CHECK_SECONDS
        while time.perf_counter() < end:
            connection.sendall(data)


def _socket_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(argv: list[str] | None = None) -> int:
    """What TCP gets through links, as a table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m headstart.bench.links",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("links", nargs="*", metavar="LINK")
    parser.add_argument("--receive", type=_socket_address, help=argparse.SUPPRESS)
    parser.add_argument("--send", type=_socket_address, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def work() -> int:
        if args.receive:
            _receive(args.receive)
        elif args.send:
            _send(args.send)
        else:
            rows = []
            for link in map(parse_link, args.links):
                (one,) = measure(link, both_ways=False)
                two = measure(link, both_ways=True)
                rows.append([link.name, f"{one:.3f}", " ".join(f"{rate:.3f}" for rate in two)])
            print(markdown(["link", "one way, Gbit/s", "both ways at once"], rows))
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
