"""Adapter folders that cannot be served: one line that names the file and what is wrong in it."""

from __future__ import annotations

import json
import random
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ModelError
from headstart.engine.models.adapters import HARMLESS, Adapter, load_adapter
from headstart.engine.models.config import ModelConfig
from headstart.engine.sampling.params import SamplingParams
from headstart.kernels.devices import load_backend

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.1"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def folder(model: Path, lora: Any, tmp_path: Path) -> Path:
    """A good adapter that may be written into."""
    return Path(shutil.copytree(lora.write(model), tmp_path / "adapter"))


Load = Callable[[Path], Adapter]


@pytest.fixture(scope="module")
def load(model: Path) -> Load:
    config = ModelConfig.from_folder(model)
    backend = load_backend("reference", isa="auto", weights="f32", threads=2)
    return lambda folder: load_adapter("name", folder, config, backend, None)


def refusal(load: Load, folder: Path) -> str:
    """The message, which is one line of readable length."""
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600 + 2 * len(str(folder))
    message.encode()
    return message


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Tensors of layer 1 by the end of their names; None leaves one out."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(f"{LAYER}.{name}", None)
        if tensor is not None:
            tensors[f"{LAYER}.{name}"] = tensor
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


# ------------------------------------------------------------------------------- settings

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, r"use_dora \(DoRA\) is not supported"),
    ({"bias": "all"}, "trained biases .* bias must be 'none'"),
    ({"bias": "lora_only"}, "trained biases"),
    ({"bias": None}, "trained biases"),
    ({"lora_bias": True}, "trained biases .* lora_bias false"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
    *(
        ({"init_lora_weights": how}, f"init_lora_weights is '{how}', which changes the model's own")
        for how in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    ),
    ({"modules_to_save": ["lm_head"]}, r"'modules_to_save' is \['lm_head'\], .* not supported"),
    ({"trainable_token_indices": [1]}, "'trainable_token_indices'"),
    ({"layer_replication": [[0, 2]]}, "'layer_replication'"),
    ({"target_parameters": ["a"]}, "'target_parameters'"),
    ({"use_qalora": True}, "'use_qalora'"),
    ({"alora_invocation_tokens": [5]}, "'alora_invocation_tokens'"),
    ({"arrow_config": {"top_k": 3}}, "'arrow_config'"),
    ({"of_next_year": 1.5}, "'of_next_year' is 1.5, which is not supported"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only 'LORA'"),
    ({"peft_type": "lora"}, "peft_type is 'lora'"),
    ({"peft_type": None}, "peft_type is None"),
    *(
        ({key: {name: 8}}, f"{key} has .*names of modules are supported, patterns are not")
        for key in ("rank_pattern", "alpha_pattern")
        for name in ("^q_proj", ".*_proj", "(q|k)_proj", "q_proj$", "layers[.]1.q_proj", "", "q\n")
    ),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
    ({"alpha_pattern": ""}, "alpha_pattern must be an object"),
    ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] must be a number above 0"),
    ({"rank_pattern": {"q_proj": 8.0}}, r"rank_pattern\['q_proj'\] must be a whole number"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a whole number above 0"),
    *(
        ({"r": r}, "r must be a whole number above 0")
        for r in (0, -8, True, False, 8.0, "8", None, [], 10**30, 1e400)
    ),
    *(
        ({"lora_alpha": alpha}, "lora_alpha must be a number above 0")
        for alpha in (0, -1.5, True, "16", None, {}, 10**4000, float("nan"), float("inf"), 1e6)
    ),
    ({"r": 257}, "layers.0.self_attn.q_proj has rank 257; ranks to 256 are supported"),
    ({"rank_pattern": {"1.mlp.up_proj": 999}}, "layers.1.mlp.up_proj has rank 999"),
    *(({"use_rslora": v}, "use_rslora must be true or false") for v in ("false", 2, [], {})),
    *(
        ({"segment_mask": v}, "segment_mask must be one of causal, turns; got")
        for v in ("blocks", "", "Turns", True, ["turns"], {}, 1)
    ),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[str(c)[:40] for c, _ in REFUSED])
def test_settings(load: Load, folder: Path, changes: dict[str, Any], named: str) -> None:
    change_settings(folder, **changes)
    message = refusal(load, folder)
    assert message.startswith(f"{folder / CONFIG}: ")
    with pytest.raises(ModelError, match=named):
        load(folder)


HARMLESS_VALUES = {
    "modules_to_save": None,
    "layers_to_transform": [0, 1],
    "exclude_modules": ["lm_head"],
    "megatron_core": "megatron.core",
    "init_lora_weights": "gaussian",
    "lora_dropout": 0.1,
    "peft_version": "0.21.2",
    "of_next_year": False,
    "use_rslora": None,
    "segment_mask": "causal",
    "rank_pattern": {"lm_head": 5},
}


def test_settings_that_change_nothing(load: Load, folder: Path) -> None:
    before = load(folder).digest
    change_settings(folder, **HARMLESS_VALUES)
    assert load(folder).digest == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\x80", "not valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"LORA"', "not a JSON object"),
        (b"{}", "peft_type is None"),
    ],
)
def test_config_files(load: Load, folder: Path, text: bytes, named: str) -> None:
    (folder / CONFIG).write_bytes(text)
    assert refusal(load, folder).startswith(f"{folder / CONFIG}: {named}")


