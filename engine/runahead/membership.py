"""Membership: which prefill ranks there are, and which of them take part.

    Away ── Hello, now and then ─▶ Welcome ── it is gone, hangs, refuses ─▶ Away, for a while

A local rank is a process that is started here, and again when it has ended. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.process.cores import kernel_environment
from headstart.engine.runahead import control
from headstart.engine.runahead.messages import (
    FromRank,
    Hello,
    Identity,
    Refused,
    ToRank,
    Welcome,
)
from headstart.engine.runahead.rank import RankConfig

logger = logging.getLogger(__name__)

GREETING_SECONDS = 0.25
"""Between two greetings of a rank that does not answer."""
OUT_SECONDS = 5.0
"""For how long a rank that hung, or handed on nothing, is left out."""
RESPAWN_SECONDS = 1.0
"""Between two starts of a local rank."""
NEWS, MOST_PACE, LEAST_CHUNK = 0.4, 8.0, 64
"""How much the latest prompt changes what is known of a rank's pace, how far that may go, and how
many tokens a chunk must have to tell."""


def mixed(pace: float, seconds: float, measured: PrefillCosts, start: int, end: int) -> float:
    """A rank's pace after it took ``seconds`` for tokens ``[start, end)``: ranks that share cores,
    or have other work, are slower than when they were measured. Short chunks tell nothing."""
    if end - start < LEAST_CHUNK:
        return pace
    latest = seconds / max(measured.seconds(start, end - start), 1e-9)
    return pace + NEWS * (min(max(latest, 1 / MOST_PACE), MOST_PACE) - pace)


class Away(NamedTuple):
    """A rank does not answer, or is left out: it is greeted from ``greet_at`` on."""

    greet_at: float
    reason: str


class Local:
    """A rank of this machine: its process."""

    def __init__(self, config: RankConfig) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._config = config
        self._start_at = -math.inf

    def supervise(self, now: float) -> int | None:
        """Start it if it does not run; its exit status, if it has ended since the last call."""
        status = None if self.process is None else self.process.poll()
        if status is not None:
            self.process = None
        if self.process is None and now >= self._start_at:
            self._start_at = now + RESPAWN_SECONDS
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headstart.engine.runahead.rank"],
                stdin=subprocess.PIPE,
                env=kernel_environment(),
            )
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended already: its exit status says more
                self.process.stdin.write(msgspec.json.encode(self._config) + b"\n")
                self.process.stdin.flush()
        return status


@dataclass(slots=True, eq=False)
class Member:
    """A prefill rank.

    state:  what it answered, while it takes part
    pace:   seconds that a chunk takes, for each that was measured when it started
    said:   why it cannot take part, which is logged once
    """

    name: str
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    local: Local | None
    state: Welcome | Away
    pace: float = 1.0
    said: str = ""

    @property
    def there(self) -> bool:
        return isinstance(self.state, Welcome)

    @property
    def welcome(self) -> Welcome:
        """Of one that is there."""
        assert isinstance(self.state, Welcome)
        return self.state

    def send(self, message: ToRank) -> None:
        with contextlib.suppress(zmq.Again):  # nobody is connected: it is greeted when it is back
            self.socket.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)

    def refuse(self, reason: str) -> None:
        """It will not do, as it is."""
        if self.said != reason:
            self.said = reason
            logger.error("runahead: %s cannot take part: %s", self.name, reason)


class Membership:
    """The ranks in the order of the chain. ``left_out``: how often one was. ``folder``: the
    engine's private one, which ranks of its machine can read."""

    def __init__(self, secret: str, identity: Identity, timeout: float) -> None:
        self.ranks: list[Member] = []
        self.left_out = 0
        self.folder = Path(tempfile.mkdtemp(prefix="headstart-"))  # for this user alone
        token = secrets.token_hex(16)
        (self.folder / "token").write_text(token)
        self._hello = Hello(secrets.randbits(62), identity, str(self.folder), token)
        self._secret = secret
        self._timeout = timeout
        self._context = zmq.Context()
        self._decoder = msgspec.msgpack.Decoder(FromRank)

    def __str__(self) -> str:
        """Which ranks are missing, and why; empty if none is."""
        missing = [rank for rank in self.ranks if not rank.there]
        return ", ".join(f"{rank.name} {rank.said or 'does not answer'}" for rank in missing)

    def add(self, address: str, local: RankConfig | None = None) -> None:
        """The next rank of the chain. Raises ConfigError."""
        socket = control.connect(self._context, address, self._secret, self._timeout)
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        monitor = socket.get_monitor_socket(events)
        name = f"rank {len(self.ranks)} ({'local' if local else address})"
        process = None if local is None else Local(local)
        away = Away(-math.inf, "it was never there")
        self.ranks.append(Member(name, socket, monitor, process, away))

    @property
    def there(self) -> list[Member]:
        return [rank for rank in self.ranks if rank.there]

    def poll(self, now: float) -> list[tuple[Member, FromRank]]:
        """Start, hear and greet the ranks; what they say of links and jobs."""
        heard = []
        for rank in self.ranks:
            status = None if rank.local is None else rank.local.supervise(now)
            if status is not None:
                self.leave_out(rank, f"it ended (exit status {status})", 0.0)
            heard += self.hear(rank)
            if isinstance(rank.state, Away) and now > rank.state.greet_at:
                rank.state = rank.state._replace(greet_at=now + GREETING_SECONDS)
                rank.send(self._hello)
        return heard

    def hear(self, rank: Member) -> list[tuple[Member, FromRank]]:
        """What it has said by now of links and jobs."""
        while rank.monitor.poll(0):
            event = recv_monitor_message(rank.monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self.hang(rank, "the connection to it broke", 0.0)
            else:
                rank.refuse("it knows another secret")
        heard: list[tuple[Member, FromRank]] = []
        while True:
            try:
                message = self._decoder.decode(rank.socket.recv(zmq.DONTWAIT))
            except zmq.Again:
                return heard
            except msgspec.DecodeError as error:
                rank.refuse(f"it speaks another version ({error})")
                continue
            match message:
                case Welcome(session):
                    if session == self._hello.session and not rank.there:
                        rank.state, rank.said = message, ""
                        logger.info("runahead: %s is there", rank.name)
                case Refused(session, reason):
                    if session == self._hello.session:
                        rank.refuse(reason)
                        self.leave_out(rank, reason)
                case _:
                    heard.append((rank, message))

    def hang(self, rank: Member, reason: str, seconds: float | None = None) -> None:
        """It does not get on: it is left out, and a local one is started again."""
        self.leave_out(rank, reason, seconds)
        if rank.local is not None and rank.local.process is not None:
            rank.local.process.kill()

    def leave_out(self, rank: Member, reason: str, seconds: float | None = None) -> None:
        """From now on, and for ``seconds`` at least, or OUT_SECONDS."""
        was_there = rank.there
        seconds = OUT_SECONDS if seconds is None else seconds
        rank.state = Away(time.perf_counter() + seconds, reason)
        if was_there:
            self.left_out += 1
            logger.warning("runahead: %s is left out: %s", rank.name, reason)

    def close(self) -> None:
        """End the local ranks, and hear none any more."""
        local = [rank.local.process for rank in self.ranks if rank.local is not None]
        processes = [process for process in local if process is not None]
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for rank in self.ranks:
            rank.socket.disable_monitor()
            rank.monitor.close(0)
        self._context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)
