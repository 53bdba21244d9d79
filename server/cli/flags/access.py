"""Who may ask, from where, and whether it is encrypted."""

from __future__ import annotations

import argparse
from pathlib import Path

from headstart.engine.errors import ConfigError
from headstart.server.cli.values import host_name, origin
from headstart.server.http.keys import Keys, read_keys
from headstart.server.http.tls import Certificate

API_KEY_VARIABLE = "HEADSTART_API_KEY"
ADMIN_KEY_VARIABLE = "HEADSTART_ADMIN_KEY"


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access: keys, origins, TLS")
    for kind, variable, use in (
        ("api", API_KEY_VARIABLE, "everything but /health needs one"),
        ("admin", ADMIN_KEY_VARIABLE, "/metrics and loading adapters need one"),
    ):
        group.add_argument(
            f"--{kind}-key",
            nargs="+",
            action="extend",
            metavar="KEY",
            help=f"{use}; others on this machine can see them here, unlike those in a file or in "
            f"the environment's {variable} (with commas between)",
            default=argparse.SUPPRESS,
        )
        group.add_argument(
            f"--{kind}-key-file",
            type=Path,
            metavar="FILE",
            help="more of them, one a line; lines that begin with # are comments",
            default=argparse.SUPPRESS,
        )
    group.add_argument(
        "--shared-cache",
        action="store_true",
        help="with several keys: all share one KV cache, so that each can find out by the time an "
        "answer takes whether another has sent a prompt",
    )
    group.add_argument(
        "--allowed-hosts",
        type=host_name,
        nargs="+",
        action="extend",
        metavar="HOST",
        help="without keys: names and addresses, beside localhost and its own, that the server is "
        "asked under (the header Host), * for all",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--allowed-origins",
        type=origin,
        nargs="+",
        action="extend",
        metavar="ORIGIN",
        help="web pages that may ask from a browser (CORS), * for all (default: none but, without "
        "keys, those of the server's own address)",
        default=argparse.SUPPRESS,
    )
    for flag, use in (
        ("--ssl-certfile", "certificate, and those in between, in PEM: HTTPS instead of HTTP"),
        ("--ssl-keyfile", "its private key in PEM"),
        ("--ssl-keyfile-password-file", "the password of the private key"),
    ):
        group.add_argument(flag, type=Path, metavar="FILE", help=use, default=argparse.SUPPRESS)


def access_keys(args: argparse.Namespace) -> Keys:
    """What ``--api-key``, ``--admin-key``, their files and variables name; raises ConfigError."""
    return Keys.of(
        api=_keys(args, "api", API_KEY_VARIABLE), admin=_keys(args, "admin", ADMIN_KEY_VARIABLE)
    )


def _keys(args: argparse.Namespace, kind: str, variable: str) -> list[str]:
    given = getattr(args, f"{kind}_key", [])
    return read_keys(f"--{kind}-key", given, getattr(args, f"{kind}_key_file", None), variable)


def certificate(args: argparse.Namespace) -> Certificate | None:
    """What ``--ssl-*`` name; raises ConfigError."""
    certfile, keyfile, password_file = (
        getattr(args, name, None)
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password_file")
    )
    if certfile is None and keyfile is None and password_file is None:
        return None
    if certfile is None or keyfile is None:
        raise ConfigError("TLS needs both --ssl-certfile and --ssl-keyfile")
    try:
        password = "" if password_file is None else password_file.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ssl-keyfile-password-file: {error}") from error
    return Certificate(certfile, keyfile, password)
