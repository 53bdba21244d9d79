"""What a rank has to tell of itself: its identity, and how fast it computes chunks of prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from array import array
from pathlib import Path
from typing import Any, BinaryIO

from headstart import __version__
from headstart.engine.batch import build_batch
from headstart.engine.costs.measurements import keep, load_kept
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.weights import weight_files
from headstart.engine.models.formats import int8
from headstart.engine.models.loading import LoadedModel
from headstart.engine.models.runner import ModelRunner
from headstart.engine.runahead.messages import Identity
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the measurement: raise it when kernels change enough that old figures mislead."""
MEASURE_SECONDS = 3.0
"""The measurement takes about this long at most, however large the model is."""
CHUNK = 512
LONG = 4096
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


def rank_costs(loaded: LoadedModel, own: Identity, folder: Path | None) -> PrefillCosts:
    """What chunks cost here: as kept in ``folder``, or measured now and kept there."""
    about = about_prefill(loaded, own)
    costs = load_kept(folder, "prefill", about, PrefillCosts)
    if costs is None:
        begin = time.perf_counter()
        costs = measure_rank(loaded.runner)
        keep(folder, "prefill", about, costs)
        logger.info("prefill costs: measured in %.2f s", time.perf_counter() - begin)
    return costs


def about_prefill(loaded: LoadedModel, own: Identity) -> dict[str, Any]:
    """What the times of prefill depend on."""
    return {
        "version": VERSION,
        "device": loaded.backend.device,
        "model": own.model,
        "weights": own.weights,
        "page_size": own.page_size,
    }


def measure_rank(runner: ModelRunner) -> PrefillCosts:
    """Compute chunks at the beginning and far into a prompt; overwrites the first KV pages."""
    page_size = runner.backend.page_size
    room = min(runner.num_pages * page_size, runner.decoder.max_len)
    some = max(min(CHUNK // 4, room // 4) // page_size * page_size, page_size)
    most = min(CHUNK, room // 2 // page_size * page_size)
    _seconds(runner, 0, some)
    first = _seconds(runner, 0, some)
    samples = [(0, some, first)]
    if most > some and first * most / some * 4 < MEASURE_SECONDS:
        samples.append((0, most, min(_seconds(runner, 0, most) for _ in range(2))))
    chunk = samples[-1][1]
    far = (min(LONG, room) - chunk) // page_size * page_size
    if far > 0:
        samples.append((far, chunk, min(_seconds(runner, far, chunk) for _ in range(2))))
    return PrefillCosts.fit(samples)


def _seconds(runner: ModelRunner, start: int, num_tokens: int) -> float:
    """Time of a chunk; the tokens before it are those of the first chunk over and over."""
    page_size = runner.backend.page_size
    count = -(-num_tokens // page_size)
    before = [page % count for page in range(start // page_size)]
    tokens = array("i", bytes(4 * (start + num_tokens)))
    seq = Sequence(0, tokens, len(tokens), SamplingParams(max_tokens=1))
    seq.pages = [*before, *range(count)]
    batch = build_batch([ScheduledSequence(seq, start, num_tokens, True)], page_size)
    runner.backend.synchronize()
    begin = time.perf_counter()
    runner.run(batch)
    runner.backend.synchronize()
    return time.perf_counter() - begin
