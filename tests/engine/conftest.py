"""transformers' own model in float32 as the judge of greedy tokens.

Every output is checked in one pass of the reference over prompt + output: each token must be the
reference's best one, given the tokens before it. By induction that is what its own greedy decoding
gives.

Near ties. Two float32 programs that add in different orders differ in the last bits of a logit.
A token other than the reference's best is accepted if the reference's logit of it is within
TIE of the best; comparison goes on with the token that was chosen. Such ties must be rare:
at most one in each MOST_TIES tokens of a run, and of all that a reference has judged.

Segments reach it as an explicit mask, made here from their definition.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.engine.models.files.gguf_weights import huggingface_folder
from headstart.engine.ranges.segments import Span

TIE = 1e-3
MOST_TIES = 500


def explicit_mask(spans: Iterable[Span], num_tokens: int) -> torch.Tensor:
    """Which keys each row sees, bool ``[1, 1, num_tokens, num_tokens]``: those up to itself, and
    all of its own segment."""
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    for start, end in spans:
        mask[start:end, start:end] = True
    return mask[None, None]


class Reference:
    """transformers' model in float32: logits of token sequences, each computed once."""

    def __init__(self, folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            huggingface_folder(folder), dtype=torch.float32
        )
        self.model = model.eval()
        self.known: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.compared = self.ties = 0

    def logits(self, tokens: list[int], spans: Sequence[Span] = ()) -> torch.Tensor:
        mask = explicit_mask(spans, len(tokens)) if spans else None
        with torch.inference_mode():
            result: torch.Tensor = self.model(
                input_ids=torch.tensor([tokens]), attention_mask=mask
            ).logits[0]
        return result

    def states(self, tokens: list[int], spans: Sequence[Span] = ()) -> torch.Tensor:
        """Hidden states behind the final norm, ``[len(tokens), hidden]``."""
        mask = explicit_mask(spans, len(tokens)) if spans else None
        with torch.inference_mode():
            result: torch.Tensor = self.model.model(
                input_ids=torch.tensor([tokens]), attention_mask=mask
            ).last_hidden_state[0]
        return result

    def check(
        self,
        prompts: list[list[int]],
        outputs: list[list[int]],
        new: int | None = None,
        spans: list[list[Span]] | None = None,
    ) -> None:
        """Each output is the greedy continuation of its prompt, and ``new`` tokens long.

        ``spans``: the segments of each prompt; none if left out.
        """
        ties = 0
        each = spans or [[] for _ in prompts]
        for prompt, output, segments in zip(prompts, outputs, each, strict=True):
            assert output
            assert new is None or len(output) == new
            key = (*prompt, -1, *output, *segments)
            if key not in self.known:
                logits = self.logits(prompt + output, segments)[len(prompt) - 1 : -1]
                chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
                self.known[key] = (logits.max(dim=-1).values - chosen, logits.argmax(dim=-1))
                self.compared += len(output)
                self.ties += int((self.known[key][1] != torch.tensor(output)).sum())
            short, best = self.known[key]
            different = best != torch.tensor(output)
            worst = float(short.max())
            assert worst <= TIE, f"{worst} below the best at {int(short.argmax())} of {prompt}"
            ties += int(different.sum())
        compared = sum(len(output) for output in outputs)
        # One may be in a short run, which says nothing of how often they come.
        for found, among in ((ties, compared), (self.ties, self.compared)):
            assert found <= -(-among // MOST_TIES), f"{found} near ties in {among} tokens"


@pytest.fixture(scope="module")
def references() -> Callable[[Path], Reference]:
    loaded: dict[Path, Reference] = {}

    def get(folder: Path) -> Reference:
        if folder not in loaded:
            loaded[folder] = Reference(folder)
        return loaded[folder]

    return get


# ------------------------------------------------------------------------------- adapters

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rank_and_scaling(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What adapter_config.json says of a module, as PEFT reads it."""

    def of(key: str, default: float) -> float:
        for name, value in settings.get(key, {}).items():
            if re.match(rf"(.*\.)?({name})$", module):
                return float(value)
        return default

    rank = int(of("rank_pattern", settings["r"]))
    alpha = of("alpha_pattern", settings["lora_alpha"])
    return rank, alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def write_adapter_into(
    folder: Path,
    model: Path,
    *,
    seed: int = 0,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    **settings: Any,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", **settings}
    config["target_modules"] = list(targets)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    with safe_open(huggingface_folder(model) / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            module = name.removesuffix(".weight")
            is_weight = module != name and module.startswith("model.layers.")
            if not is_weight or module.split(".")[-1] not in targets:
                continue
            if layers is not None and int(module.split(".")[2]) not in layers:
                continue
            out_features, in_features = file.get_slice(name).get_shape()
            rank, scaling = rank_and_scaling(config, module)
            down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            up = torch.randn(out_features, rank, generator=generator) / rank**0.5
            tensors[f"base_model.model.{module}.lora_A.weight"] = down.to(dtype)
            tensors[f"base_model.model.{module}.lora_B.weight"] = (up * size / scaling).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merged_weights(adapter: Path, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and W + scaling * B A, float32, of each of ``weights`` that the adapter changes."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[name.replace("lora_A", "lora_B")]
            rank, scaling = rank_and_scaling(settings, module)
            assert rank == len(down)
            weight = weights[f"{module}.weight"].float()
            yield f"{module}.weight", weight + scaling * (up.float() @ down.float())


class Adapters:
    """Random LoRA adapters in PEFT's format, and models they are merged into; made once each.

    Do not write into the folders.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, model: Path, **options: Any) -> Path:
        """An adapter of ``model``. Options: ``seed``; ``targets`` and ``layers`` it changes;
        ``dtype`` stored; ``size``: how large the term is where x is about 1; the rest are fields
        of adapter_config.json.
        """
        folder = self._folder("adapter", model, sorted(options.items()))
        if not folder.exists():
            write_adapter_into(folder, model, **options)
        return folder

    def merged(self, model: Path, adapter: Path | None) -> Path:
        """A copy of ``model`` whose weights contain the adapter; without one, itself."""
        if adapter is None:
            return model
        folder = self._folder("merged", model, adapter)
        if not folder.exists():
            shutil.copytree(model, folder, ignore=shutil.ignore_patterns("int8"))
            weights = load_file(model / "model.safetensors")
            weights |= dict(merged_weights(adapter, weights))
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def _folder(self, kind: str, *key: Any) -> Path:
        return self._root / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="session")
def merge_into() -> Callable[[Any, Path], None]:
    """``merge_into(model, adapter)``: the same with a transformers model in memory."""

    def merge(model: Any, adapter: Path) -> None:
        state = model.state_dict()
        for name, weight in merged_weights(adapter, state):
            state[name].copy_(weight)

    return merge