def test_deeply_nested_settings(load: Load, folder: Path) -> None:
    """Whatever json accepts can be shown."""
    found = set()
    for depth in (10, 500, *range(880, 1000)):
        nested = "[" * depth + "]" * depth
        (folder / CONFIG).write_text(f'{{"peft_type": "LORA", "x": {nested}}}')
        found.add(refusal(load, folder).removeprefix(f"{folder / CONFIG}: ")[:14])
    assert found == {"'x' is [[[[[[[", "not valid JSON"}


# ------------------------------------------------------------------------------- files


def test_missing_files(load: Load, folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert refusal(load, folder) == (
        f"{folder}: holds no {WEIGHTS} (adapter_model.bin is not read: convert it)"
    )
    (folder / "adapter_model.bin").unlink()
    assert refusal(load, folder) == f"{folder}: holds no {WEIGHTS}"
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).write_bytes(b"")
    named = f"{folder / CONFIG}: cannot be read: No such file or directory"
    assert refusal(load, folder) == named
    absent = tmp_path / "absent"
    assert refusal(load, absent).startswith(f"{absent / CONFIG}: cannot be read: No such file")
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be read: Not a directory" in refusal(load, file)


def test_folders_in_the_place_of_files(load: Load, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert str(folder / WEIGHTS) in refusal(load, folder)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert "cannot be read: Is a directory" in refusal(load, folder)


@pytest.mark.parametrize(("name", "why"), [("a\0b", "embedded null"), ("x" * 5000, "too long")])
def test_names_no_file_has(load: Load, name: str, why: str) -> None:
    assert f"{CONFIG}: cannot be read: " in refusal(load, Path(name))
    with pytest.raises(ModelError, match=why):
        load(Path(name))


# ------------------------------------------------------------------------------- tensors


def named_tensor(name: str) -> dict[str, Tensor]:
    return {name: torch.zeros(8, 8)}


@pytest.mark.parametrize(
    "name",
    [
        "mlp.up_proj.lora_magnitude_vector",
        "mlp.up_proj.lora_B.bias",
        "mlp.up_proj.lora_A.default.weight",
        "mlp.fc1.lora_A.weight",
        "self_attn.up_proj.lora_A.weight",
        "input_layernorm.weight",
        "mlp.up_proj.lora_A.weight\n",
    ],
)
def test_tensors_of_a_layer_that_are_not_computed(load: Load, folder: Path, name: str) -> None:
    change_tensors(folder, **named_tensor(name))
    message = refusal(load, folder)
    assert message.startswith(f"{folder / WEIGHTS}: tensor {f'{LAYER}.{name}'!r} is not supported")
    assert "may change mlp.down_proj, mlp.gate_proj" in message


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.00.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.\N{ARABIC-INDIC DIGIT ONE}.mlp.up_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "x" * 10_000,
        "",
    ],
)
def test_tensors_elsewhere(load: Load, folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({**tensors, **named_tensor(name)}, folder / WEIGHTS)
    message = refusal(load, folder)
    assert message.startswith(f"{folder / WEIGHTS}: tensor ")
    assert "is not supported; adapters may change" in message
    assert name[:100] in message


@pytest.mark.parametrize("letter", "AB")
def test_half_a_pair(load: Load, folder: Path, letter: str) -> None:
    name = f"mlp.up_proj.lora_{letter}.weight"
    change_tensors(folder, **{name: None})
    expected = f"tensor {LAYER}.{name} is missing from {folder / WEIGHTS}"
    assert refusal(load, folder) == expected


def test_no_tensors(load: Load, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    save_file({}, folder / WEIGHTS)
    assert refusal(load, folder) == f"{folder / WEIGHTS}: holds no tensors"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.up_proj.lora_A.weight", (7, 64)),  # r says 8
        ("mlp.up_proj.lora_A.weight", (8, 576)),  # of another model
        ("mlp.up_proj.lora_A.weight", (64, 8)),
        ("mlp.up_proj.lora_B.weight", (8, 96)),
        ("mlp.up_proj.lora_B.weight", (96, 7)),
        ("mlp.up_proj.lora_B.weight", (96 * 8,)),
        ("self_attn.k_proj.lora_B.weight", (64, 8)),  # as many key heads as query heads
        ("mlp.up_proj.lora_A.weight", (8, 0)),
        ("mlp.up_proj.lora_A.weight", ()),
    ],
)
def test_shapes(load: Load, folder: Path, name: str, shape: tuple[int, ...]) -> None:
    change_tensors(folder, **{name: torch.zeros(shape)})
    shown = "[" + ", ".join(map(str, shape)) + "]"
    assert f"tensor {LAYER}.{name} in {folder / WEIGHTS} has shape {shown}" in refusal(load, folder)


