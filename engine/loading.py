"""load_model: from the settings of a process to a model with its KV memory, ready to run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headstart.engine.adapters import Adapters
from headstart.engine.config import EngineConfig
from headstart.engine.cores import usable_cores
from headstart.engine.errors import ConfigError
from headstart.engine.measurements import KeptChoices
from headstart.engine.memory import plan_memory
from headstart.engine.model_runner import (
    ModelRunner,
    attention_shape,
    load_decoder,
    measured_activations,
)
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.quantize import read_quality, read_smoothing
from headstart.kernels.backend import (
    WEIGHT_FORMATS,
    Backend,
    gpu_is_there,
    instruction_sets,
    load_backend,
)

logger = logging.getLogger(__name__)

INT8_TOLERANCE = 1.01
"""int8 is chosen by "auto" while its perplexity is at most this many times that of bf16."""


def choose_weights(asked: str, backend: str, isa: str, folder: Path) -> str:
    """The weight format: as asked, or the fastest one this machine and model allow."""
    if asked != "auto":
        if asked not in WEIGHT_FORMATS:
            raise ConfigError(f"--weights must be auto, {', '.join(WEIGHT_FORMATS)}; got {asked}")
        return asked
    if backend == "gpu":
        return "bf16" if gpu_is_there() else "f32"  # the interpreter has no bf16
    if backend == "reference" or isa not in ("avx512_bf16", "avx512_vnni"):
        return "f32"
    quality = read_quality(folder)
    if quality is None:
        reason = "the model has no int8 weights"
    elif quality["int8"] <= quality["bf16"] * INT8_TOLERANCE:
        return "int8"
    else:
        reason = f"int8 perplexity is {quality['int8']:.3f}, bf16 {quality['bf16']:.3f}"
    logger.info("weights: not int8, because %s", reason)
    return "bf16" if isa == "avx512_bf16" else "f32"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """``weights``: their format. ``device``: what computes, for people."""

    folder: Path
    config: ModelConfig
    backend: Backend
    runner: ModelRunner
    weights: str
    device: str
    threads: int
    max_model_len: int

    def adapters(self, most: int) -> Adapters:
        """A place for LoRA adapters of this model."""
        int8 = self.weights == "int8"
        smoothing = cache(lambda: read_smoothing(self.config, self.folder) if int8 else None)
        return Adapters(self.config, self.backend, smoothing, most)


def load_model(config: EngineConfig) -> LoadedModel:
    """Load the model and allocate its KV pool. Raises ConfigError and ModelError."""
    folder = Path(config.model_path)
    model = ModelConfig.from_folder(folder)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's "
            f"{model.max_position_embeddings} tokens"
        )
    if model.context_limit:
        logger.info("%s", model.context_limit)
    # The processes of a chain compute at the same time, each with its share.
    threads = config.threads or max(usable_cores() // config.runahead, 1)
    name = config.backend
    if name == "auto":
        name = "gpu" if gpu_is_there() else "cpu"
    isa = instruction_sets()[0] if config.isa == "auto" else config.isa
    weights = choose_weights(config.weights, name, isa, folder)
    try:
        backend = load_backend(
            name,
            isa=isa,
            weights=weights,
            threads=threads,
            kv_format=config.kv_format,
            choices=KeptChoices(config.machine_folder),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    logger.info("backend %s (%s), weights %s, %d threads", name, backend.device, weights, threads)
    decoder = load_decoder(folder, model, backend, weights, max_model_len)
    rows = config.max_batched_tokens
    activations = measured_activations(decoder, backend, rows)
    plan = plan_memory(
        available=backend.free_memory(),
        weights=_weight_bytes(model, weights),
        activations=_activation_bytes(model, rows) if activations is None else activations,
        bytes_per_page=backend.kv_bytes_per_page(attention_shape(model), model.num_layers),
        page_size=backend.page_size,
        kv_memory=config.kv_memory,
        max_model_len=max_model_len,
    )
    logger.info("%s", plan)
    runner = ModelRunner(decoder, backend, plan.num_pages)
    device = f"{name} {isa}" if name == "cpu" else name
    return LoadedModel(folder, model, backend, runner, weights, device, threads, max_model_len)


def _weight_bytes(model: ModelConfig, weights: str) -> int:
    size = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}[weights]
    q_size, kv_size = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    layer = model.hidden_size * (2 * q_size + 2 * kv_size + 3 * model.intermediate_size)
    table = model.vocab_size * model.hidden_size
    return model.num_layers * layer * size + table * (size + (2 if weights != "f32" else 4))


def _activation_bytes(model: ModelConfig, rows: int) -> int:
    q_size = model.num_heads * model.head_dim
    floats = 4 * model.hidden_size + 5 * q_size + 3 * model.intermediate_size
    return rows * floats * 4 + 64 * model.vocab_size * 4
