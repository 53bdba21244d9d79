"""LoRA adapters by name and by folder: what may be called what, and what may be loaded from where.

Nothing here reads an adapter; the engine does.
"""

from __future__ import annotations

import os
from pathlib import Path

MAX_NAME = 128
MAX_PATH = 4096


def check_adapter_name(name: str) -> str:
    """``name``; raises ValueError, which says why, for one that no adapter may have."""
    if not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"a name has 1 to {MAX_NAME} characters, not {len(name)}")
    if not name.isprintable():
        raise ValueError("a name has printable characters only")
    return name


def find_adapter(root: Path, path: str) -> str:
    """The folder that ``path``, absolute or relative to ``root``, stands for, links resolved.

    Raises ValueError, which says why, for what is no folder, and for what is, or holds a file,
    outside ``root``.
    """
    if "://" in path:
        raise ValueError("nothing is fetched; put the adapter into the folder of --lora-dir")
    if not 1 <= len(path) <= MAX_PATH or "\0" in path:
        raise ValueError(f"a path has 1 to {MAX_PATH} characters, none of them NUL")
    inside = os.path.realpath(root)
    folder = os.path.realpath(os.path.join(inside, path))
    # Before anything is said of what there is: that is nobody's business outside.
    _require_inside(folder, inside)
    try:
        folder.encode()
        for name in os.listdir(folder):
            _require_inside(os.path.realpath(os.path.join(folder, name)), inside)
    except OSError as error:
        raise ValueError(f"{error.strerror}, in the folder of --lora-dir") from error
    except UnicodeEncodeError:
        raise ValueError("the folder's name is not UTF-8") from None
    return folder


def _require_inside(path: str, root: str) -> None:
    if not Path(path).is_relative_to(root):
        raise ValueError("this is, or leads, outside of the folder of --lora-dir")