def test_a_rank_that_is_not_the_tensors(load: Load, folder: Path) -> None:
    change_settings(folder, rank_pattern={"layers.1.mlp.up_proj": 4})
    message = refusal(load, folder)
    assert f"tensor {LAYER}.mlp.up_proj.lora_A.weight in " in message
    assert "has shape [8, 64], the config asks for [4, 64]" in message


def test_more_layers_than_the_model(load: Load, lora: Any, tiny_model: Any) -> None:
    other = tiny_model("llama", num_hidden_layers=3)
    message = refusal(load, lora.write(other))
    assert ".layers.2." in message
    assert "is of layer 2; the model has 2: the adapter is of another model" in message


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number(load: Load, folder: Path, letter: str, bad: float) -> None:
    name = f"self_attn.v_proj.lora_{letter}.weight"
    tensor = load_file(folder / WEIGHTS)[f"{LAYER}.{name}"]
    tensor[3, 5] = bad
    change_tensors(folder, **{name: tensor})
    message = refusal(load, folder)
    assert message.startswith(f"{folder / WEIGHTS}: tensor {LAYER}.{name} holds NaN or infinity")


def test_numbers_that_overflow_once_scaled(load: Load, folder: Path) -> None:
    change_settings(folder, lora_alpha=1600)
    change_tensors(folder, **{"mlp.up_proj.lora_B.weight": torch.full((96, 8), 3e38)})
    assert "up_proj.lora_B.weight holds NaN or infinity, or does once scaled" in refusal(
        load, folder
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_types(load: Load, folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, **{"mlp.up_proj.lora_A.weight": torch.zeros(8, 64).to(dtype)})
    message = refusal(load, folder)
    assert f"tensor {LAYER}.mlp.up_proj.lora_A.weight in {folder / WEIGHTS} is stored as" in message


# ------------------------------------------------------------------------------- damage


def outcome(load: Load, folder: Path) -> str:
    try:
        load(folder)
    except ModelError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert len(message) < 600 + 2 * len(str(folder))
        message.encode()
        return "refused"
    return "loaded"


def replace_weights(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)  # a new inode: old maps stay valid
    (folder / WEIGHTS).write_bytes(data)


def test_truncated_weights(load: Load, folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for length in (*range(40), *range(40, len(whole), 611), len(whole) - 1):
        replace_weights(folder, whole[:length])
        assert refusal(load, folder).startswith(f"{folder / WEIGHTS}: truncated or not a safe")


def test_flipped_bits(load: Load, folder: Path) -> None:
    """In the header, where names, types, shapes and places are."""
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw, found = random.Random(0), {"loaded": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 2)):
            data[draw.randrange(header)] ^= 1 << draw.randrange(8)
        replace_weights(folder, bytes(data))
        found[outcome(load, folder)] += 1
    assert found["refused"] > 250


@pytest.fixture(scope="module")
def fuzzed(model: Path, lora: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("fuzzed") / "adapter"
    return Path(shutil.copytree(lora.write(model, targets=("v_proj", "up_proj")), copy))


FUZZ = settings(
    max_examples=3 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_as_weights(load: Load, fuzzed: Path, data: bytes) -> None:
    length = len(data).to_bytes(8, "little")
    whole = (fuzzed / WEIGHTS).read_bytes()
    try:
        for content in (data, length + data, length + b"{" + data):
            replace_weights(fuzzed, content)
            assert outcome(load, fuzzed) == "refused"
    finally:
        replace_weights(fuzzed, whole)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 300)
    | st.floats()
    | st.text()
    | st.sampled_from(["LORA", "none", "turns", "q_proj", "\ud800", "\u2028", "0" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["q_proj", "mlp.up_proj"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*sorted(HARMLESS), "use_dora", "lora_bias", "modules_to_save"])


@FUZZ
@given(changes=st.dictionaries(KEYS | st.text(), JSON, max_size=3), drop=st.sets(KEYS, max_size=1))
def test_any_settings(load: Load, fuzzed: Path, changes: dict[str, Any], drop: set[str]) -> None:
    whole = (fuzzed / CONFIG).read_text()
    found = {key: v for key, v in {**json.loads(whole), **changes}.items() if key not in drop}
    try:
        (fuzzed / CONFIG).write_text(json.dumps(found))
        outcome(load, fuzzed)
    finally:
        (fuzzed / CONFIG).write_text(whole)


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_settings_of_any_type(load: Load, folder: Path, key: str) -> None:
    found = {"loaded": 0, "refused": 0}
    for value in (None, True, 0, -1, 1e308, "x", "x" * 10_000, [], [1], {}, {"a": 1}, {"a": {}}):
        change_settings(folder, **{key: value})
        found[outcome(load, folder)] += 1
    if key in ("r", "peft_type"):
        assert not found["loaded"]


@FUZZ
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_settings(load: Load, fuzzed: Path, data: bytes) -> None:
    whole = (fuzzed / CONFIG).read_bytes()
    try:
        (fuzzed / CONFIG).write_bytes(data)
        assert outcome(load, fuzzed) == "refused"
    finally:
        (fuzzed / CONFIG).write_bytes(whole)


# ------------------------------------------------------------------------------- the engine


def test_a_failed_load_leaves_nothing_behind(model: Path, folder: Path) -> None:
    config = EngineConfig(model_path=str(model), weights="f32", kv_memory=1 << 22, max_adapters=1)
    engine = Engine(config)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    expected = engine.generate([[5, 6, 7]], params)
    change_settings(folder, r=4)  # the first tensors are read before it shows
    for _ in range(3):
        with pytest.raises(ModelError, match="has shape"):
            engine.load_adapter("name", str(folder))
    change_settings(folder, r=8)
    engine.load_adapter("name", str(folder))
    assert engine.generate([[5, 6, 7]], params) == expected
    engine.add(0, array("i", [5, 6, 7]), params, adapter="name")
    while engine.has_work:
        engine.step()
    engine.check()


def test_an_engine_does_not_start_without_its_adapters(model: Path, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    config = EngineConfig(
        model_path=str(model), weights="f32", kv_memory=1 << 22, adapters={"name": str(folder)}
    )
    with pytest.raises(ModelError, match=f"holds no {WEIGHTS}"):
        Engine(config)
