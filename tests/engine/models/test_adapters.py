"""Requests for LoRA adapters get the tokens of models that have them merged into their weights.

However they are computed: alone or beside other adapters and none, in chunks, from the cache, with
segments, with prefixes read once. float32; conftest.py says how near ties are dealt with.
"""

from __future__ import annotations

import json
import random
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import RequestError
from headstart.engine.models.adapters import Adapter, load_adapter
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.ranges.segments import Segments, Span
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence
from headstart.engine.sequence import Sequence as EngineSequence
from headstart.kernels.cpu.backend import CpuBackend
from headstart.kernels.devices import instruction_sets, load_backend

pytestmark = pytest.mark.covering

NEW = 12
F32_LOGITS = 1e-4  # as in test_parity.py

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "q-v": {"targets": ("q_proj", "v_proj"), "r": 33, "lora_alpha": 8, "use_rslora": True},
    "rank-1": {"targets": ("up_proj", "o_proj"), "r": 1, "lora_alpha": 2.5},
    "patterns": {
        # A name ends the module's, from a dot on, and a dot is any character; the first one counts.
        "rank_pattern": {"proj": 3, "q_proj": 2, "s.1.mlp.up_proj": 5, "1.mlp.up_proj": 64},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 3.5, "self.attn...proj": 40},
    },
    "layer-1": {"targets": ("k_proj", "gate_proj"), "layers": (1,), "r": 7},
    "rank-256": {"targets": ("down_proj",), "r": 256},
    "bf16": {"dtype": torch.bfloat16, "r": 16},
    "rs-patterns": {
        "use_rslora": True,
        "rank_pattern": {"mlp.up_proj": 5, "o_proj": 3},
        "alpha_pattern": {"o_proj": 1},
    },
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases, heads of 80": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 80},
    ),
    "llama, a group of 3": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "mistral, heads of 32": ("mistral", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}

MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "uncached": {"prefix_caching": False},
    "chunks of 16": {"max_batched_tokens": 16},
    "chunks of 33": {"max_batched_tokens": 33},
    "few at a time": {"max_running": 3},
    "reference": {"backend": "reference"},
    **{isa: {"isa": isa} for isa in instruction_sets()},
}


@dataclass(frozen=True)
class Request:
    """A prompt for the model, or for an adapter by its name in ADAPTERS."""

    prompt: list[int]
    adapter: str | None
    segments: tuple[Span, ...] = ()


def some(draw: random.Random, n: int) -> list[int]:
    return [draw.randrange(3, 320) for _ in range(n)]


def mixed(seed: int = 1) -> list[Request]:
    """All adapters and none, around the ends of pages; one prompt is everybody's."""
    draw = random.Random(seed)
    shared = some(draw, 70)
    requests = []
    for name in (*ADAPTERS, None, None):
        requests.append(Request(some(draw, draw.choice((1, 31, 32, 33, 65))), name))
        requests.append(Request(shared, name))
    draw.shuffle(requests)
    return requests


def make_engine(folder: Path, adapters: dict[str, Path] | None = None, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 2, "kv_memory": 64 << 20, "max_model_len": 512}
    paths = {name: str(path) for name, path in (adapters or {}).items()}
    config = EngineConfig(model_path=str(folder), adapters=paths, **{**fields, **settings})
    return Engine(config)


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


def add(engine: Engine, i: int, request: Request, new: int = NEW) -> None:
    engine.add(
        i,
        array("i", request.prompt),
        greedy(new),
        segments=request.segments,
        adapter=request.adapter,
    )


def finish(engine: Engine, outputs: dict[int, list[int]]) -> dict[int, int]:
    """Run until nothing is left; returns how many tokens of each came from the cache."""
    cached = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.id, []).extend(output.token_ids)
            cached[output.id] = output.cached_tokens
        engine.check()
    return cached


def run(engine: Engine, requests: Sequence[Request], new: int = NEW) -> list[list[int]]:
    outputs: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        add(engine, i, request, new)
    finish(engine, outputs)
    return [outputs[i] for i in range(len(requests))]


def cached_tokens(engine: Engine, request: Request) -> int:
    add(engine, 0, request)
    return finish(engine, {})[0]


class Judge:
    """transformers with merged weights, one model an adapter."""

    def __init__(self, model: Path, lora: Any, references: Callable[[Path], Any]) -> None:
        self.model, self._lora, self._references = model, lora, references
        self.paths = {name: lora.write(model, **options) for name, options in ADAPTERS.items()}

    def reference(self, adapter: str | None) -> Any:
        path = None if adapter is None else self.paths[adapter]
        return self._references(self._lora.merged(self.model, path))

    def check(self, requests: Sequence[Request], outputs: list[list[int]], new: int = NEW) -> None:
        for request, output in zip(requests, outputs, strict=True):
            reference = self.reference(request.adapter)
            if request.segments:
                check_with_mask(reference.model, request, output)
            else:
                reference.check([request.prompt], [output], new)


