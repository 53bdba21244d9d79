"""The sockets over which messages go, encrypted, to ranks that know the secret and to no others.

CurveZMQ: a client has to know the server's public key before the first byte, and the server proves
that it has the secret one. Both keys come from the secret, and neither is ever sent, so only those
who know the secret can talk to a rank, and only to a rank that knows it.
"""

from __future__ import annotations

import hashlib
import os

import zmq
from zmq.utils import z85

from headstart.engine.errors import ConfigError

LEAST_SECRET = 16
"""Characters."""


def _secret_key(secret: str) -> bytes:
    if len(secret) < LEAST_SECRET:
        raise ConfigError(f"the secret of runahead ranks needs {LEAST_SECRET} characters or more")
    digest = hashlib.blake2b(secret.encode(), digest_size=32, person=b"headstart-rank")
    return z85.encode(digest.digest())


def endpoint(address: str) -> str:
    """``HOST:PORT`` as ZeroMQ has it; what is an endpoint already stays."""
    return address if "://" in address else f"tcp://{address}"


def require_linux() -> None:
    """Raise ConfigError where links between ranks lack what they are made of."""
    if not hasattr(os, "eventfd"):
        raise ConfigError("KV-Runahead needs Linux: leave out --runahead, --runahead-hosts")


def listen(context: zmq.Context[zmq.Socket[bytes]], address: str, secret: str) -> zmq.Socket[bytes]:
    """A rank's socket. Raises ConfigError."""
    socket = context.socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.linger = 0
    socket.curve_server = True
    socket.curve_secretkey = _secret_key(secret)
    socket.router_handover = True
    try:
        socket.bind(endpoint(address))
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"a runahead rank cannot listen on {address}: {error}") from error
    return socket


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, secret: str, timeout: float
) -> zmq.Socket[bytes]:
    """The engine's socket to one rank, which may come later, go and come back.

    Nothing is queued while it is away. ``timeout``: seconds without a sign of life after which it
    counts as gone.
    """
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.linger = 0
    socket.immediate = True
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000
    socket.heartbeat_ivl = max(int(timeout * 250), 50)
    socket.heartbeat_timeout = int(timeout * 1000)
    socket.curve_serverkey = zmq.curve_public(_secret_key(secret))
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    try:
        socket.connect(endpoint(address))
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"{address!r} is no address of a runahead rank: {error}") from error
    return socket
