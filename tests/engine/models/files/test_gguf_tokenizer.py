"""Tokenizers of GGUF files give llama.cpp's tokens, which `bench.tokens --write` has kept."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from headstart.bench.token_texts import digest, texts
from headstart.bench.token_vocabularies import Vocabulary
from headstart.bench.tokens import comparable, ours
from headstart.engine.errors import ModelError
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.gguf_tokenizer import MAX_ADDED, MAX_PIECE, write_tokenizer
from headstart.engine.models.files.pre_tokenizers import DEFAULT, PRE_TOKENIZERS

KEPT = Path(__file__).with_name("llama_cpp_tokens.json")
GROUPS: dict[Any, list[str]] = {}
for name, pre in PRE_TOKENIZERS.items():
    GROUPS.setdefault(pre, []).append(name)


@pytest.fixture(scope="module")
def kept() -> Any:
    answers = json.loads(KEPT.read_text(encoding="utf-8"))
    assert answers["texts"] == digest(texts())
    return answers


@pytest.fixture(scope="module")
def pairs(kept: Any) -> Vocabulary:
    return Vocabulary(**kept["byte pairs"])


@pytest.fixture(scope="module")
def pieces(kept: Any) -> Vocabulary:
    return Vocabulary(**kept["pieces"])


def convert(path: Path, folder: Path, **keys: Any) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of the GGUF file, after its keys (``__`` for a dot) are set or, None, gone."""
    file = GGUFFile(path)
    for name, value in keys.items():
        key = f"tokenizer.{name.replace('__', '.')}"
        file.metadata.pop(key, None)
        if value is not None:
            file.metadata[key] = value
    folder.mkdir(exist_ok=True)
    warnings = write_tokenizer(file, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), warnings


