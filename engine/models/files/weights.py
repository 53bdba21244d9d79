"""Weights of a folder of safetensors: read lazily, each tensor checked, all accounted for.

    weights = Weights.open(folder)
    q = weights.take("model.layers.0.self_attn.q_proj.weight", (576, 576))
    for rows in weights.rows("lm_head.weight", (151936, 576)): ...      # too large for one tensor
    weights.finish()        # ModelError if the file holds tensors the model did not ask for

One file (model.safetensors) or shards with model.safetensors.index.json. Tensors are views of the
mapped file until they are changed or copied. ``TensorFile`` writes such a file piece by piece.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from safetensors import SafetensorError, safe_open

from headstart.engine.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GGUF_LINK = "model.gguf"
"""In a converted folder: the file that its weights are read from (gguf_weights.py)."""
FLOATS = ("F32", "F16", "BF16")
HARMLESS_SUFFIX = "rotary_emb.inv_freq"
"""Rotary frequencies, which old checkpoints store and the engine computes."""
MAX_NAMED = 5
"""Tensors listed in one error; the rest are counted."""
CHUNK_ELEMENTS = 1 << 22
"""Elements of a large matrix that are read at a time: 16 MB of float32."""
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4}


class Weights:
    """The tensors of ``source``, a folder or a file, handed out once each by ``take``."""

    def __init__(
        self, source: Path, files: dict[Path, Any], dtypes: tuple[str, ...] = FLOATS
    ) -> None:
        self._source = source
        self._dtypes = dtypes
        self._owner: dict[str, tuple[Path, Any]] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                if name in self._owner:
                    raise ModelError(
                        f"tensor {name} is in both {self._owner[name][0]} and {path.name}"
                    )
                self._owner[name] = (path, file)
        self._taken: set[str] = set()

    @classmethod
    def open(cls, folder: Path, dtypes: tuple[str, ...] = FLOATS) -> Weights:
        """Open the weights of ``folder``; the headers are checked, tensors are not read yet.

        ``dtypes``: those ``take`` accepts, by their safetensors names.
        Raises ModelError naming the file that is missing, truncated or not safetensors.
        """
        files = {path: _open_file(path) for path in weight_files(folder)}
        return cls(folder, files, dtypes)

    @classmethod
    def open_file(cls, path: Path, dtypes: tuple[str, ...] = FLOATS) -> Weights:
        """The same of one safetensors file, whatever its name."""
        return cls(path, {path: _open_file(path)}, dtypes)

    @overload
    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...
    @overload
    def take(self, name: str, shape: tuple[int, ...], optional: Literal[False]) -> torch.Tensor: ...
    @overload
    def take(self, name: str, shape: tuple[int, ...], optional: bool) -> torch.Tensor | None: ...

    def take(
        self, name: str, shape: tuple[int, ...], optional: bool = False
    ) -> torch.Tensor | None:
        """The tensor ``name`` as stored (float32, bfloat16 or float16), of exactly ``shape``.

        None if it is absent and ``optional``. Raises ModelError naming the tensor if it is
        missing, of another shape, of another dtype, or unreadable.
        """
        if name not in self._owner:
            if optional:
                return None
            raise ModelError(f"tensor {name} is missing from {self._source}")
        with self._reading(name, shape) as (file, _):
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """The same of a matrix, in runs of rows (``row_runs``)."""
        if name not in self._owner:
            raise ModelError(f"tensor {name} is missing from {self._source}")
        for part in row_runs(shape):
            with self._reading(name, shape) as (_, view):
                rows: torch.Tensor = view[part]
            yield rows

    @contextmanager
    def _reading(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
        """The file that holds ``name`` and the tensor there, checked."""
        path, file = self._owner[name]
        try:
            view = file.get_slice(name)
            stored, dtype = tuple(view.get_shape()), view.get_dtype()
            check_shape(name, path, stored, shape)
            _check_dtype(name, path, dtype, self._dtypes)
            yield file, view
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: tensor {name} cannot be read: {_line(error)}") from error
        self._taken.add(name)

    def names(self) -> list[str]:
        """Every tensor in the files, taken or not."""
        return sorted(self._owner)

    def finish(self) -> None:
        """Raise ModelError naming tensors nobody took: they would have changed the result.

        Not named: HARMLESS_SUFFIX, and ``lm_head.weight``, which only a model with tied
        embeddings leaves, where it is a copy.
        """
        extra = [
            name
            for name in sorted(set(self._owner) - self._taken)
            if not name.endswith(HARMLESS_SUFFIX) and name != "lm_head.weight"
        ]
        if extra:
            more = f" and {len(extra) - MAX_NAMED} more" if len(extra) > MAX_NAMED else ""
            raise ModelError(
                f"{self._source}: holds tensors this architecture does not use: "
                f"{', '.join(extra[:MAX_NAMED])}{more}"
            )


class TensorFile:
    """Writes the safetensors file ``path``, in pieces that may come in any order of tensors.

    ``specs``: name, dtype (safetensors' name of it) and shape of each, in the file's order. The
    data begins at a multiple of 64 bytes, and so does every tensor behind others that are multiples
    of 64 bytes long: what computes may then read it where it is mapped.
    """

    def __init__(self, path: Path, specs: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begin: dict[str, int] = {}
        total = 0
        for name, dtype, shape in specs:
            end = total + math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [total, end]}
            self._begin[name] = total
            total = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        self._data = 8 + len(text)
        self._written = dict.fromkeys(self._begin, 0)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + total)

    def write(self, name: str, data: memoryview) -> None:
        """The next bytes of ``name``."""
        self._file.seek(self._data + self._begin[name] + self._written[name])
        self._file.write(data)
        self._written[name] += data.nbytes

    def close(self) -> None:
        self._file.close()


def check_shape(name: str, path: Path, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise ModelError unless the tensor is stored in the ``shape`` that is asked for."""
    if stored != shape:
        raise ModelError(
            f"tensor {name} in {path} has shape {_show(stored)}, the config asks for {_show(shape)}"
        )


def row_runs(shape: tuple[int, int], elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """A matrix of this shape in runs of about so many elements, of whole panels of rows."""
    from headstart.kernels.packing import PANEL  # torch: who links files only does without

    step = max(1, elements // shape[1] // PANEL) * PANEL
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, in order. Raises ModelError if there are none."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if not index.exists():
        raise ModelError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except OSError as error:
        raise ModelError(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index") from error
    for name in names:
        # A shard is a file of this folder: an index must not point anywhere else.
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not the name of a shard")
    if not names:
        raise ModelError(f"{index}: names no shards")
    return [folder / name for name in sorted(names)]


def check_headers(folder: Path) -> None:
    """Raise ModelError for what ``Weights`` would refuse whatever the model; loads no torch."""
    for path in weight_files(folder):
        file = _open_file(path, framework="np")
        for name in file.keys():  # noqa: SIM118
            _check_dtype(name, path, file.get_slice(name).get_dtype(), FLOATS)


def _check_dtype(name: str, path: Path, dtype: str, supported: tuple[str, ...]) -> None:
    if dtype not in supported and not name.endswith(HARMLESS_SUFFIX):
        raise ModelError(
            f"tensor {name} in {path} is stored as {dtype}; supported are {', '.join(supported)}"
        )


def _open_file(path: Path, framework: str = "pt") -> Any:
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: truncated or not a safetensors file: {_line(error)}") from error


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _show(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
