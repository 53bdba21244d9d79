"""ModelConfig: what the engine needs to know of a model, read from a Hugging Face config.json.

Plain JSON rather than transformers.AutoConfig: importing the latter takes longer than reading a
small model's weights, and an unsupported setting must be refused by name instead of ignored. The
defaults of absent keys are transformers' own (a test compares them).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from headstart.engine.errors import ModelError
from headstart.engine.ranges.segments import MASKS
from headstart.engine.sampling.params import Pooling

logger = logging.getLogger(__name__)

POOLING_FILE = "1_Pooling/config.json"
"""Where sentence-transformers keeps how a model's vectors are pooled."""
MODULES_FILE = "modules.json"
"""Where they keep what makes a vector, one module behind the other."""
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture of the Llama family; ``defaults`` of absent keys."""

    qkv_bias: bool | None = False  # None: decided by attention_bias, as o_bias is then
    mlp_bias: bool = False  # whether the config may ask for one
    qk_norm: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "LlamaForCausalLM": Family(
        qkv_bias=None,
        mlp_bias=True,
        defaults=(("max_position_embeddings", 2048), ("bos_token_id", 1), ("eos_token_id", 2)),
    ),
    "MistralForCausalLM": Family(
        defaults=(
            ("max_position_embeddings", 131072),
            ("num_key_value_heads", 8),
            ("sliding_window", 4096),
            ("bos_token_id", 1),
            ("eos_token_id", 2),
        ),
    ),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True,
        defaults=(
            ("max_position_embeddings", 32768),
            ("num_key_value_heads", 32),
            ("sliding_window", 4096),
        ),
    ),
    "Qwen3ForCausalLM": Family(
        qkv_bias=None,
        qk_norm=True,
        defaults=(
            ("max_position_embeddings", 32768),
            ("num_key_value_heads", 32),
            ("head_dim", 128),
            ("sliding_window", 4096),
        ),
    ),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings under transformers' names.

    ``parameters`` holds what the type needs beside theta (factor, short_factor, ...).
    ``max_position_embeddings`` is the model's own, before any clamp: some types scale by it.
    """

    type: str
    theta: float
    parameters: dict[str, Any]
    max_position_embeddings: int

    @property
    def original_length(self) -> int:
        """Positions the model was pretrained on, where the type distinguishes them."""
        return int(
            self.parameters.get("original_max_position_embeddings", self.max_position_embeddings)
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape and settings of one decoder of the Llama family.

    ``max_position_embeddings`` is the longest sequence the engine may compute. It is smaller than
    the model's own value when the model attends through a sliding window: within one window,
    sliding and full attention are the same. ``context_limit`` then says so in a sentence to log.
    ``segment_mask``: the mask the model was tuned for, if its config says so (ranges/segments.py).
    ``causal``: False where every token sees the whole prompt, as in some embedders.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    sliding_window: int | None
    rope: RopeConfig
    context_limit: str | None = None
    segment_mask: str | None = None
    causal: bool = True

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` and, if present, ``generation_config.json`` of ``folder``; and what
        its tokenizer calls the end, which some fine-tunes name nowhere else.

        Raises ModelError naming the file and the setting that is missing, wrong or unsupported.
        """
        raw = read_json(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        config = cls.from_dict(raw, generation, source=str(folder / "config.json"))
        end = _end_of_tokenizer(folder)
        if end is None or end in config.eos_token_ids or end >= config.vocab_size:
            return config
        return replace(config, eos_token_ids=(*config.eos_token_ids, end))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], generation: dict[str, Any], source: str) -> ModelConfig:
        """The same from parsed JSON; ``source`` names it in errors."""
        architecture = _architecture(raw, source)
        family = FAMILIES[architecture]
        read = _Reader({**dict(family.defaults), **raw}, source)
        read.refuse_unsupported()

        num_layers = read.positive("num_hidden_layers")
        num_heads = read.positive("num_attention_heads")
        num_kv_heads = read.positive("num_key_value_heads", num_heads)
        hidden_size = read.positive("hidden_size")
        head_dim = read.positive("head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            read.fail(f"{num_heads} attention heads do not divide into {num_kv_heads} KV heads")
        if head_dim % 2:
            read.fail(f"head_dim is {head_dim}; rotary embeddings need an even one")

        max_positions = read.positive("max_position_embeddings")
        rope = _rope(read, max_positions)
        window = _sliding_window(read, num_layers, architecture)
        context_limit = None
        if window is not None and window < max_positions:
            context_limit = (
                f"context limited to {window} of {max_positions} tokens: the model attends "
                "through a sliding window, which equals full attention only that far"
            )
            max_positions = window
        attention_bias = read.flag("attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.positive("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias and family.qkv_bias is None,
            mlp_bias=family.mlp_bias and read.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            hidden_act="silu",
            eos_token_ids=_eos_token_ids(read, generation),
            bos_token_id=read.token_id("bos_token_id"),
            sliding_window=window,
            rope=rope,
            context_limit=context_limit,
            segment_mask=segment_mask(read.values, source),
            causal=read.get("is_causal") is None or read.flag("is_causal"),
        )


class _Reader:
    """Typed access to a config's keys; every complaint names the key and the file."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.source}: {what}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.source}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ModelError(f"{self.source}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ModelError(f"{self.source}: {key} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            raise ModelError(f"{self.source}: {key} must be true or false, got {value!r}")
        return bool(value)

    def token_id(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{self.source}: {key} must be a token id, got {value!r}")
        return value

    def refuse_unsupported(self) -> None:
        """Refuse settings that would change the result and that the engine does not compute."""
        activation = self.values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):  # two names of one function
            self.fail(f"hidden_act {activation!r} is not supported, only 'silu'")
        quantization = self.values.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            self.fail(
                f"weights quantised with {method or 'an unnamed method'} are not supported; "
                "use the unquantised model or a GGUF file"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError naming the file."""
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", error)
        raise ModelError(f"{path}: cannot be read: {reason}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _architecture(raw: dict[str, Any], source: str) -> str:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str):
        architecture = f"unnamed (model_type {raw.get('model_type')!r})"
    # As AutoModel saves it: without a head, which embedders do not need.
    if (whole := architecture.removesuffix("Model") + "ForCausalLM") in FAMILIES:
        architecture = whole
    if architecture not in FAMILIES:
        raise ModelError(
            f"{source}: architecture {architecture} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return architecture


def _rope(read: _Reader, max_positions: int) -> RopeConfig:
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` with ``rope_theta`` (before)."""
    parameters: Any = None
    for key in ("rope_scaling", "rope_parameters"):
        value = read.get(key)
        if value is not None and not isinstance(value, dict):
            read.fail(f"{key} must be an object, got {value!r}")
        parameters = parameters or value
    parameters = dict(parameters or {})
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        read.fail(f"RoPE settings per layer type ({', '.join(nested)}) are not supported")
    legacy_type = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or legacy_type or "default"
    if rope_type not in ROPE_TYPES:
        read.fail(
            f"rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    theta = parameters.pop("rope_theta", None)
    if theta is None:
        theta = read.number("rope_theta", 10000.0)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e30:
        read.fail(f"rope_theta must be a number above 1, got {theta!r}")
    partial = parameters.pop("partial_rotary_factor", None)
    if partial is None:
        partial = read.get("partial_rotary_factor")
    if partial not in (None, 1):
        read.fail(f"partial_rotary_factor {partial!r} is not supported, only 1")
    if rope_type in ("llama3", "yarn", "longrope"):
        # Some models keep it beside the RoPE settings; transformers gives that one priority.
        original = read.get("original_max_position_embeddings")
        original = original or parameters.get("original_max_position_embeddings") or max_positions
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            read.fail(f"original_max_position_embeddings must be positive, got {original!r}")
        parameters["original_max_position_embeddings"] = original
    return RopeConfig(rope_type, float(theta), parameters, max_positions)


def _sliding_window(read: _Reader, num_layers: int, architecture: str) -> int | None:
    """Tokens in the window of the layers that have one; None when every layer sees everything."""
    if architecture == "LlamaForCausalLM" or read.get("sliding_window") is None:
        return None
    if architecture != "MistralForCausalLM":
        if not read.flag("use_sliding_window"):
            return None
        layer_types = read.get("layer_types")
        if layer_types is None:
            first = read.get("max_window_layers")
            first = 28 if first is None else first
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                read.fail(f"max_window_layers must be an integer, got {first!r}")
            if first >= num_layers:
                return None
        elif not isinstance(layer_types, list):
            read.fail(f"layer_types must be a list, got {layer_types!r}")
        elif "sliding_attention" not in layer_types:
            return None
    return read.positive("sliding_window")


def segment_mask(values: Mapping[str, Any], source: str) -> str | None:
    """The mask that a config declares, a name in MASKS. Raises ModelError naming ``source``."""
    mask = values.get("segment_mask")
    if mask is not None and mask not in MASKS:
        raise ModelError(
            f"{source}: segment_mask must be one of {', '.join(MASKS)}; got {mask!r:.100}"
        )
    return mask


def declared_pooling(folder: Path) -> Pooling | None:
    """How the model's sentence-transformers settings say that vectors are pooled.

    None where there are none, or what they say is not supported, which is logged, as are modules
    behind the pooling. Raises ModelError for a broken file.
    """
    path = folder / MODULES_FILE
    if path.exists():
        names = [str(entry["type"]).rpartition(".")[2] for entry in _read_list(path)]
        others = [name for name in names if name not in _MODULES]
        if others:
            logger.warning("%s: vectors are made without %s", path, " and ".join(others))
    path = folder / POOLING_FILE
    if not path.exists():
        return None
    modes = [key for key, on in read_json(path).items() if key.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in _POOLING_KEYS:
        logger.warning("%s: %s is not supported", path, " with ".join(modes) or "no pooling mode")
        return None
    return _POOLING_KEYS[modes[0]]


def _eos_token_ids(read: _Reader, generation: dict[str, Any]) -> tuple[int, ...]:
    """End tokens of both files, in order of appearance: chat models often name more than one."""
    ids: list[int] = []
    for value in (generation.get("eos_token_id"), read.get("eos_token_id")):
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                read.fail(f"eos_token_id must be token ids, got {value!r}")
            if token_id not in ids:
                ids.append(token_id)
    return tuple(ids)


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "type" in entry for entry in entries
    ):
        raise ModelError(f"{path}: not a list of modules")
    return entries


def _end_of_tokenizer(folder: Path) -> int | None:
    """The id of the ``eos_token`` of the tokenizer in ``folder``, if it is there and names one."""
    paths = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not all(path.exists() for path in paths):
        return None
    settings, tokenizer = map(read_json, paths)
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    added = tokenizer.get("added_tokens") or ()
    return next((int(entry["id"]) for entry in added if entry["content"] == token), None)
