"""int8 weights with smoothing: made once at pull time, with their perplexity beside them.

    python -m headstart.engine.models.formats.quantize FOLDER

A linear layer runs in int8 as  y = scale_w * scale_x * (W_q x_q):  one scale per output channel
for the weights, one per row for the activations, taken on the fly. A few input channels are so
large that a row's scale drowns the others, so their range is moved into the weights first
(SmoothQuant, arXiv 2211.10438, section 4):

    W x = (W diag(s)) (diag(1/s) x)      s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

diag(1/s) costs nothing at run time, because what produces x takes it in:

    q, k, v and gate, up and the head    the RMSNorm weight before them (one s for all readers)
    down                                 the rows of up
    o                                    the rows of v (one s for the query heads of a KV head)

The ranges of x come from a bundled text. The model is read once, a layer at a time: the text goes
through it in float32 (float_pass.py), is smoothed, rounded, packed and written, and the next one is
read. FOLDER gets int8/model.safetensors (formats/int8.py describes it), int8/smoothing.safetensors
(the factors s, for LoRA adapters: adapters.py) and int8/quality.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.engine.errors import HeadstartError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.weights import GGUF_LINK, TensorFile, row_runs
from headstart.engine.models.formats.float_pass import FloatPass, largest
from headstart.engine.models.formats.int8 import (
    FOLDER,
    QUALITY,
    SMOOTHING,
    WEIGHTS,
    matrix_sizes,
    tensor_specs,
)
from headstart.engine.models.formats.quality import (
    WINDOW,
    excess,
    perplexity,
    text_losses,
    text_tokens,
    windows,
)
from headstart.engine.models.parameters import AnyMatrix, Checkpoint, LayerParameters, Matrix
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.models.store import DAMAGED
from headstart.engine.process.cores import usable_cores
from headstart.kernels.devices import load_backend
from headstart.kernels.packing import check_int8_shape, pack_int8

ALPHA = {"qkv": 0.6, "o": 0.4, "gate_up": 0.6, "down": 0.6, "head": 0.6}
"""Searched on SmolLM2-135M, as means over four roundings (bench/results/README.md, Quality);
the paper's single value is 0.5."""
CALIBRATION_TOKENS = (256, 512)
"""Of the text that ranges are taken from: for models of many parameters, and of few. 2,048 are no
better (bench/results/README.md, Quality)."""
LEAST_EVALUATION = 384
"""Tokens that any model is judged by."""
PRODUCTS = 67 * 10**10
"""Multiplications that a text may cost; a model of 135M is judged by all of it."""
ROUNDED = 1 << 20
"""Elements that are rounded and packed at a time: their copies stay in a CPU's cache."""
JUDGING = 6
"""How many times longer a parameter takes to be made than to be judged, roughly, for progress."""
KNOWN = Path(__file__).with_name("known_quality.json")
KNOWN_BYTES = 1 << 28
"""Larger models are not known, and not read once more to see that."""
UNSUITABLE = 3
"""Exit status of the command where a model has no int8 weights; DAMAGED: it is no model at all."""


class UnsuitableError(HeadstartError):
    """A whole model that has no int8 weights. The message says why."""


def smoothing(ranges: Tensor, weight_ranges: Tensor, alpha: float) -> Tensor:
    """The factor s of each input channel from max|x| and max|W| of it, float32 ``[in]``."""
    factor = ranges.clamp(min=1e-5) ** alpha / weight_ranges.clamp(min=1e-5) ** (1 - alpha)
    # A channel the text never excites, or that no weight reads, is left alone.
    factor[(ranges == 0) | (weight_ranges == 0)] = 1.0
    return factor


def _input_ranges(weight: Tensor) -> Tensor:
    return largest(weight.float(), dim=0)


