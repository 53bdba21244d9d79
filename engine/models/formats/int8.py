"""int8 weights as quantize.py writes them: the weights, their smoothing, their perplexity.

int8/model.safetensors has, of every matrix (layers.N.qkv, o, gate_up, down, and head):

    NAME.panels   int8, as the kernels read it (kernels/packing.py): where it is mapped, if several
                  processes share it, else from a copy in huge pages
    NAME.scale    float32, of each output
    NAME.sums     int32, of each output
    NAME.bias     float32, where the model has it

then the norms, float32, with the smoothing in them; ``hidden_norm``, the last one without it; and
the embedding, bf16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.weights import FLOATS, Weights
from headstart.engine.models.parameters import LayerParameters, Parameters
from headstart.kernels.packing import PANEL, Int8Panels, panels_shape

FOLDER = "int8"
WEIGHTS = "model.safetensors"
QUALITY = "quality.json"
SMOOTHING = "smoothing.safetensors"
DTYPES = {"I8": torch.int8, "I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16}


def read_quality(folder: Path) -> dict[str, float] | None:
    """Perplexities recorded at pull time, or None if int8 weights were not made.

    ``int8_least`` and ``int8_most``: the ends of the 95% interval of int8's over float32's. Where
    only perplexities were recorded, both are their ratio.
    """
    path = folder / FOLDER / QUALITY
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text())
        quality = {name: float(recorded[name]) for name in ("tokens", "f32", "int8")}
        for name in ("int8_least", "int8_most"):
            quality[name] = float(recorded.get(name, quality["int8"] / quality["f32"]))
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


def matrix_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's matrices."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    return {
        "qkv": (q_size + 2 * kv_size, hidden),
        "o": (hidden, q_size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def tensor_specs(config: ModelConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of WEIGHTS; what kernels read comes first."""
    matrices = {
        f"layers.{i}.{name}": size
        for i in range(config.num_layers)
        for name, size in matrix_sizes(config).items()
    }
    matrices["head"] = (config.vocab_size, config.hidden_size)
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    for name, (out_features, in_features) in matrices.items():
        shape = panels_shape(out_features, in_features)
        outputs = (shape[0] * PANEL,)
        specs += [(f"{name}.panels", "I8", shape)]
        specs += [(f"{name}.scale", "F32", outputs), (f"{name}.sums", "I32", outputs)]
    specs.append(("embedding", "BF16", (config.vocab_size, config.hidden_size)))
    specs += [(name, "F32", (config.hidden_size,)) for name in ("final_norm", "hidden_norm")]
    biases = {"qkv": config.qkv_bias, "o": config.o_bias}
    biases |= dict.fromkeys(("gate_up", "down"), config.mlp_bias)
    for i in range(config.num_layers):
        norms = {"input_norm": config.hidden_size, "post_norm": config.hidden_size}
        if config.qk_norm:
            norms |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
        specs += [(f"layers.{i}.{name}", "F32", (size,)) for name, size in norms.items()]
        specs += [
            (f"layers.{i}.{name}.bias", "F32", (rows,))
            for name, (rows, _) in matrix_sizes(config).items()
            if biases[name]
        ]
    return specs


def read_int8(config: ModelConfig, folder: Path) -> Parameters:
    """The int8 parameters of ``folder``. Raises ModelError naming what is wrong.

    Panels and embedding are mapped, apart: the panels' pages are given back once they were copied.
    """
    path = folder / FOLDER / WEIGHTS
    if not path.exists():
        raise ModelError(
            f"{folder} has no int8 weights: pull the model again, or use --weights bf16"
        )
    weights = Weights.open_file(path, dtypes=(*FLOATS, "I8", "I32"))
    specs = {name: (DTYPES[dtype], shape) for name, dtype, shape in tensor_specs(config)}
    sizes = matrix_sizes(config)

    def take(name: str) -> Tensor:
        dtype, shape = specs[name]
        tensor = weights.take(name, shape)
        if tensor.dtype is not dtype:  # the kernels read it by its address
            raise ModelError(f"tensor {name} in {path} is {tensor.dtype}, not {dtype}")
        return tensor

    def kept(name: str) -> Tensor:
        return take(name).clone()

    def optional(name: str) -> Tensor | None:
        return kept(name) if name in specs else None

    def matrix(name: str, size: tuple[int, int]) -> Int8Panels:
        return Int8Panels(
            take(f"{name}.panels"),
            kept(f"{name}.scale"),
            kept(f"{name}.sums"),
            optional(f"{name}.bias"),
            out_features=size[0],
            in_features=size[1],
        )

    def layers() -> Iterator[LayerParameters]:
        for i in range(config.num_layers):
            name = f"layers.{i}"
            yield LayerParameters(
                input_norm=kept(f"{name}.input_norm"),
                qkv=matrix(f"{name}.qkv", sizes["qkv"]),
                q_norm=optional(f"{name}.q_norm"),
                k_norm=optional(f"{name}.k_norm"),
                o=matrix(f"{name}.o", sizes["o"]),
                post_norm=kept(f"{name}.post_norm"),
                gate_up=matrix(f"{name}.gate_up", sizes["gate_up"]),
                down=matrix(f"{name}.down", sizes["down"]),
            )
        weights.finish()

    return Parameters(
        Weights.open_file(path).take("embedding", take("embedding").shape),
        layers(),
        kept("final_norm"),
        matrix("head", (config.vocab_size, config.hidden_size)),
        kept("hidden_norm"),
    )
