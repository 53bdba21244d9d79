"""What a rank has to tell of itself: its identity, by which it is known to compute the same KV."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from headstart import __version__
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.weights import weight_files
from headstart.engine.models.formats import int8
from headstart.engine.models.loading import LoadedModel
from headstart.engine.runahead.messages import Identity

VERSION = 1
"""Of what cuts depend on."""
_SAMPLE_BYTES = 4096
NOT_OF_KV = ("eos_token_ids", "bos_token_id", "context_limit", "segment_mask")
"""What a ModelConfig says of prompts and answers only."""


def weights_digest(folder: Path, weights: str) -> str:
    """Of the names and shapes of the tensors read for the format ``weights``, and of samples of
    each one's values: its beginning, middle and end."""
    if weights == "int8":
        quantized = folder / int8.FOLDER
        files = [*weight_files(quantized), quantized / int8.SMOOTHING]
    else:
        files = weight_files(folder)
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        if path.exists():  # smoothing factors may be missing where no adapter needs them
            with path.open("rb") as file:
                _add_samples(digest, file)
    return digest.hexdigest()


def _add_samples(digest: hashlib.blake2b, file: BinaryIO) -> None:
    size = int.from_bytes(file.read(8), "little")
    tensors = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
        first, end = (8 + size + offset for offset in tensor["data_offsets"])
        last = max(end - _SAMPLE_BYTES, first)
        for start in sorted({first, (first + last) // 2, last}):
            file.seek(start)
            digest.update(file.read(min(_SAMPLE_BYTES, end - start)))


def kv_settings(config: ModelConfig) -> dict[str, str]:
    """What KV depends on of a model's config, as text by name."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_OF_KV}
    rope = values.pop("rope")
    rope |= rope.pop("parameters")
    values |= {f"rope_{name}": value for name, value in rope.items()}
    return {name: str(value) for name, value in values.items()}


def identity(loaded: LoadedModel) -> Identity:
    """Of this process's model and KV memory."""
    backend = loaded.backend
    return Identity(
        version=__version__,
        model=weights_digest(loaded.folder, loaded.weights),
        weights=loaded.weights,
        page_size=backend.page_size,
        kv_layout=backend.kv_layout(loaded.runner.decoder.shape),
        # The table of rotations is so long, and longrope chooses its factors by that.
        max_model_len=loaded.max_model_len,
        settings=kv_settings(loaded.config),
    )


def about_prefill(loaded: LoadedModel, own: Identity) -> dict[str, Any]:
    """What the times of prefill depend on."""
    return {
        "version": VERSION,
        "device": loaded.backend.device,
        "model": own.model,
        "weights": own.weights,
        "page_size": own.page_size,
    }
