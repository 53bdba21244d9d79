"""EngineConfig: every setting of the engine process; the server process passes it on as JSON."""

import os
from pathlib import Path

import msgspec

PAGE_SIZE = 32
"""Tokens of a page of the KV cache: the least that is shared."""


def default_home() -> Path:
    """Where models and measurements of this machine are kept if nobody says otherwise."""
    return Path(os.environ.get("HEADSTART_HOME") or Path.home() / ".cache" / "headstart")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine. ``None`` means: decide at start-up, and log what was decided.

    model_path:          folder made by ``headstart pull`` (see engine/models/store.py)
    backend:             "auto", "gpu", "cpu" or "reference"
    isa:                 CPU kernels: "auto", or the name of an instruction set (kernels/README.md)
    weights:             "auto", "f32", "f16" (gpu), "bf16" or "int8" (cpu)
    kv_format:           of keys and values: "auto", "f32", "bf16" (cpu), "fp8" or "int8" (gpu)
    kv_memory:           bytes of KV pool, of all tensor-parallel processes together
    max_model_len:       longest prompt plus output of one sequence, tokens
    max_batched_tokens:  token budget of one step; None: 512, or 2,048 on a gpu
    max_running:         sequences computed in one step; None: 64, or 256 on a gpu
    step_time:           seconds that a step may take on a CPU (schedule/turns.py); 0: as long as
                         max_batched_tokens do
    threads:             CPU threads of the kernels in each process; None: cores / processes
    prefix_caching:      keep KV of finished prompts in the radix cache
    relay:               read shared prefixes once a batch: "auto" where it pays, "on", or "off"
    relay_check:         compare with plain attention on every so many steps that share; 0: never
    async_scheduling:    plan a step while the one before is computed: "on", "off", or "auto" where
                         the backend computes beside the host
    scheduling_policy:   "fcfs", by arrival, or "priority", which requests may then have
    adapters:            LoRA adapters to load at start-up: name -> folder
    max_adapters:        adapters loaded at a time
    tensor_parallel:     processes of this machine that hold the model together
    runahead:            processes of this machine, this one included, in the chain for long prompts
    runahead_hosts:      HOST:PORT of ranks that come before them in the chain
    runahead_secret:     what those ranks have to know; None: there are none
    runahead_min:        least uncached tokens of a prompt that runs ahead; None: where it pays
    runahead_cuts:       where prompts are cut: "auto", "even", "predicted" or "modelled"
    runahead_transport:  of KV: "auto" (shared memory, NCCL between GPUs, else Gloo) or "gloo"
    runahead_timeout:    seconds after which a rank that does not get on is left out
    stuck_after:         seconds of silence after which the process is taken for dead; 0: never
    cache_dir:           where measurements of this machine are kept; None: nowhere
    log_level:           of the engine process, a name of the logging module
    """

    model_path: str
    backend: str = "auto"
    isa: str = "auto"
    weights: str = "auto"
    kv_format: str = "auto"
    kv_memory: int | None = None
    max_model_len: int | None = None
    max_batched_tokens: int | None = None
    max_running: int | None = None
    step_time: float = 0.0
    threads: int | None = None
    prefix_caching: bool = True
    relay: str = "auto"
    relay_check: int = 0
    async_scheduling: str = "auto"
    scheduling_policy: str = "fcfs"
    adapters: dict[str, str] = {}
    max_adapters: int = 32
    tensor_parallel: int = 1
    runahead: int = 1
    runahead_hosts: list[str] = []
    runahead_secret: str | None = None
    runahead_min: int | None = None
    runahead_cuts: str = "auto"
    runahead_transport: str = "auto"
    runahead_timeout: float = 5.0
    stuck_after: float = 120.0
    cache_dir: str | None = None
    log_level: str = "info"

    @property
    def machine_folder(self) -> Path | None:
        """Where measurements of this machine are kept; None: nowhere."""
        return None if self.cache_dir is None else Path(self.cache_dir) / "machine"
