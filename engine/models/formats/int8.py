"""int8 weights as quantize.py wrote them: the weights, their smoothing, their perplexity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.parameters import LayerParameters, Matrix, Parameters, trunk_prefix
from headstart.engine.models.weights import FLOATS, Weights

FOLDER = "int8"
QUALITY = "quality.json"
SMOOTHING = "smoothing.safetensors"


def read_quality(folder: Path) -> dict[str, float] | None:
    """Perplexities recorded at pull time, or None if int8 weights were not made.

    ``int8_least`` and ``int8_most``: the ends of the 95% interval of int8's over bf16's. Where
    only perplexities were recorded, both are their ratio.
    """
    path = folder / FOLDER / QUALITY
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text())
        quality = {name: float(recorded[name]) for name in ("tokens", "f32", "bf16", "int8")}
        for name in ("int8_least", "int8_most"):
            quality[name] = float(recorded.get(name, quality["int8"] / quality["bf16"]))
        return quality
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ModelError(f"{path} is damaged: pull the model again") from error


def read_smoothing(config: ModelConfig, folder: Path) -> list[dict[str, Tensor]]:
    """The factors of each layer's inputs, as ``smooth_layer`` returns them."""
    path = folder / FOLDER / SMOOTHING
    if not path.exists():
        raise ModelError(f"{path} is missing: pull the model again, or use --weights bf16")
    weights = Weights.open_file(path)
    sizes = {
        "qkv": config.hidden_size,
        "o": config.num_heads * config.head_dim,
        "gate_up": config.hidden_size,
        "down": config.intermediate_size,
    }
    layers = [
        {name: weights.take(f"layers.{i}.{name}", (size,)) for name, size in sizes.items()}
        for i in range(config.num_layers)
    ]
    weights.finish()
    return layers


def read_int8(config: ModelConfig, folder: Path) -> Parameters:
    """The int8 parameters of ``folder``. Raises ModelError naming what is missing or wrong."""
    if not (folder / FOLDER / "model.safetensors").exists():
        raise ModelError(
            f"{folder} has no int8 weights: pull the model again, or use --weights bf16"
        )
    weights, whole = Weights.open(folder / FOLDER, dtypes=(*FLOATS, "I8")), Weights.open(folder)

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = weights.take(name, shape)
        if tensor.dtype is not dtype:  # the kernels read it by its address
            raise ModelError(f"tensor {name} in {folder / FOLDER} is {tensor.dtype}, not {dtype}")
        return tensor

    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def matrix(name: str, out_features: int, in_features: int, has_bias: bool = False) -> Matrix:
        return Matrix(
            take(f"{name}.weight", (out_features, in_features), torch.int8),
            take(f"{name}.bias", (out_features,)) if has_bias else None,
            take(f"{name}.scale", (out_features,)),
        )

    def layers() -> Iterator[LayerParameters]:
        for i in range(config.num_layers):
            name = f"layers.{i}"
            yield LayerParameters(
                input_norm=take(f"{name}.input_norm", (hidden,)),
                qkv=matrix(f"{name}.qkv", q_size + 2 * kv_size, hidden, config.qkv_bias),
                q_norm=take(f"{name}.q_norm", (head_dim,)) if config.qk_norm else None,
                k_norm=take(f"{name}.k_norm", (head_dim,)) if config.qk_norm else None,
                o=matrix(f"{name}.o", hidden, q_size, config.o_bias),
                post_norm=take(f"{name}.post_norm", (hidden,)),
                gate_up=matrix(f"{name}.gate_up", 2 * inner, hidden, config.mlp_bias),
                down=matrix(f"{name}.down", hidden, inner, config.mlp_bias),
            )
        weights.finish()

    return Parameters(
        take("embedding", (config.vocab_size, hidden), torch.bfloat16),
        layers(),
        take("final_norm", (hidden,)),
        matrix("head", config.vocab_size, hidden),
        whole.take(f"{trunk_prefix(whole)}norm.weight", (hidden,)).float(),
    )