def check_with_mask(model: Any, request: Request, output: list[int]) -> None:
    tokens, first = request.prompt + output, len(request.prompt) - 1
    mask = Segments.of(request.segments, len(request.prompt)).mask(len(tokens))
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([tokens]), attention_mask=torch.from_numpy(mask)[None, None]
        ).logits[0][first:-1]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert float((logits.max(dim=-1).values - chosen).max()) <= 1e-3, request


MakeJudge = Callable[[Path], Judge]


@pytest.fixture(scope="module")
def judges(lora: Any, references: Callable[[Path], Any]) -> MakeJudge:
    made: dict[Path, Judge] = {}

    def get(model: Path) -> Judge:
        if model not in made:
            made[model] = Judge(model, lora, references)
        return made[model]

    return get


@pytest.fixture(params=MODELS)
def judge(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], judges: MakeJudge
) -> Judge:
    arch, overrides = MODELS[request.param]
    return judges(tiny_model(arch, **overrides))


@pytest.fixture
def llama(tiny_model: Callable[..., Path], judges: MakeJudge) -> Judge:
    return judges(tiny_model("llama", attention_bias=True, mlp_bias=True, head_dim=80))


# ------------------------------------------------------------------------------- outputs


def test_together(judge: Judge) -> None:
    requests = mixed()
    engine = make_engine(judge.model, judge.paths)
    outputs = run(engine, requests)
    judge.check(requests, outputs)
    # Each adapter matters: no two say the same of the prompt that all were given.
    shared = max((r.prompt for r in requests), key=[r.prompt for r in requests].count)
    found = {
        r.adapter: output for r, output in zip(requests, outputs, strict=True) if r.prompt == shared
    }
    assert len(found) == len(ADAPTERS) + 1
    assert len({tuple(output) for output in found.values()}) == len(found)