def test_default_model(kept: Any, smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    wanted = texts()
    assert len(wanted) == len(kept["default model"]) == 2000
    for text, tokens in zip(wanted, kept["default model"], strict=True):
        assert tokenizer.encode(text).ids == tokens, text
    tokenizer.encode_special_tokens = True
    plain = [tokenizer.encode(text).ids for text in wanted]
    assert digest(plain) == kept["default model, special tokens as text"]


def test_every_name_was_asked(kept: Any) -> None:
    assert kept["names"].keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("names", GROUPS.values(), ids=lambda names: names[0])
def test_names(kept: Any, pairs: Vocabulary, tmp_path: Path, names: list[str]) -> None:
    pairs.write(tmp_path / "m.gguf", names[0])
    found = digest(ours(tmp_path / "m.gguf", comparable(names[0], texts())))
    assert {name: kept["names"][name] for name in names} == dict.fromkeys(names, found)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("names", GROUPS.values(), ids=lambda names: names[0])
def test_a_long_run_takes_no_more_than_its_length(
    pairs: Vocabulary, tmp_path: Path, names: list[str]
) -> None:
    """A pattern that is tried anew at each character of a run takes minutes for these, which two
    did, and hours for the longest that a server takes."""
    pairs.write(tmp_path / "m.gguf", names[0])
    tokenizer, _ = convert(tmp_path / "m.gguf", tmp_path / "converted")
    count = 4_000_000 if "jais-2" in names else 500_000  # its pattern took a 512th of others' time
    for end in ("", "1"):
        assert tokenizer.encode(" " * count + end, add_special_tokens=False).ids


def test_names_differ_in_their_tokens(kept: Any) -> None:
    """The texts tell most patterns apart."""
    assert len(set(kept["names"].values())) > 20


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(kept: Any, pieces: Vocabulary, tmp_path: Path, prefix: bool) -> None:
    pieces.write(tmp_path / "m.gguf", add_space_prefix=prefix)
    assert digest(ours(tmp_path / "m.gguf", texts())) == kept["prefixes"][str(prefix)]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_text_comes_back(pieces: Vocabulary, tmp_path: Path, prefix: bool) -> None:
    pieces.write(tmp_path / "m.gguf", add_space_prefix=prefix)
    tokenizer, warnings = convert(tmp_path / "m.gguf", tmp_path / "out", ggml__add_bos_token=False)
    assert warnings == []
    for text in ("the  fox", " a", "漢字 🦊", "x\n\ny"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("pre", "said"), [(None, "is missing"), ("smoothie", "'smoothie'")])
def test_without_a_known_name(
    pairs: Vocabulary, tmp_path: Path, pre: str | None, said: str
) -> None:
    pairs.write(tmp_path / "m.gguf", pre)
    tokenizer, [warning] = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert "tokenizer.ggml.pre" in warning
    assert said in warning
    assert "default" in warning
    pairs.write(tmp_path / "default.gguf", "default")
    default, warnings = convert(tmp_path / "default.gguf", tmp_path / "out")
    assert warnings == []
    assert tokenizer.to_str() == default.to_str()
    assert PRE_TOKENIZERS["default"] is DEFAULT


def test_what_is_put_around_a_text(pairs: Vocabulary, tmp_path: Path) -> None:
    path, out = tmp_path / "m.gguf", tmp_path / "out"
    bos, eos = pairs.tokens.index("<s>"), pairs.tokens.index("<|im_end|>")
    for pre, keys, around in (
        ("gpt-2", {}, ([], [])),
        ("llama-bpe", {}, ([bos], [])),
        ("llama-bpe", {"ggml__add_bos_token": False}, ([], [])),
        ("gpt-2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, ([bos], [eos])),
        ("llama-bpe", {"ggml__bos_token_id": None}, ([], [])),
    ):
        pairs.write(path, pre)
        encoding = convert(path, out, **keys)[0].encode("7")
        assert encoding.ids == [*around[0], pairs.tokens.index("7"), *around[1]]
        assert encoding.tokens[0] == ("<s>" if around[0] else "7")


def test_special_tokens(pairs: Vocabulary, tmp_path: Path) -> None:
    """Control tokens are not shown; those a user defined are, and both are found in text."""
    pairs.write(tmp_path / "m.gguf", "gpt-2")
    types = np.array(pairs.types)
    types[pairs.tokens.index("<|im_end|>")] = 1  # its name says what it is
    tokenizer, _ = convert(tmp_path / "m.gguf", tmp_path / "out", ggml__token_type=types)
    encoding = tokenizer.encode("a<|im_end|><think>")
    assert encoding.tokens == ["a", "<|im_end|>", "<think>"]
    assert tokenizer.decode(encoding.ids) == "a<think>"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "<|im_end|>")
    assert "pad_token" not in settings


def test_chat_templates(pairs: Vocabulary, tmp_path: Path) -> None:
    path, out = tmp_path / "m.gguf", tmp_path / "out"
    pairs.write(path, "gpt-2")
    convert(path, out)
    assert not (out / "chat_template.jinja").exists()
    convert(path, out, chat_template="{{ é }}")
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == "{{ é }}"
    convert(path, out, chat_template="a", chat_template__tool_use="b")
    assert (out / "chat_template.jinja").read_text() == "a"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "b"


def test_an_id_beyond_the_tokens_is_none(pairs: Vocabulary, tmp_path: Path) -> None:
    pairs.write(tmp_path / "m.gguf", "llama-bpe")
    tokenizer, [warning] = convert(
        tmp_path / "m.gguf", tmp_path / "out", ggml__bos_token_id=2**32 - 1
    )
    assert "tokenizer.ggml.bos_token_id is 4294967295" in warning
    assert tokenizer.encode("7").tokens == ["7"]


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"ggml__model": None}, "tokenizer.ggml.model is ''"),
    ({"ggml__model": "bert"}, "tokenizer.ggml.model is 'bert'; supported are 'gpt2' and 'llama'"),
    ({"ggml__model": 3}, "tokenizer.ggml.model must be a string"),
    ({"ggml__pre": 3}, "tokenizer.ggml.pre must be a string"),
    ({"ggml__tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"ggml__tokens": "a"}, "tokenizer.ggml.tokens must be an array of strings"),
    ({"ggml__tokens": np.arange(3)}, "tokenizer.ggml.tokens must be an array of strings"),
    ({"ggml__tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens has 'a' twice"),
    ({"ggml__token_type": np.ones(3)}, "tokenizer.ggml.token_type must be an array of integers"),
    ({"ggml__token_type": np.ones(3, int)}, "tokenizer.ggml.token_type has 3 entries for"),
    ({"ggml__token_type": ["a"]}, "tokenizer.ggml.token_type must be an array of integers"),
    ({"ggml__merges": None}, "tokenizer.ggml.merges is missing"),
    ({"ggml__merges": ["a"]}, "tokenizer.ggml.merges has 'a', at 0,"),
    ({"ggml__merges": ["a b", "a €"]}, "tokenizer.ggml.merges has 'a b', at 0,"),
    ({"ggml__merges": ["e r", " "]}, "tokenizer.ggml.merges has ' ', at 1,"),
    ({"ggml__bos_token_id": "1"}, "tokenizer.ggml.bos_token_id must be an integer"),
    ({"ggml__eos_token_id": True}, "tokenizer.ggml.eos_token_id must be an integer"),
    ({"ggml__add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be true or false"),
    ({"ggml__add_eos_token": "no"}, "tokenizer.ggml.add_eos_token must be true or false"),
    ({"chat_template": 5}, "tokenizer.chat_template must be a string"),
    ({"chat_template__tool_use": 5}, r"tokenizer.chat_template.tool_use must be a string"),
    ({"ggml__model": "llama"}, "tokenizer.ggml.scores is missing"),
    (
        {"ggml__model": "llama", "ggml__scores": np.full(1304, np.nan, np.float32)},
        "tokenizer.ggml.scores holds numbers that are not finite",
    ),
    (
        {"ggml__model": "llama", "ggml__scores": np.zeros(9)},
        "tokenizer.ggml.scores has 9 entries for 1304 tokens",
    ),
    (
        {
            "ggml__model": "llama",
            "ggml__tokens": ["a" * (MAX_PIECE + 1)],
            "ggml__scores": np.zeros(1),
            "ggml__token_type": None,
        },
        "tokenizer.ggml.tokens has one of 513 characters",
    ),
    (
        {
            "ggml__tokens": [str(i) for i in range(MAX_ADDED + 1)],
            "ggml__token_type": np.full(MAX_ADDED + 1, 3),
            "ggml__merges": [],
        },
        "tokenizer.ggml.token_type names more than 65536 special tokens",
    ),
]


@pytest.mark.parametrize(("keys", "said"), BROKEN, ids=[said[:60] for _, said in BROKEN])
def test_refused_by_key(pairs: Vocabulary, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    path = tmp_path / "m.gguf"
    pairs.write(path, "gpt-2")
    with pytest.raises(ModelError) as caught:
        convert(path, tmp_path / "out", **keys)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


def test_more_tokens_than_embeddings(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama"), path)
    tokens = [*GGUFFile(path).metadata["tokenizer.ggml.tokens"], "one more"]
    with pytest.raises(ModelError, match=r"are 321, token_embd\.weight has fewer"):
        convert(path, tmp_path / "out", ggml__tokens=tokens)


ODD: list[Any] = [
    *(0, -1, 2**63, True, False, 1.5, float("nan"), "", "gpt2", "llama", "\n", "$A:0", None),
    *([], [""], ["", ""], ["a b"] * 3, ["\0", " ", "\n", "$A", "a:1"], np.zeros(0)),
    *(np.full(300, 4), np.full(300, 3, np.int8), np.full(300, 1e30), np.full(300, -1)),
]


def outcome(path: Path, folder: Path, keys: dict[str, Any]) -> str | None:
    """What a tokenizer is refused with; one that loads is used."""
    try:
        tokenizer, warnings = convert(path, folder, **keys)
    except ModelError as error:
        return str(error)
    tokenizer.decode(tokenizer.encode("a <s>\0 b").ids)
    assert all("\n" not in warning for warning in warnings)
    return None


@pytest.mark.parametrize("kind", ["pairs", "pieces"])
def test_any_metadata_loads_or_is_refused_in_one_line(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    whole: Vocabulary = request.getfixturevalue(kind)
    tokens = [*whole.tokens[:298], "<s>", "<|im_end|>"]
    if kind == "pieces":
        tokens = whole.tokens[:300]
    small = Vocabulary(tokens, whole.types[:300], whole.merges[:30], whole.scores[:300])
    path = tmp_path / "m.gguf"
    small.write(path, "llama-bpe" if kind == "pairs" else None)
    before = {
        key.removeprefix("tokenizer.").replace(".", "__"): value
        for key, value in GGUFFile(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    rng = random.Random(kind)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        changed = {}
        for key in rng.sample(sorted(before), rng.randrange(1, 3)):
            changed[key] = rng.choice(ODD)
            if isinstance(before[key], list) and rng.random() < 0.7:  # almost as it was
                changed[key] = [*before[key]]
                place = rng.randrange(len(changed[key]))
                changed[key][place] = rng.choice(["", " ", "x y", "\0", "a", "$A", "é"])
        said = outcome(path, tmp_path / "out", changed)
        if said is None:
            outcomes["loaded"] += 1
        else:
            assert said.startswith(f"{path}: tokenizer."), changed
            assert "\n" not in said
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes
