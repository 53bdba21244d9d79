"""Adapters: LoRA weights beside the model's, in the format of PEFT.

    y = W x + scaling * B (A x)         A [rank, in], B [out, rank]         (arXiv 2106.09685)

scaling is alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). A folder holds
adapter_config.json and adapter_model.safetensors. What would change the result and is not computed
here (DoRA, trained biases or embeddings, ...) is refused by name.

A model's matrices are stacked (parameters.py), and so are the terms. Those of one adapter:

    qkv      outputs  [ q q q q q q q | k k | v v ]      one LoraPart for each matrix it changes
    gate_up  outputs  [ gate gate     | up up     ]

The int8 model computes with smoothed inputs, x / s, and scaled v and up rows (quantize.py): A takes
in s, and B of v and up its share, so that the sums stay the same.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from headstart.engine.errors import ModelError, RequestError
from headstart.engine.models.config import ModelConfig, read_json, segment_mask
from headstart.engine.models.files.weights import Weights
from headstart.engine.models.share import WHOLE, Share
from headstart.engine.models.spec import DOWN, GATE_UP, MATRICES, QKV, O
from headstart.engine.process.messages import AdapterInfo
from headstart.kernels.backend import Backend, LoraPart

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 256
PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""

HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config "  # noqa: SIM905
    "ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout "
    "lora_ga_config megatron_config megatron_core peft_type peft_version qalora_group_size r "
    "rank_pattern revision runtime_config segment_mask target_modules task_type use_rslora".split()
)
"""Settings that are read here, or that change nothing once an adapter is trained."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the model's own weights, which the adapter's file does not hold."""


@dataclass(frozen=True, slots=True)
class Target:
    """A matrix adapters may change: which dense layer of the decoder, and which of its outputs."""

    module: str
    matrix: int
    first: int
    out_features: int
    in_features: int

    @property
    def name(self) -> str:
        return self.module.split(".")[1]


def targets(config: ModelConfig) -> list[Target]:
    """The matrices of a decoder layer under PEFT's names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    return [
        Target("self_attn.q_proj", QKV, 0, q, hidden),
        Target("self_attn.k_proj", QKV, q, kv, hidden),
        Target("self_attn.v_proj", QKV, q + kv, kv, hidden),
        Target("self_attn.o_proj", O, 0, hidden, q),
        Target("mlp.gate_proj", GATE_UP, 0, inner, hidden),
        Target("mlp.up_proj", GATE_UP, inner, inner, hidden),
        Target("mlp.down_proj", DOWN, 0, hidden, inner),
    ]


@dataclass(frozen=True, slots=True)
class Settings:
    """adapter_config.json: ``r`` and ``alpha``, and others for modules whose name ends so.

    ``use_rslora`` and ``segment_mask`` are the adapter's as a whole.
    """

    r: int
    alpha: float
    rank_pattern: list[tuple[re.Pattern[str], int]]
    alpha_pattern: list[tuple[re.Pattern[str], float]]
    use_rslora: bool
    segment_mask: str | None

    def rank(self, module: str) -> int:
        """Of ``module``, as "model.layers.0.mlp.up_proj": the first that fits, as in PEFT."""
        return next((r for name, r in self.rank_pattern if name.fullmatch(module)), self.r)

    def scaling(self, module: str) -> float:
        fitting = (alpha for name, alpha in self.alpha_pattern if name.fullmatch(module))
        rank = self.rank(module)
        return next(fitting, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Adapter:
    """A loaded adapter. ``weights``: the backend's ``lora_adapter``.

    ``digest`` is of all numbers in the whole adapter: KV made with others under the same name is
    not found.
    """

    info: AdapterInfo
    digest: bytes
    weights: Any


def load_adapter(
    name: str,
    folder: Path,
    config: ModelConfig,
    backend: Backend,
    smoothing: list[dict[str, Tensor]] | None,
    share: Share = WHOLE,
) -> Adapter:
    """Read the adapter in ``folder`` for a model of this shape, or ``share``'s part of both.

    ``smoothing``: what each layer's inputs are divided by (``quantize.read_smoothing``), or None.
    Raises ModelError naming the setting, file or tensor that is missing, wrong or not supported.
    """
    settings = _read_settings(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        other = (
            " (adapter_model.bin is not read: convert it)" * (folder / "adapter_model.bin").exists()
        )
        raise ModelError(f"{folder}: holds no {WEIGHTS}{other}")
    weights = Weights.open_file(folder / WEIGHTS)
    every = targets(config)
    own = targets(share.config(config))
    trunk, found = _modules(weights.names(), every, config.num_layers, folder)
    layers: list[list[LoraPart]] = []
    largest = 0
    digest = hashlib.blake2b(digest_size=16)
    for layer in range(config.num_layers):
        parts: list[list[LoraPart]] = [[] for _ in range(MATRICES)]
        for target, local in zip(every, own, strict=True):
            if (layer, target.name) not in found:
                continue
            module = f"{trunk}layers.{layer}.{target.module}"
            down, up = _read_pair(weights, module, target, settings, folder)
            if smoothing is not None:
                _follow_smoothing(down, up, target, smoothing[layer], config)
            largest = max(largest, len(down))
            digest.update(f"{module} {len(down)} ".encode())
            digest.update(down.numpy().data)
            digest.update(up.numpy().data)
            if target.matrix in (O, DOWN):  # its outputs are terms of a sum
                down = share.part(down, 1)
            else:
                up = share.part(up, 0)
            parts[target.matrix].append(LoraPart(local.first, down, up))
        layers += parts
    weights.finish()
    info = AdapterInfo(
        name=name,
        path=str(folder),
        rank=largest,
        targets=[t.name for t in every if any(target == t.name for _, target in found)],
        num_bytes=(folder / WEIGHTS).stat().st_size,
        segment_mask=settings.segment_mask,
    )
    return Adapter(info, digest.digest(), backend.lora_adapter(layers))


class Adapters:
    """The loaded ones, by name; at most ``most``. ``smoothing`` is asked for when one is loaded.

    ``share``: what of each belongs here. ``announce`` is told of each before it counts as loaded,
    and may raise ModelError.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        smoothing: Callable[[], list[dict[str, Tensor]] | None],
        most: int,
        share: Share = WHOLE,
        announce: Callable[[Adapter], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._share = share
        self._announce = announce
        self._backend = backend
        self._smoothing = smoothing
        self._most = most
        self._by_name: dict[str, Adapter] = {}

    def load(self, name: str, path: str) -> AdapterInfo:
        """Raises RequestError if the name is taken or there is no room, ModelError for the rest."""
        if name in self._by_name:
            raise RequestError(f"an adapter called {name!r} is loaded already", "lora_name")
        if len(self._by_name) >= self._most:
            raise RequestError(
                f"{len(self._by_name)} adapters are loaded, and --max-loras allows no more: "
                "unload one first",
                "lora_name",
            )
        adapter = load_adapter(
            name, Path(path), self._config, self._backend, self._smoothing(), self._share
        )
        self._announce(adapter)
        self._by_name[name] = adapter
        info = adapter.info
        logger.info(
            "adapter %s: rank %d of %s, segment mask %s, from %s",
            *(name, info.rank, " ".join(info.targets), info.segment_mask, path),
        )
        return info

    def unload(self, name: str) -> None:
        """Sequences that use it keep it. Raises RequestError for an unknown name."""
        self.get(name)
        del self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def make_room(self) -> None:
        """Unload the one loaded first if there are as many as there may be."""
        if len(self._by_name) >= self._most:
            del self._by_name[next(iter(self._by_name))]

    def get(self, name: str) -> Adapter:
        """Raises RequestError for an unknown name."""
        if name not in self._by_name:
            raise RequestError(f"there is no adapter called {name!r}", "model")
        return self._by_name[name]


def _read_settings(path: Path) -> Settings:
    found = read_json(path)
    _refuse_other_methods(path, found)
    rslora = found.get("use_rslora")
    if rslora not in (None, False, True):
        raise ModelError(f"{path}: use_rslora must be true or false, got {rslora!r:.100}")
    return Settings(
        r=_number(path, "r", found.get("r"), int),
        alpha=_number(path, "lora_alpha", found.get("lora_alpha", 8), float),
        rank_pattern=_pattern(path, "rank_pattern", found.get("rank_pattern"), int),
        alpha_pattern=_pattern(path, "alpha_pattern", found.get("alpha_pattern"), float),
        use_rslora=bool(rslora),
        segment_mask=segment_mask(found, str(path)),
    )


def _refuse_other_methods(path: Path, settings: dict[str, Any]) -> None:
    """Raise ModelError for what would change the result and is not computed here."""

    def refuse(why: str) -> None:
        raise ModelError(f"{path}: {why}")

    if settings.get("peft_type") != "LORA":
        refuse(f"peft_type is {settings.get('peft_type')!r:.100}; only 'LORA' is supported")
    if settings.get("use_dora"):
        refuse("use_dora (DoRA) is not supported: merge the adapter into the model's weights")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        refuse("trained biases are not supported: bias must be 'none' and lora_bias false")
    if settings.get("fan_in_fan_out"):
        refuse("fan_in_fan_out is not supported: no matrix of these models is stored transposed")
    begin = settings.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(BASE_CHANGING):
        refuse(
            f"init_lora_weights is {begin!r:.100}, which changes the "
            "model's own weights: convert the adapter to a plain one when saving it "
            "(path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.items():
        if key not in HARMLESS and value not in (None, False, [], {}, ""):
            refuse(f"{key!r:.100} is {value!r:.100}, which is not supported")


Number = TypeVar("Number", int, float)


def _number(path: Path, name: str, value: object, kind: type[Number]) -> Number:
    number = isinstance(value, int if kind is int else (int, float))
    if isinstance(value, int | float) and number and value is not True and 0 < value < 1e6:
        return kind(value)
    what = "a whole number" if kind is int else "a number"
    raise ModelError(f"{path}: {name} must be {what} above 0 and below 1e6, got {value!r:.100}")


def _pattern(
    path: Path, key: str, pattern: object, kind: type[Number]
) -> list[tuple[re.Pattern[str], Number]]:
    """Numbers by the end of modules' names, such as "q_proj" or "layers.0.mlp.up_proj".

    PEFT takes the names for regular expressions. Of these only the dot is supported, which so
    stands for any character.
    """
    if pattern is None:
        return []
    if not isinstance(pattern, dict):
        raise ModelError(f"{path}: {key} must be an object, got {pattern!r:.100}")
    numbers = []
    for name, value in pattern.items():
        if not re.fullmatch(r"[\w.]+", name):
            raise ModelError(
                f"{path}: {key} has {name!r:.100}: names of modules are supported, patterns are not"
            )
        number = _number(path, f"{key}[{name!r:.100}]", value, kind)
        numbers.append((re.compile(rf"(.*\.)?{name}"), number))
    return numbers


def _modules(
    names: list[str], every: list[Target], num_layers: int, folder: Path
) -> tuple[str, set[tuple[int, str]]]:
    """What the names of modules begin with: "model.", or nothing where it was trained on a model
    without a head. And (layer, target) of each matrix the file changes: others are an error.
    """
    whole = any(name.startswith(f"{PREFIX}model.") for name in names)
    trunk = "model." if whole else ""
    known = {target.module: target.name for target in every}
    found = set()
    for name in names:
        match = re.fullmatch(
            re.escape(f"{PREFIX}{trunk}layers.")
            + r"(0|[1-9][0-9]{0,5})\.([a-z_.]+)\.lora_[AB]\.weight",
            name,
        )
        if match is None or match[2] not in known:
            raise ModelError(
                f"{folder / WEIGHTS}: tensor {name!r:.200} is not supported; adapters may change "
                f"{', '.join(sorted(known))} of model.layers"
            )
        if int(match[1]) >= num_layers:
            raise ModelError(
                f"{folder / WEIGHTS}: tensor {name} is of layer {match[1]}; "
                f"the model has {num_layers}: the adapter is of another model"
            )
        found.add((int(match[1]), known[match[2]]))
    if not found:
        raise ModelError(f"{folder / WEIGHTS}: holds no tensors")
    return trunk, found


def _read_pair(
    weights: Weights, module: str, target: Target, settings: Settings, folder: Path
) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]`` and scaling * B ``[out, rank]`` of one matrix, float32 copies."""
    rank = settings.rank(module)
    if rank > MAX_RANK:
        raise ModelError(
            f"{folder / CONFIG}: {module} has rank {rank}; ranks to {MAX_RANK} are supported"
        )
    names = [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
    down = weights.take(names[0], (rank, target.in_features)).float().clone()
    up = weights.take(names[1], (target.out_features, rank)).float() * settings.scaling(module)
    for name, tensor in zip(names, (down, up), strict=True):
        if not tensor.isfinite().all():
            raise ModelError(
                f"{folder / WEIGHTS}: tensor {name} holds NaN or infinity, or does once scaled"
            )
    return down, up


def _follow_smoothing(
    down: Tensor, up: Tensor, target: Target, factors: dict[str, Tensor], config: ModelConfig
) -> None:
    """Make A and B, in place, what they have to be in a smoothed layer."""
    down *= factors[("qkv", "o", "gate_up", "down")[target.matrix]]
    if target.name == "v_proj":
        heads = factors["o"].view(config.num_kv_heads, -1, config.head_dim)
        up /= heads[:, 0].reshape(-1, 1)
    elif target.name == "up_proj":
        up /= factors["down"][:, None]
