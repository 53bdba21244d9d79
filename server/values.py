"""What the values of flags may be; argparse calls these, and prints what they raise."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import urlsplit

from headstart.engine.errors import ConfigError
from headstart.server.api.adapter_names import check_adapter_name

UNITS = {"": 1} | {
    prefix + suffix: base ** (i + 1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
    for i, prefix in enumerate("kmgt")
}


def positive(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive_or_env(text: str) -> int | None:
    """A whole number above 0, or None for ``env``."""
    return None if text == "env" else positive(text)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def seconds_or_never(text: str) -> float:
    """A time, or 0 for never."""
    return 0.0 if text == "0" else seconds(text)


def count(text: str) -> int:
    """A whole number, 0 included."""
    return 0 if text == "0" else positive(text)


def port_number(text: str) -> int:
    """A TCP port."""
    if not (text.isascii() and text.isdigit() and int(text[:6]) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; ports are 0 to 65535")
    return int(text)


def host_port(text: str) -> str:
    """``HOST:PORT``."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port_number(port)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def byte_size(text: str) -> int:
    """``2GiB``, ``500MB``, ``1.5G`` (binary), or bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower())
    unit = UNITS.get(match[2]) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GiB or 500MB")
    return size


def host_name(text: str) -> str:
    """A name or an address, without a port, or ``*``."""
    if not re.fullmatch(
        r"\*|[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?", text
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no host such as llm.example.com or 192.168.1.5, without a port"
        )
    return text


def origin(text: str) -> str:
    """``SCHEME://HOST[:PORT]`` as browsers send it, or ``*``."""
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[!-.0-~]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin such as https://chat.example.com")
    return text


def traces_url(text: str) -> str:
    """Where a collector takes traces: ``http://HOST[:PORT]``, with OTLP's own path unless it has
    one."""
    try:
        url = urlsplit(text)
        right = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        right = False
    if not right or not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no collector such as http://localhost:4318 (OTLP over HTTP)"
        )
    return text if urlsplit(text).path.strip("/") else f"{text.rstrip('/')}/v1/traces"


def text_of(flag: str, path: Path) -> str:
    """A file that ``flag`` names, without a byte-order mark; raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag}: {error}") from error


def existing_folder(text: str) -> Path:
    """A folder that exists; links stay as they are."""
    path = Path(text).expanduser()
    try:
        text.encode()
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if not is_folder:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return path.absolute()


def named_folder(text: str) -> tuple[str, Path]:
    """``NAME=PATH``, where PATH is a folder."""
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    try:
        check_adapter_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return name, existing_folder(path)
