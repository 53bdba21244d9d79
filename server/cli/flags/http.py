"""Where the server listens, what it logs, and how long it waits."""

from __future__ import annotations

import argparse

from headstart.server.cli.values import port_number, positive, seconds, seconds_or_never
from headstart.server.settings import ServerSettings


def add_http_flags(parser: argparse.ArgumentParser) -> None:
    limits = ServerSettings()
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on")
    http.add_argument("--port", type=port_number, default=8000, help="0 picks a free one")
    http.add_argument(
        "--shutdown-timeout",
        type=positive,
        default=30,
        metavar="SECONDS",
        help="how long running requests may take to end after SIGTERM",
    )
    http.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least to log",
    )
    http.add_argument(
        "--access-log-format",
        choices=("text", "json"),
        default=limits.access_log_format,
        help="of the line that each request gets; json: an object",
    )
    http.add_argument(
        "--unknown-fields",
        choices=("ignore", "refuse"),
        default=limits.unknown_fields,
        help="fields of a request that no API knows: ignored, and named in x-headstart-ignored, or "
        "refused with a 400 (%(default)s)",
    )
    http.add_argument(
        "--keep-alive-timeout",
        type=positive,
        default=5,
        metavar="SECONDS",
        help="how long a connection without a request stays open",
    )
    http.add_argument(
        "--head-timeout",
        type=seconds,
        default=20.0,
        metavar="SECONDS",
        help="how long a connection may take to send the head of a request, before it is closed",
    )
    http.add_argument(
        "--body-timeout",
        type=seconds,
        default=limits.body_timeout,
        metavar="SECONDS",
        help="how long a request may take to send its body",
    )
    http.add_argument(
        "--request-timeout",
        type=seconds,
        metavar="SECONDS",
        help="the most that an answer may take, from the first byte of its request, and that "
        "requests may ask for (default: no limit)",
        default=argparse.SUPPRESS,
    )
    http.add_argument(
        "--ping-interval",
        type=seconds_or_never,
        default=limits.ping_interval,
        metavar="SECONDS",
        help="the longest silence of a streamed answer, before it is filled with a comment that "
        "says nothing; 0: never (%(default)g)",
    )
