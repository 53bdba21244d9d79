"""What a loaded model's steps take on this machine: measured once, and kept by what that is."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.costs.measurements import keep, load_kept
from headstart.engine.costs.steps import FAR_ROWS, StepTable, measure_steps
from headstart.engine.models.loading import LoadedModel
from headstart.engine.models.runner import chunk_seconds

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the measurement and its file: raise it when kernels change enough that old tables mislead."""


def step_table(
    loaded: LoadedModel, folder: Path | None, attention: AttentionCosts | None = None
) -> StepTable:
    """As kept in ``folder``, or measured now and kept there: then the first KV pages are written
    to. ``attention``: of this machine, if known."""
    table = load_kept(folder, "steps", _about(loaded), StepTable)
    if table is None:
        begin, runner, pair = time.perf_counter(), loaded.runner, 0.0
        if attention is not None:
            pair = attention.of(FAR_ROWS)[1] / FAR_ROWS * loaded.config.num_layers
        longest = min(runner.num_pages * loaded.backend.page_size, loaded.max_model_len)
        table = measure_steps(lambda start, rows: chunk_seconds(runner, start, rows), longest, pair)
        keep_table(loaded, folder, table)
        logger.info("step costs: measured in %.2f s", time.perf_counter() - begin)
    return table


def keep_table(loaded: LoadedModel, folder: Path | None, table: StepTable) -> None:
    """For the next start: what was measured while others were busy may be far off."""
    keep(folder, "steps", _about(loaded), table)


def _about(loaded: LoadedModel) -> dict[str, Any]:
    model = loaded.config
    return {
        "version": VERSION,
        "device": loaded.backend.device,
        "weights": loaded.weights,
        "page_size": loaded.backend.page_size,
        "ranks": loaded.share.ranks,
        "shape": [
            *(model.num_layers, model.hidden_size, model.intermediate_size, model.vocab_size),
            *(model.num_heads, model.num_kv_heads, model.head_dim),
        ],
    }
