"""int8 weights with smoothing: made once at pull time, with their perplexity beside them.

    python -m headstart.engine.models.quantize FOLDER

A linear layer runs in int8 as  y = scale_w * scale_x * (W_q x_q):  one scale per output channel
for the weights, one per row for the activations, taken on the fly. A few input channels are so
large that a row's scale drowns the others, so their range is moved into the weights first
(SmoothQuant, arXiv 2211.10438, section 4):

    W x = (W diag(s)) (diag(1/s) x)      s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

diag(1/s) costs nothing at run time, because what produces x takes it in:

    q, k, v and gate, up and the head    the RMSNorm weight before them (one s for all readers)
    down                                 the rows of up
    o                                    the rows of v (one s for the query heads of a KV head)

The ranges of x come from a bundled text. FOLDER gets int8/model.safetensors (everything but the
embedding, which stays bf16, in the shape parameters.py describes), int8/smoothing.safetensors (the
factors s, for LoRA adapters: adapters.py) and int8/quality.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.engine.errors import HeadstartError, ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decoder import Decoder
from headstart.engine.models.formats.int8 import FOLDER, QUALITY, SMOOTHING, read_int8
from headstart.engine.models.parameters import LayerParameters, Matrix, read_float
from headstart.engine.process.cores import usable_cores
from headstart.kernels.backend import Backend, Linear, RopeTable
from headstart.kernels.devices import instruction_sets, load_backend

ALPHA = {"qkv": 0.6, "o": 0.4, "gate_up": 0.6, "down": 0.6, "head": 0.6}
"""Searched on SmolLM2-135M, as means over four roundings (bench/results/README.md, Quality);
the paper's single value is 0.5."""
CALIBRATION_TOKENS = 2048
KNOWN = Path(__file__).with_name("known_quality.json")
Ranges = dict[int, Tensor]


class RangeRecorder:
    """A backend that notes the largest |x| of every input channel of every linear layer."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.ranges: Ranges = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def linear(self, x: Any, weight: Linear) -> Tensor:
        rows = x if isinstance(x, Tensor) else x.data
        seen = rows.float().abs().amax(dim=0)
        before = self.ranges.get(id(weight))
        self.ranges[id(weight)] = seen if before is None else torch.maximum(before, seen)
        return self._backend.linear(x, weight)


def smoothing(ranges: Tensor, weight_ranges: Tensor, alpha: float) -> Tensor:
    """The factor s of each input channel from max|x| and max|W| of it, float32 ``[in]``."""
    factor = ranges.clamp(min=1e-5) ** alpha / weight_ranges.clamp(min=1e-5) ** (1 - alpha)
    # A channel the text never excites, or that no weight reads, is left alone.
    factor[(ranges == 0) | (weight_ranges == 0)] = 1.0
    return factor


def _input_ranges(weight: Tensor) -> Tensor:
    return weight.float().abs().amax(dim=0)


def smooth_layer(
    layer: LayerParameters, config: ModelConfig, recorded: tuple[Tensor, Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Move activation ranges into the weights of ``layer``, in place; returns the factors.

    recorded: largest |x| of the inputs of qkv, o, gate_up and down. The factors are of those
    inputs, float32 ``[in]`` each, under those names.
    """
    qkv_in, o_in, gate_up_in, down_in = recorded
    for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
        matrix.weight = matrix.weight.float().clone()
        matrix.bias = None if matrix.bias is None else matrix.bias.clone()

    qkv = smoothing(qkv_in, _input_ranges(layer.qkv.weight), ALPHA["qkv"])
    layer.input_norm = layer.input_norm / qkv
    layer.qkv.weight *= qkv
    gate_up = smoothing(gate_up_in, _input_ranges(layer.gate_up.weight), ALPHA["gate_up"])
    layer.post_norm = layer.post_norm / gate_up
    layer.gate_up.weight *= gate_up

    down = smoothing(down_in, _input_ranges(layer.down.weight), ALPHA["down"])
    layer.down.weight *= down
    _divide_rows(layer.gate_up, config.intermediate_size, down)

    # One factor per value channel: all query heads of a KV head read the same values.
    groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    weight_ranges = _input_ranges(layer.o.weight).view(groups).amax(dim=1)
    values = smoothing(o_in.view(groups).amax(dim=1), weight_ranges, ALPHA["o"])
    o = values[:, None, :].expand(groups).reshape(-1)
    layer.o.weight *= o
    first_value = (config.num_heads + config.num_kv_heads) * config.head_dim
    _divide_rows(layer.qkv, first_value, values.reshape(-1))
    return {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}


def _divide_rows(matrix: Matrix, start: int, factor: Tensor) -> None:
    matrix.weight[start:] /= factor[:, None]
    if matrix.bias is not None:
        matrix.bias[start:] /= factor