def test_alone_then_from_the_cache(judge: Judge) -> None:
    requests = mixed(2)
    engine = make_engine(judge.model, judge.paths)
    judge.check(requests, [run(engine, [request])[0] for request in requests])
    before = engine.stats.cached_tokens
    judge.check(requests, run(engine, requests))
    expected = sum((len(request.prompt) - 1) // 32 * 32 for request in requests)
    assert engine.stats.cached_tokens - before == expected


@pytest.mark.parametrize("mode", MODES)
def test_modes(llama: Judge, mode: str) -> None:
    requests = mixed(3)
    engine = make_engine(llama.model, llama.paths, **MODES[mode])
    llama.check(requests, run(engine, requests))


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_in_tiles(llama: Judge, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """An adapter's rows are cut at a tile's end, tiles have some adapters or none."""
    monkeypatch.setattr(CpuBackend, "tile_rows", rows)
    requests = mixed(4)[: 10 if rows == 1 else None]
    llama.check(requests, run(make_engine(llama.model, llama.paths), requests))


def workload(seed: int) -> list[Request]:
    """Requests below a prefix, for some adapters and for none, with segments and without."""
    draw = random.Random(seed)
    system = some(draw, 140)
    requests = []
    for name in (None, "all", "patterns", "q-v"):
        for _ in range(3):
            user = some(draw, draw.choice((9, 40, 75)))
            requests.append(Request([1, *system, *user, *some(draw, 3)], name))
        spans = ((1, 141), (141, 141 + len(user)))
        requests += [Request(requests[-1].prompt, name, spans)] * 2
    draw.shuffle(requests)
    return requests


@pytest.mark.parametrize("rows", [40, 512])
@pytest.mark.parametrize("budget", [64, 512])
def test_with_segments_and_prefixes_read_once(
    llama: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: int, budget: int
) -> None:
    monkeypatch.setattr(CpuBackend, "tile_rows", rows)
    requests = workload(5)
    engine = make_engine(
        llama.model,
        llama.paths,
        relay="on",
        relay_check=2,
        cache_dir=str(tmp_path),
        max_batched_tokens=budget,
    )
    for _ in range(2):
        llama.check(requests, run(engine, requests))
    relay = engine.stats.relay
    assert relay.steps >= NEW
    assert relay.checks >= 2
    assert relay.largest_difference == 0.0


def test_preempted(llama: Judge) -> None:
    requests = [request for request in mixed(6) if len(request.prompt) < 80]
    page = make_engine(llama.model)._page_bytes
    engine = make_engine(llama.model, llama.paths, kv_memory=7 * page, max_model_len=192)
    llama.check(requests, run(engine, requests, 70), 70)
    assert engine.stats.preemptions > 0


# ------------------------------------------------------------------------------- logits


def load(name: str, path: Path, model: Path, runner: ModelRunner) -> Adapter:
    return load_adapter(name, path, ModelConfig.from_folder(model), runner.backend, None)


def logits_of(
    runner: ModelRunner, tokens: list[int], chunk: int, adapter: Adapter | None
) -> torch.Tensor:
    """Logits of every position, computed ``chunk`` tokens at a time."""
    pages = list(range(-(-len(tokens) // 32)))
    seq = EngineSequence(
        0, array("i", tokens), len(tokens), greedy(1), pages=pages, adapter=adapter
    )
    parts = []
    for start in range(0, len(tokens), chunk):
        scheduled = ScheduledSequence(seq, start, min(chunk, len(tokens) - start), False)
        parts.append(runner.run(build_batch([scheduled], 32).with_all_logits()).clone())
    return torch.cat(parts)


@pytest.mark.parametrize("where", [*instruction_sets(), "reference"])
def test_logits(judge: Judge, where: str) -> None:
    name, isa = ("reference", "auto") if where == "reference" else ("cpu", where)
    backend = load_backend(name, isa=isa, weights="f32", threads=2)
    config = ModelConfig.from_folder(judge.model)
    runner = ModelRunner(load_decoder(judge.model, config, backend, "f32", 128), backend, 4)
    tokens = some(random.Random(7), 70)
    base = judge.reference(None).logits(tokens)
    for adapter, path in judge.paths.items():
        expected = judge.reference(adapter).logits(tokens)
        assert (expected - base).abs().max() > 0.1 * base.abs().max()
        loaded = load(adapter, path, judge.model, runner)
        for chunk in (128, 33) if where != "portable" else (128,):
            error = (logits_of(runner, tokens, chunk, loaded) - expected).abs().max()
            assert error < F32_LOGITS * expected.abs().max(), (adapter, chunk)


# ------------------------------------------------------------------------------- the cache


PROMPT = some(random.Random(8), 100)
FULL = 96
"""Tokens of PROMPT's full pages."""


def test_kv_of_one_adapter_is_never_another_s(llama: Judge) -> None:
    engine = make_engine(llama.model, llama.paths)
    requests = [Request(PROMPT, name) for name in ("all", None, "q-v", "bf16")]
    assert [cached_tokens(engine, request) for request in requests] == [0, 0, 0, 0]
    assert [cached_tokens(engine, request) for request in requests] == [FULL] * 4


def test_nor_while_it_is_in_flight(llama: Judge) -> None:
    engine = make_engine(llama.model, llama.paths)
    requests = [Request(PROMPT, name) for name in ("all", None, "q-v", "all", "q-v")]
    llama.check(requests, run(engine, requests))
    assert engine.stats.cached_tokens == 2 * FULL


def test_salt_and_segments_count_beside_the_adapter(llama: Judge) -> None:
    engine = make_engine(llama.model, llama.paths)
    found = []
    for salt in (b"", b"tenant"):
        for segments in ((), ((0, 100),)):
            for adapter in (None, "all", "q-v"):
                engine.add(
                    0,
                    array("i", PROMPT),
                    greedy(1),
                    salt=salt,
                    segments=segments,
                    adapter=adapter,
                )
                found.append(finish(engine, {})[0])
    assert found == [0] * 12


def test_a_salt_cannot_pass_for_an_adapter(llama: Judge) -> None:
    engine = make_engine(llama.model, llama.paths)
    assert cached_tokens(engine, Request(PROMPT, "all")) == 0
    digest = engine._adapters.get("all").digest
    for salt in (digest, bytes([0, len(digest)]) + digest, bytes([len(digest)]) + digest):
        engine.add(0, array("i", PROMPT), greedy(1), salt=salt)
        assert finish(engine, {})[0] == 0


def test_other_weights_of_the_same_name(llama: Judge, lora: Any, tmp_path: Path) -> None:
    """Not even the scaling may differ; the same adapter loaded again finds its KV."""
    engine = make_engine(llama.model)
    others: list[dict[str, Any]] = [{}, {"seed": 6}, {"r": 9}, {"targets": ("q_proj",)}]
    # The same tensors in another place:
    others += [{"targets": ("q_proj",), "layers": (0,)}, {"targets": ("q_proj",), "layers": (1,)}]
    paths = [lora.write(llama.model, **{"seed": 5, **options}) for options in others]
    scaled = Path(shutil.copytree(paths[0], tmp_path / "scaled"))
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 16.5}))
    for path in (*paths, scaled):
        engine.load_adapter("name", str(path))
        assert cached_tokens(engine, Request(PROMPT, "name")) == 0
        engine.unload_adapter("name")
    engine.load_adapter("other name", str(paths[0]))
    assert cached_tokens(engine, Request(PROMPT, "other name")) == FULL


# ------------------------------------------------------------------------------- life


def test_unloaded_while_requests_run(llama: Judge, references: Callable[[Path], Any]) -> None:
    """They finish with the weights they began with, those that wait or are preempted, too."""
    page = make_engine(llama.model)._page_bytes
    engine = make_engine(llama.model, kv_memory=12 * page, max_model_len=192, max_running=3)
    engine.load_adapter("name", str(llama.paths["all"]))
    draw = random.Random(9)
    prompts = [PROMPT, *(some(draw, 40) for _ in range(4))]
    outputs: dict[int, list[int]] = {i: [] for i in range(6)}
    for i, prompt in enumerate(prompts):
        add(engine, i, Request(prompt, "name"), 70)
    for _ in range(4):
        for output in engine.step():
            outputs[output.id].extend(output.token_ids)
    assert outputs[0]
    assert not outputs[4]  # it waits
    engine.unload_adapter("name")
    with pytest.raises(RequestError, match="no adapter called 'name'") as caught:
        add(engine, 9, Request(PROMPT, "name"))
    assert caught.value.param == "model"
    engine.load_adapter("name", str(llama.paths["bf16"]))
    add(engine, 5, Request(PROMPT, "name"), 70)
    finish(engine, outputs)
    assert engine.stats.preemptions > 0
    before = [Request(prompt, "all") for prompt in prompts]
    llama.check([*before, Request(PROMPT, "bf16")], [outputs[i] for i in range(6)], 70)


def test_what_is_told_of_an_adapter(llama: Judge, lora: Any) -> None:
    path = lora.write(
        llama.model,
        targets=("q_proj", "down_proj"),
        layers=(0,),
        r=4,
        rank_pattern={"q_proj": 6},
        segment_mask="turns",
    )
    engine = make_engine(llama.model, {"first": path})
    (info,) = engine.model.adapters
    assert info.name == "first"
    assert info.path == str(path)
    assert info.rank == 6
    assert info.targets == ["q_proj", "down_proj"]
    assert info.num_bytes == (path / "adapter_model.safetensors").stat().st_size
    assert info.segment_mask == "turns"
    assert engine.load_adapter("second", str(llama.paths["all"])).segment_mask is None


def test_names_and_numbers(llama: Judge, lora: Any) -> None:
    engine = make_engine(llama.model, {"a": llama.paths["all"]}, max_adapters=2)
    path = str(llama.paths["q-v"])
    with pytest.raises(RequestError, match="'a' is loaded already") as taken:
        engine.load_adapter("a", path)
    engine.load_adapter("b", path)
    with pytest.raises(RequestError, match=r"2 adapters are loaded, .*unload one first") as many:
        engine.load_adapter("c", path)
    for caught in (taken, many):
        assert caught.value.param == "lora_name"
    for unknown in ("c", ""):
        with pytest.raises(RequestError, match=f"no adapter called '{unknown}'"):
            engine.unload_adapter(unknown)
        with pytest.raises(RequestError, match=f"no adapter called '{unknown}'"):
            add(engine, 0, Request(PROMPT, unknown))
    assert not engine.has_work
    engine.unload_adapter("a")
    engine.load_adapter("c", path)
    with pytest.raises(RequestError, match="1 adapters are loaded, and --max-loras"):
        make_engine(llama.model, llama.paths, max_adapters=1)


def test_an_adapter_that_overflows_ends_its_own_requests(llama: Judge, lora: Any) -> None:
    broken = lora.write(llama.model, size=1e30)
    engine = make_engine(llama.model, {**llama.paths, "broken": broken})
    requests = [Request(PROMPT, "all"), Request(PROMPT, None)]
    outputs: dict[int, list[int]] = {}
    for i, request in enumerate([*requests, Request(PROMPT, "broken")]):
        add(engine, i, request)
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.id, []).extend(output.token_ids)
            reasons[output.id] = output.finish_reason
        engine.check()
    assert reasons == {0: "length", 1: "length", 2: "error"}
    assert outputs[2] == []
    llama.check(requests, [outputs[0], outputs[1]])
