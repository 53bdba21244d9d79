"""load_model: from the settings of a process to a model with its KV memory, ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
from torch import Tensor

from headstart.engine.config import PAGE_SIZE, EngineConfig
from headstart.engine.costs.measurements import KeptChoices
from headstart.engine.errors import ConfigError
from headstart.engine.kv.memory import SHORTEST_CONTEXT, MemoryPlan, plan_memory
from headstart.engine.models.adapters import Adapters
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decoder import Decoder
from headstart.engine.models.formats.choice import choose_weights
from headstart.engine.models.formats.int8 import read_smoothing
from headstart.engine.models.ranks import OneRank, Ranks
from headstart.engine.models.runner import (
    ModelRunner,
    attention_shape,
    load_decoder,
    measured_activations,
)
from headstart.engine.models.share import Share
from headstart.engine.process.cores import usable_cores
from headstart.kernels.backend import Backend
from headstart.kernels.devices import gpu_is_there, instruction_sets, load_backend

logger = logging.getLogger(__name__)

SMALL_STEP, GPU_STEP = (512, 64), (2048, 256)
"""Tokens and sequences of a step unless told otherwise. A core is busy with few rows, a GPU is not;
steps should not take so long that those who decode notice."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is decided before weights are read. ``settings``: with nothing left open.

    ``weights_reason``: why their format was chosen. ``shortest``: tokens of context that there has
    to be room for, where there is none for ``max_model_len``.
    """

    settings: EngineConfig
    weights_reason: str
    folder: Path
    model: ModelConfig
    backend: Backend
    max_model_len: int
    shortest: int
    max_batched_tokens: int
    max_running: int

    def decoder(self, share: Share, ranks: Ranks) -> Decoder:
        """The process's share of the model, its weights read."""
        weights, length = self.settings.weights, self.max_model_len
        return load_decoder(self.folder, self.model, self.backend, weights, length, share, ranks)

    def plan(self, decoder: Decoder, share: Share) -> MemoryPlan:
        """Memory of each process. Raises ConfigError where there is too little."""
        settings, model, backend = self.settings, decoder.config, self.backend
        # A step's, or those of a tile of a segment that is longer than a step.
        longest = self.max_model_len
        rows = max(self.max_batched_tokens, min(backend.tile_rows, longest))
        # Measuring computes a batch, which a share of a model cannot do alone.
        alone = share.ranks == 1
        activations = measured_activations(decoder, backend, rows) if alone else None
        if activations is None:
            activations = _activation_bytes(model, rows)
        shape = attention_shape(model)
        plan = plan_memory(
            available=backend.free_memory(),
            weights=_weight_bytes(model, settings.weights, share.ranks),
            activations=activations + _segment_bytes(model, longest),
            scratch=backend.attention_scratch(min(rows, backend.tile_rows), longest, shape),
            bytes_per_page=backend.kv_bytes_per_page(shape, model.num_layers),
            page_size=backend.page_size,
            kv_memory=settings.kv_memory,
            processes=share.ranks,
        )
        plan.require(self.shortest)
        logger.info("%s%s", plan, ", of each rank" if share.ranks > 1 else "")
        if plan.tokens < longest:
            logger.warning(
                "context: %d of the model's %d tokens, as many as the KV pool holds; "
                "--kv-memory and --kv-format change it",
                *(plan.tokens, longest),
            )
        return plan

    def smoothing(self) -> list[dict[str, Tensor]] | None:
        """What the layers' inputs are divided by, of the whole model; None: by nothing."""
        return read_smoothing(self.model, self.folder) if self.settings.weights == "int8" else None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """``config``: of the whole model. ``weights``: their format; ``weights_reason``: why it was
    chosen. ``device``: what computes, for people. ``share``: what of the model this process has."""

    folder: Path
    config: ModelConfig
    backend: Backend
    runner: ModelRunner
    weights: str
    weights_reason: str
    device: str
    threads: int
    max_model_len: int
    max_batched_tokens: int
    max_running: int
    share: Share
    smoothing: Callable[[], list[dict[str, Tensor]] | None]

    def adapters(self, most: int) -> Adapters:
        """A place for LoRA adapters of this model."""
        smoothing, announce = cache(self.smoothing), self.runner.followers.load_adapter
        return Adapters(self.config, self.backend, smoothing, most, self.share, announce)