def quantize_matrix(matrix: Matrix) -> Matrix:
    """int8 weight and float32 scale per output channel: w = scale * w_q, |w_q| <= 127."""
    weight = matrix.weight.float()
    scale = weight.abs().amax(dim=1) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    quantized = (weight * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Matrix(quantized, matrix.bias, scale)


def calibrate(folder: Path, config: ModelConfig) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Ranges of the inputs of (qkv, o, gate_up, down) per layer, and of the head."""
    from headstart.engine.models.quality import text_tokens

    backend = RangeRecorder(_backend("f32"))
    runner = _runner(folder, config, backend, "f32")
    backend.ranges.clear()
    _run_over(runner, text_tokens(folder, "calibration", CALIBRATION_TOKENS))
    decoder, ranges = runner.decoder, backend.ranges
    layers = [
        tuple(ranges[id(w)] for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
        for layer in decoder.layers
    ]
    return layers, ranges[id(decoder.head)]


def quantize(folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """Write int8 weights and quality.json into ``folder``; return the perplexities by format."""
    from headstart.engine.models.quality import excess, perplexity, text_losses, text_tokens

    config = ModelConfig.from_folder(folder)
    steps, done = config.num_layers + 4, 0
    parameters = read_float(config, folder)
    if parameters.head is None or not config.causal:
        raise ModelError("they are judged by how well text is predicted, which this model does not")

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, steps)

    ranges, head_range = calibrate(folder, config)
    advance()
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {"embedding": parameters.embedding.bfloat16().contiguous()}
    factors: dict[str, Tensor] = {}
    for index, layer in enumerate(parameters.layers):
        smoothed = smooth_layer(layer, config, ranges[index])  # type: ignore[arg-type]
        factors |= {f"layers.{index}.{name}": factor for name, factor in smoothed.items()}
        for name, value in _layer_tensors(layer):
            tensors[f"layers.{index}.{name}"] = value
        advance()
    factor = smoothing(head_range, _input_ranges(parameters.head.weight), ALPHA["head"])
    tensors["final_norm"] = parameters.final_norm / factor
    head = quantize_matrix(Matrix(parameters.head.weight.float() * factor))
    tensors |= _matrix_tensors("head", head)
    for name, some in (("model.safetensors", tensors), (SMOOTHING, factors)):
        partial = target / f"{name}.partial"
        save_file({key: tensor.contiguous() for key, tensor in some.items()}, partial)
        os.replace(partial, target / name)
    del tensors, parameters, head

    quality = known_quality(folder)
    if quality is None:
        text = text_tokens(folder, "evaluation")
        quality, losses = {"tokens": float(len(text))}, {}
        for weights in ("f32", "bf16", "int8"):
            runner = _runner(folder, config, _backend(weights), weights)
            losses[weights] = text_losses(runner, text)
            quality[weights] = perplexity(losses[weights])
            advance()
        quality["int8_least"], quality["int8_most"] = excess(losses["int8"], losses["bf16"])
    (target / QUALITY).write_text(json.dumps(quality, indent=1))
    return quality


def known_quality(folder: Path) -> dict[str, float] | None:
    """What was measured before of the same weights on the same token ids, or None.

    It spares the default model's first start most of its time. KNOWN is by model_digest and by
    instruction set, since bf16 products are rounded otherwise where hardware makes them.
    """
    known: dict[str, dict[str, dict[str, float]]] = json.loads(KNOWN.read_text())
    figures = known.get(model_digest(folder), {})
    return figures.get(instruction_sets()[0]) or figures.get("others")


def model_digest(folder: Path) -> str:
    """SHA-256 of all that the perplexities depend on, but for roundings; "": several files."""
    from headstart.engine.models.quality import text_tokens

    weights = folder / "model.safetensors"
    if not weights.exists():
        return ""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for name in ("calibration", "evaluation"):
        digest.update(array("i", text_tokens(folder, name)).tobytes())
    return digest.hexdigest()


def _layer_tensors(layer: LayerParameters) -> Iterator[tuple[str, Tensor]]:
    for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
        value = getattr(layer, name)
        if value is not None:
            yield name, value
    for name in ("qkv", "o", "gate_up", "down"):
        yield from _matrix_tensors(name, quantize_matrix(getattr(layer, name))).items()


def _matrix_tensors(name: str, matrix: Matrix) -> dict[str, Tensor]:
    tensors = {f"{name}.weight": matrix.weight, f"{name}.bias": matrix.bias}
    tensors[f"{name}.scale"] = matrix.scale
    return {key: value for key, value in tensors.items() if value is not None}


def _backend(weights: str) -> Backend:
    return load_backend("cpu", isa="auto", weights=weights, threads=usable_cores())


def _runner(folder: Path, config: ModelConfig, backend: Any, weights: str) -> Any:
    from headstart.engine.models.quality import WINDOW
    from headstart.engine.models.rope import rope_tables
    from headstart.engine.models.runner import ModelRunner

    read = read_int8 if weights == "int8" else read_float
    length = min(WINDOW, config.max_position_embeddings)
    try:
        decoder = Decoder(
            config, backend, read(config, folder), RopeTable(*rope_tables(config, length))
        )
    except ValueError as error:
        raise ModelError(str(error)) from error
    return ModelRunner(decoder, backend, -(-length // backend.page_size))


def _run_over(runner: Any, token_ids: list[int]) -> None:
    from headstart.engine.models.quality import text_losses

    text_losses(runner, token_ids)


def main() -> None:
    """Quantise the folder in argv; progress as "done total" lines on stdout."""
    try:
        quantize(Path(sys.argv[1]), lambda done, total: print(done, total, flush=True))
    except HeadstartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
