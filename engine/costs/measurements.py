"""What was measured on a machine and is kept on disk: one JSON file per kind and circumstances.

``about`` says all that the figures depend on. Its hash names the file, so that measurements of
other circumstances lie side by side, and the file repeats it. Files may be lost, cut off or come
from elsewhere: what cannot be read is measured anew, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from headstart import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


class _Kept(msgspec.Struct):
    about: dict[str, Any]
    measured: msgspec.Raw


def load_kept(folder: Path | None, kind: str, about: dict[str, Any], of: type[T]) -> T | None:
    """What ``keep`` wrote for the same kind and circumstances; None if there is nothing."""
    if folder is None:
        return None
    path = _path(folder, kind, about)
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        measured = msgspec.json.decode(kept.measured, type=of)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        logger.warning("%s: %s is not readable (%s); measured anew", kind, path, error)
        return None
    if kept.about != about:
        return None
    logger.info("%s: from %s", kind, path)
    return measured


def keep(folder: Path | None, kind: str, about: dict[str, Any], measured: msgspec.Struct) -> None:
    """Write it whole or not at all. Where it cannot be written, only a warning says so."""
    if folder is None:
        return
    path = _path(folder, kind, about)
    partial = path.with_suffix(f".{os.getpid()}")
    kept = _Kept(about, msgspec.Raw(msgspec.json.encode(measured)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.encode(kept) + b"\n")
        partial.replace(path)
    except OSError as error:
        logger.warning("%s: not kept in %s (%s)", kind, path, error)
        with contextlib.suppress(OSError):
            partial.unlink()


def _path(folder: Path, kind: str, about: dict[str, Any]) -> Path:
    name = hashlib.sha256(msgspec.json.encode(about, order="sorted")).hexdigest()[:16]
    return folder / f"{kind}-{name}.json"


class _Choices(msgspec.Struct):
    chosen: dict[str, dict[str, int]]


class KeptChoices:
    """Which configuration of each kernel was the fastest on a device (KernelChoices)."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self, device: str) -> dict[str, dict[str, int]]:
        kept = load_kept(self._folder, "kernels", self._about(device), _Choices)
        return {} if kept is None else kept.chosen

    def keep(self, device: str, chosen: dict[str, dict[str, int]]) -> None:
        keep(self._folder, "kernels", self._about(device), _Choices(chosen))

    @staticmethod
    def _about(device: str) -> dict[str, Any]:
        return {"version": __version__, "device": device}