def load_model(config: EngineConfig, shared: bool = False) -> LoadedModel:
    """Load the model and allocate its KV pool. Raises ConfigError and ModelError.

    ``shared``: whether other processes map its KV memory, as a chain of ranks does.
    With ``tensor_parallel`` the other ranks are started; ``runner.followers.close`` ends them.
    """
    setup = set_up(config, shared or config.runahead > 1 or bool(config.runahead_hosts))
    settings, backend = setup.settings, setup.backend
    share = Share(0, settings.tensor_parallel)
    logger.info(
        "backend %s (%s), weights %s%s, %d threads",
        *(settings.backend, backend.device, settings.weights),
        f" ({setup.weights_reason})" if setup.weights_reason else "",
        settings.threads,
    )
    if share.ranks > 1:
        runner = _lead(setup, share)
    else:
        decoder = setup.decoder(share, OneRank())
        runner = ModelRunner(decoder, backend, setup.plan(decoder, share).num_pages)
    return LoadedModel(
        folder=setup.folder,
        config=setup.model,
        backend=backend,
        runner=runner,
        weights=settings.weights,
        weights_reason=setup.weights_reason,
        device=f"cpu {settings.isa}" if settings.backend == "cpu" else settings.backend,
        threads=settings.threads or 1,
        max_model_len=min(setup.max_model_len, runner.num_pages * backend.page_size),
        max_batched_tokens=setup.max_batched_tokens,
        max_running=setup.max_running,
        share=share,
        smoothing=setup.smoothing,
    )


def set_up(config: EngineConfig, shared: bool = False) -> Setup:
    """Decide what ``config`` leaves open. Raises ConfigError and ModelError."""
    if config.tensor_parallel > 1 and (config.runahead > 1 or config.runahead_hosts):
        raise ConfigError("--tensor-parallel and --runahead cannot be combined")
    folder = Path(config.model_path)
    model = ModelConfig.from_folder(folder)
    Share(0, config.tensor_parallel).config(model)  # raises if it cannot be divided so
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's "
            f"{model.max_position_embeddings} tokens"
        )
    if model.context_limit:
        logger.info("%s", model.context_limit)
    # The processes compute at the same time, each with its share of the cores.
    processes = max(config.runahead, config.tensor_parallel)
    threads = config.threads or max(usable_cores() // processes, 1)
    name = config.backend
    if name == "auto":
        name = "gpu" if gpu_is_there() else "cpu"
    try:
        isa = instruction_sets()[0] if config.isa == "auto" else config.isa
        weights, reason = choose_weights(config.weights, name, isa, folder)
        backend = load_backend(
            name,
            page_size=PAGE_SIZE,
            isa=config.isa,  # which says what "auto" had to leave
            weights=weights,
            threads=threads,
            kv_format=config.kv_format,
            choices=KeptChoices(config.machine_folder),
            shared=shared,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tokens, sequences = GPU_STEP if name == "gpu" else SMALL_STEP
    tokens, sequences = config.max_batched_tokens or tokens, config.max_running or sequences
    settings = msgspec.structs.replace(
        config,
        backend=name,
        isa=isa,
        weights=weights,
        threads=threads,
        max_model_len=max_model_len,
        max_batched_tokens=tokens,
        max_running=sequences,
    )
    # All ranks of a chain hold the same positions, whatever memory each has.
    fits = config.max_model_len is None and not shared
    return Setup(
        settings=settings,
        weights_reason=reason,
        folder=folder,
        model=model,
        backend=backend,
        max_model_len=max_model_len,
        shortest=min(max_model_len, SHORTEST_CONTEXT) if fits else max_model_len,
        max_batched_tokens=tokens,
        max_running=sequences,
    )


def _lead(setup: Setup, share: Share) -> ModelRunner:
    """Rank 0's runner, with the other ranks started and ready."""
    # Imported here: torch.distributed is for those who need it.
    from headstart.engine.process.groups import use_gpu
    from headstart.engine.tensor_parallel.leader import Leader

    use_gpu(share.rank)
    leader = Leader(setup.settings, setup.model.vocab_size)
    try:
        decoder = setup.decoder(share, leader.ranks)
        leader.wait_until_loaded()  # so that the memory they take is known
        num_pages = setup.plan(decoder, share).num_pages
        leader.allocate(num_pages)
        runner = ModelRunner(decoder, setup.backend, num_pages, leader)
        leader.connect(setup.backend.kv_pages(runner.kv).device)
    except BaseException:
        leader.close()
        raise
    return runner


def _weight_bytes(model: ModelConfig, weights: str, ranks: int) -> int:
    """Of one rank, whose layers ``model`` describes; it has the whole embedding."""
    size = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}[weights]
    q_size, kv_size = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    layer = model.hidden_size * (2 * q_size + 2 * kv_size + 3 * model.intermediate_size)
    table = model.vocab_size * model.hidden_size
    embedding = 2 if weights != "f32" else 4
    return model.num_layers * layer * size + table * embedding + table * size // ranks


def _activation_bytes(model: ModelConfig, rows: int) -> int:
    q_size = model.num_heads * model.head_dim
    floats = 4 * model.hidden_size + 5 * q_size + 3 * model.intermediate_size
    return rows * floats * 4 + 64 * model.vocab_size * 4


def _segment_bytes(model: ModelConfig, rows: int) -> int:
    """What the rows of a long segment keep from layer to layer: residual and queries."""
    return rows * (model.hidden_size + model.num_heads * model.head_dim) * 4
