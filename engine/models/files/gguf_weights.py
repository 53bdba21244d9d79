"""The tensors of a GGUF file as float32 under Hugging Face's names, each made when it is taken.

    weights = GGUFWeights(GGUFFile(path), config)
    q = weights.take("model.layers.0.self_attn.q_proj.weight", (576, 576))
    write_safetensors(weights, target)          # the whole of it for other programs

The gguf package dequantises them; nothing is kept. Rows of q and k come in Hugging Face's order:
llama.cpp interleaves the two halves of each head in files of architecture llama.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from gguf import dequantize

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.gguf import TensorEntry, tensor_entries
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.weights import (
    GGUF_LINK,
    SINGLE_FILE,
    TensorFile,
    check_shape,
    row_runs,
)
from headstart.engine.process.cores import usable_cores


class GGUFWeights:
    """As ``Weights`` of safetensors. Raises ModelError naming a tensor that is missing, extra,
    misshapen or of an unsupported type, and, when it is taken, one that is not finite.
    """

    @classmethod
    def linked(cls, folder: Path, config: ModelConfig) -> GGUFWeights:
        """Those of the file that ``folder`` has a GGUF_LINK to."""
        return cls(GGUFFile(folder / GGUF_LINK), config)

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file = file
        self._entries = {entry.hf_name: entry for entry in tensor_entries(file, config)}

    @overload
    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...
    @overload
    def take(self, name: str, shape: tuple[int, ...], optional: Literal[False]) -> torch.Tensor: ...
    @overload
    def take(self, name: str, shape: tuple[int, ...], optional: bool) -> torch.Tensor | None: ...

    def take(
        self, name: str, shape: tuple[int, ...], optional: bool = False
    ) -> torch.Tensor | None:
        entry = self._entries.get(name)
        if entry is None:
            if optional:
                return None
            raise ModelError(f"tensor {name} is missing from {self._file.path}")
        check_shape(name, self._file.path, entry.info.shape, shape)
        if len(shape) == 1:
            return torch.from_numpy(_dequantised(self._file, entry, slice(None))[0])
        whole = np.empty(shape, np.float32)

        def fill(part: slice) -> None:
            whole[part] = _dequantised(self._file, entry, part)

        with ThreadPoolExecutor(usable_cores()) as threads:
            for _ in threads.map(fill, row_runs((shape[0], shape[1]))):
                pass
        return torch.from_numpy(whole)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """The same of a matrix, in runs of rows; those that come next are made beside its use."""
        entry = self._entries[name]
        check_shape(name, self._file.path, entry.info.shape, shape)
        parts = row_runs(shape)
        with ThreadPoolExecutor(usable_cores()) as threads:
            made = deque[Future[npt.NDArray[np.float32]]]()
            for i in range(len(parts)):
                for part in parts[i + len(made) : i + usable_cores() + 1]:
                    made.append(threads.submit(_dequantised, self._file, entry, part))
                yield torch.from_numpy(made.popleft().result())

    def names(self) -> list[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].info.shape

    def finish(self) -> None:
        """Extra tensors are refused from the first."""


def huggingface_folder(folder: Path) -> Path:
    """The converted model ``folder`` as other programs read it.

    Where its weights are in a GGUF file that is a copy with float32 safetensors, in the folder
    "float" of the same cache; it is made unless it is there.
    """
    if not (folder / GGUF_LINK).is_symlink():
        return folder
    target = folder.parent.parent / "float" / folder.name
    if target.exists() and target.stat().st_mtime >= folder.stat().st_mtime:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as partial:
        made = Path(partial) / "model"
        shutil.copytree(folder, made, ignore=shutil.ignore_patterns("int8", GGUF_LINK))
        weights = GGUFWeights.linked(folder, ModelConfig.from_folder(folder))
        write_safetensors(weights, made / SINGLE_FILE)
        os.utime(made)
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was quicker
            made.rename(target)
    return target


def write_safetensors(weights: GGUFWeights, target: Path) -> None:
    """All of them as float32 in the safetensors file ``target``, a few rows in memory at a time."""
    specs = [(name, "F32", weights.shape(name)) for name in weights.names()]
    file = TensorFile(target, specs)
    for name, _, shape in specs:
        if len(shape) == 1:
            parts: Iterable[torch.Tensor] = [weights.take(name, shape)]
        else:
            parts = weights.rows(name, (shape[0], shape[1]))
        for part in parts:
            file.write(name, part.numpy().data)
    file.close()


def _dequantised(file: GGUFFile, entry: TensorEntry, part: slice) -> npt.NDArray[np.float32]:
    """Rows ``part`` of the tensor, in Hugging Face's order."""
    info = entry.info
    stored = file.rows(info)
    order: npt.NDArray[np.int64] | None = None
    if entry.heads is not None:
        half = info.shape[0] // entry.heads // 2
        order = np.arange(info.shape[0]).reshape(entry.heads, half, 2).swapaxes(1, 2).reshape(-1)
    # A bias is one row of one block size: its values are put in order after dequantising.
    raw = stored[part] if order is None or len(info.shape) == 1 else stored[order[part]]
    with np.errstate(all="ignore"):  # random bytes make infinite scales; checked below
        values = np.asarray(dequantize(np.ascontiguousarray(raw), info.type), np.float32)
    if order is not None and len(info.shape) == 1:
        values = values[:, order]
    if not np.isfinite(values).all():
        raise ModelError(f"{file.path}: tensor {info.name} holds values that are not finite")
    return np.require(values, requirements=("C", "W"))  # of float32 it is the file itself