def smooth_layer(
    layer: LayerParameters, config: ModelConfig, recorded: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Move activation ranges into the weights of ``layer``; returns the factors.

    recorded: largest |x| of the inputs of qkv, o, gate_up and down. The factors are of those
    inputs, float32 ``[in]`` each, under those names.
    """
    matrices = {name: _writable(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")}
    for name, matrix in matrices.items():
        setattr(layer, name, matrix)

    def factor_of(name: str) -> Tensor:
        weight_ranges = _input_ranges(matrices[name].weight)
        factor = smoothing(recorded[name], weight_ranges, ALPHA[name])
        matrices[name].weight *= factor
        return factor

    qkv, gate_up, down = factor_of("qkv"), factor_of("gate_up"), factor_of("down")
    layer.input_norm = layer.input_norm / qkv
    layer.post_norm = layer.post_norm / gate_up
    _divide_rows(matrices["gate_up"], config.intermediate_size, down)

    # One factor per value channel: all query heads of a KV head read the same values.
    groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    weight_ranges = _input_ranges(matrices["o"].weight).view(groups).amax(dim=1)
    values = smoothing(recorded["o"].view(groups).amax(dim=1), weight_ranges, ALPHA["o"])
    o = values[:, None, :].expand(groups).reshape(-1)
    matrices["o"].weight *= o
    first_value = (config.num_heads + config.num_kv_heads) * config.head_dim
    _divide_rows(matrices["qkv"], first_value, values.reshape(-1))
    return {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}


def _writable(matrix: AnyMatrix) -> Matrix:
    """A float32 copy: what was read may be the mapped file itself."""
    assert isinstance(matrix, Matrix)
    bias = None if matrix.bias is None else matrix.bias.clone()
    return Matrix(matrix.weight.to(torch.float32, copy=True), bias)


def _divide_rows(matrix: Matrix, start: int, factor: Tensor) -> None:
    matrix.weight[start:] /= factor[:, None]
    if matrix.bias is not None:
        matrix.bias[start:] /= factor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their float32 scales: w = scale * w_q, |w_q| <= 127."""
    scale = largest(weight, dim=1) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    return (weight * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class _Int8File:
    """int8/model.safetensors on its way."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = TensorFile(path, tensor_specs(config))
        self.close = self._file.close

    def rows(self, name: str, weight: Tensor) -> None:
        """The next rows of matrix ``name``, whole panels but for the last, rounded and packed."""
        panels = pack_int8(*quantize_rows(weight), None)
        self._file.write(f"{name}.panels", panels.data.numpy().data)
        self._file.write(f"{name}.scale", panels.scale.numpy().data)
        self._file.write(f"{name}.sums", panels.sums.numpy().data)

    def matrix(self, name: str, matrix: Matrix) -> None:
        out_features, in_features = matrix.weight.shape
        for part in row_runs((out_features, in_features), ROUNDED):
            self.rows(name, matrix.weight[part])
        if matrix.bias is not None:
            self.vector(f"{name}.bias", matrix.bias)

    def vector(self, name: str, vector: Tensor) -> None:
        self._file.write(name, vector.contiguous().numpy().data)

    def embedding(self, rows: Tensor) -> None:
        self._file.write("embedding", rows.bfloat16().view(torch.int16).numpy().data)

    def layer(self, index: int, layer: LayerParameters) -> None:
        name = f"layers.{index}"
        for norm in ("input_norm", "post_norm", "q_norm", "k_norm"):
            value = getattr(layer, norm)
            if value is not None:
                self.vector(f"{name}.{norm}", value)
        for kind in ("qkv", "o", "gate_up", "down"):
            self.matrix(f"{name}.{kind}", getattr(layer, kind))


def quantize(folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """Write int8 weights and quality.json into ``folder``; return what is in that.

    ``progress(done, total)`` counts megabytes of float32 weights, read and judged. Raises
    UnsuitableError for a model that has none, and ModelError for a damaged one.
    """
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint(config, folder)
    _check(checkpoint)
    known = known_quality(folder)
    tokens = PRODUCTS // _parameters(config)
    least, most = CALIBRATION_TOKENS
    calibration = text_tokens(folder, "calibration", min(max(tokens // 2, least), most))
    evaluation = []
    if known is None:
        evaluation = text_tokens(folder, "evaluation", max(tokens, LEAST_EVALUATION))
    advance = _counted(config, len(evaluation), progress)

    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    partial = target / f"{WEIGHTS}.partial"
    losses, factors = _write(checkpoint, partial, calibration, evaluation, advance)
    os.replace(partial, target / WEIGHTS)
    partial = target / f"{SMOOTHING}.partial"
    save_file({name: factor.contiguous() for name, factor in factors.items()}, partial)
    os.replace(partial, target / SMOOTHING)

    quality = known
    if quality is None:
        int8 = text_losses(_int8_runner(folder, config), evaluation)
        quality = {"tokens": float(len(evaluation))}
        quality |= {"f32": perplexity(losses), "int8": perplexity(int8)}
        quality["int8_least"], quality["int8_most"] = excess(int8, losses)
        advance(_parameters(config) // JUDGING)
    (target / QUALITY).write_text(json.dumps(quality, indent=1))
    return quality


@torch.inference_mode()
def _write(
    checkpoint: Checkpoint,
    target: Path,
    calibration: list[int],
    evaluation: list[int],
    advance: Callable[[int], None],
) -> tuple[list[float], dict[str, Tensor]]:
    """Write all int8 weights. Returns the float32 losses of ``evaluation`` and the factors."""
    config = checkpoint.config
    size = min(WINDOW, config.max_position_embeddings)
    seen = windows(calibration, size)
    text = FloatPass(config, seen + windows(evaluation, size), len(seen))
    out = _Int8File(target, config)
    final_norm = checkpoint.final_norm()
    factors: dict[str, Tensor] = {}
    head_ranges = torch.zeros(config.hidden_size)
    try:
        for rows in checkpoint.embedding_rows():
            text.embed(rows)
            out.embedding(rows)
            if config.tie_word_embeddings:
                head_ranges = torch.maximum(head_ranges, _input_ranges(rows))
            advance(rows.numel())
        for index, layer in enumerate(checkpoint.layers()):
            smoothed = smooth_layer(layer, config, text.layer(layer))
            factors |= {f"layers.{index}.{name}": factor for name, factor in smoothed.items()}
            out.layer(index, layer)
            advance(_layer_parameters(config))
        if not config.tie_word_embeddings:
            for rows in checkpoint.head_rows():
                head_ranges = torch.maximum(head_ranges, _input_ranges(rows))
        factor = smoothing(text.finish(final_norm), head_ranges, ALPHA["head"])
        out.vector("final_norm", final_norm / factor)
        out.vector("hidden_norm", final_norm)
        for rows in checkpoint.head_rows():
            text.head(rows)
            out.rows("head", rows.float() * factor)
            advance(rows.numel())
    finally:
        out.close()
    return text.losses(), factors


def _check(checkpoint: Checkpoint) -> None:
    """Raise UnsuitableError for a model that is not served with int8 weights."""
    config = checkpoint.config
    if not checkpoint.has_head or not config.causal:
        raise UnsuitableError(
            "they are judged by how well text is predicted, which this model does not"
        )
    try:
        for _, in_features in matrix_sizes(config).values():
            check_int8_shape(in_features)
    except ValueError as error:
        raise UnsuitableError(str(error)) from error


def _layer_parameters(config: ModelConfig) -> int:
    return sum(rows * columns for rows, columns in matrix_sizes(config).values())


def _parameters(config: ModelConfig) -> int:
    """Of the matrices that a token is multiplied with."""
    return config.num_layers * _layer_parameters(config) + config.vocab_size * config.hidden_size


def _counted(
    config: ModelConfig, judged: int, progress: Callable[[int, int], None] | None
) -> Callable[[int], None]:
    """What counts parameters that are done with, for ``progress``."""
    judging = _parameters(config) // JUDGING if judged else 0
    total = _parameters(config) + judging + config.vocab_size * config.hidden_size
    done = 0

    def advance(parameters: int) -> None:
        nonlocal done
        done += parameters
        if progress:
            progress(done >> 18, total >> 18)

    return advance


def known_quality(folder: Path) -> dict[str, float] | None:
    """What was measured before of the same weights on the same token ids, or None.

    It spares the default model's first start most of its time. KNOWN is by model_digest.
    """
    known: dict[str, dict[str, float]] = json.loads(KNOWN.read_text())
    return known.get(model_digest(folder))


def model_digest(folder: Path) -> str:
    """SHA-256 of all that the perplexities depend on, but for roundings; "": it is not known."""
    gguf = folder / GGUF_LINK
    weights = gguf if gguf.exists() else folder / WEIGHTS
    if not weights.exists() or weights.stat().st_size > KNOWN_BYTES:
        return ""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for name in ("calibration", "evaluation"):
        digest.update(array("i", text_tokens(folder, name)).tobytes())
    return digest.hexdigest()


def _int8_runner(folder: Path, config: ModelConfig) -> ModelRunner:
    length = min(WINDOW, config.max_position_embeddings)
    backend = load_backend("cpu", isa="auto", weights="int8", threads=usable_cores())
    decoder = load_decoder(folder, config, backend, "int8", length)
    return ModelRunner(decoder, backend, -(-length // backend.page_size))


def main() -> None:
    """Quantise the folder in argv; progress as "done total" lines on stdout."""
    try:
        quantize(Path(sys.argv[1]), lambda done, total: print(done, total, flush=True))
    except HeadstartError as error:
        print(error, file=sys.stderr)
        sys.exit(UNSUITABLE if isinstance(error, UnsuitableError) else DAMAGED)


if __name__ == "__main__":
    main()
