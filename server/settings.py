"""Every setting of the ``headstart`` command, said once.

    a flag                                   --max-n 4
    a variable of the environment            HEADSTART_MAX_N=4
    a line of the YAML file of --config      max-n: 4

A flag comes before a variable, a variable before the file, the file before the default. A class is
a group of --help; a command has the groups that it inherits from (cli/commands.py). The engine's
are described in engine/config.py. What a request may ask for at most is a 4xx that names the field,
when it goes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from headstart.engine.config import default_home
from headstart.engine.sampling.params import POOLINGS, Pooling
from headstart.server.http.keys import Keys
from headstart.server.values import (
    byte_size,
    count,
    existing_folder,
    host_name,
    host_port,
    named_folder,
    origin,
    port_number,
    positive,
    positive_or_env,
    seconds,
    seconds_or_never,
    traces_url,
)

MIB = 1024 * 1024

MANY_TOKENS = 64 * 1024
"""So many of a prompt are always looked at: it may be longer than the context, and be cut."""

TOOL_CALL_PARSERS = (
    *("auto", "none", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", "glm"),
    *("deepseek_v3", "deepseek_v31", "phi4", "granite", "tool_code", "harmony"),
)
REASONING_PARSERS = ("auto", "none", "think")
INSTRUCTION_SETS = (
    *("auto", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2"),
    *("neon_i8mm", "neon_dotprod", "portable"),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field is on the command line. ``parse``: text to a value; raises ArgumentTypeError.
    ``many``: one or more values. ``switch``: a flag without a value, and what it makes."""

    help: str
    parse: Callable[[str], Any] = str
    choices: Sequence[str] = ()
    metavar: str | None = None
    flag: str | None = None
    many: bool = False
    switch: bool | None = None
    positional: bool = False

    def flag_of(self, name: str) -> str:
        return self.flag or f"--{name.replace('_', '-')}"


def setting(
    default: Any,
    help: str,
    parse: Callable[[str], Any] = str,
    metavar: str | None = None,
    **more: Any,
) -> Any:
    """A field that is a setting. A flag of a bool is a switch to what is not its default; MISSING:
    there is none, so a value has to be given."""
    if isinstance(default, bool):
        more["switch"] = not default
    metadata = {"setting": Setting(help, parse, metavar=metavar, **more)}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(group: type[Any]) -> Iterator[tuple[Field[Any], Setting]]:
    """The settings of a group or a command."""
    for one in fields(group):
        if "setting" in one.metadata:
            yield one, one.metadata["setting"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    cache_dir: Path = field(
        default_factory=default_home,
        metadata={"setting": Setting("where models are kept", Path)},
    )


@dataclass(frozen=True, kw_only=True)
class Listen:
    TITLE: ClassVar = "HTTP"

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "0 picks a free one", port_number)
    shutdown_timeout: int = setting(
        30, "how long running requests may take to end after SIGTERM", positive, "SECONDS"
    )
    keep_alive_timeout: int = setting(
        5, "how long a connection without a request stays open", positive, "SECONDS"
    )
    head_timeout: float = setting(
        20.0,
        "how long a connection may take to send the head of a request, before it is closed",
        seconds,
        "SECONDS",
    )
    log_level: str = setting("info", "least to log", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True, kw_only=True)
class Requests:
    TITLE: ClassVar = "HTTP: requests"

    access_log_format: str = setting(
        "text", "of the line that each request gets; json: an object", choices=("text", "json")
    )
    unknown_fields: str = setting(
        "ignore",
        "fields of a request that no API knows: ignored, and named in x-headstart-ignored, or "
        "refused with a 400",
        choices=("ignore", "refuse"),
    )
    body_timeout: float = setting(
        60.0, "how long a request may take to send its body", seconds, "SECONDS"
    )
    request_timeout: float | None = setting(
        None,
        "the most that an answer may take, from the first byte of its request, and that requests "
        "may ask for (default: no limit)",
        seconds,
        "SECONDS",
    )
    ping_interval: float = setting(
        10.0,
        "the longest silence of a streamed answer, before it is filled with a comment that says "
        "nothing; 0: never",
        seconds_or_never,
        "SECONDS",
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        "send traces to this collector over OTLP/HTTP, as http://localhost:4318 (default: what "
        "the environment's OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT "
        "says, else none); needs the extra otel",
        traces_url,
        "URL",
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    TITLE: ClassVar = "model"

    served_model_name: Sequence[str] = setting(
        (),
        "names clients may use; answers carry the first (default: from MODEL)",
        metavar="NAME",
        many=True,
    )
    chat_template: Path | None = setting(
        None, "template of chats, in Jinja, in place of the model's own", Path, "FILE"
    )
    generation_config: str = setting(
        "auto",
        "temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens of requests that "
        "name none; auto: the model's generation_config.json if there is one; none: OpenAI's",
        metavar="auto|none|FILE",
    )


def limit(
    default: float,
    help: str,
    parse: Callable[[str], float] = positive,
    metavar: str = "N",
    flag: str | None = None,
) -> Any:
    return setting(default, help, parse, metavar, flag=flag)


@dataclass(frozen=True, kw_only=True)
class Limits:
    TITLE: ClassVar = "limits: the most that one request may ask for"

    max_body_bytes: int = limit(
        8 * MIB, "request body, as 8MiB", byte_size, "SIZE", "--max-body-size"
    )
    max_body_values: int = limit(
        256 * 1024, "numbers and texts in a body, where a list counts as 4 and an object as 16"
    )
    max_n: int = limit(16, "n and best_of")
    max_prompts: int = limit(64, "prompts of one completion")
    max_texts: int = limit(2048, "texts to embed, compare or rank in one request")
    max_text_contexts: int = limit(64, "their tokens, in contexts of the model")
    max_choices: int = limit(128, "choices in one request, prompts times n")
    max_messages: int = limit(4096, "messages in one chat")
    max_documents: int = limit(256, "documents beside one chat")
    max_stop: int = limit(64, "stop strings")
    max_stop_chars: int = limit(1024, "characters of a stop string")
    max_stop_token_ids: int = limit(256, "entries of stop_token_ids")
    max_logit_bias: int = limit(1024, "entries of logit_bias")
    max_allowed_token_ids: int = limit(4096, "entries of allowed_token_ids")
    max_bad_words: int = limit(128, "strings of bad_words")
    max_bad_word_chars: int = limit(256, "characters of one of them")
    max_schema_chars: int = limit(64 * 1024, "characters of a schema, regex or grammar")
    max_schema_depth: int = limit(64, "levels of objects and lists in a schema")
    max_choice: int = limit(1024, "strings of one choice, in structured outputs")
    max_tools: int = limit(128, "tools in one request")
    max_tool_bytes: int = limit(
        64 * 1024, "one of them as JSON", byte_size, "SIZE", "--max-tool-size"
    )
    max_stored_responses: int = limit(1024, "answers of /v1/responses kept")
    max_stored_bytes: int = limit(64 * MIB, "these, as 64MiB", byte_size, "SIZE")
    max_segments: int = limit(4096, "spans of one segment_mask")
    max_contexts: int = limit(
        4, "ids in one /detokenize, and tokens of a prompt, in contexts of the model"
    )
    max_template_kwarg_chars: int = limit(4096, "characters of a value in chat_template_kwargs")
    max_template_chars: int = limit(4 * MIB, "characters that a chat template writes")
    grammar_timeout: float = limit(
        5.0, "time that a schema or grammar takes to compile", seconds, "SECONDS"
    )
    template_timeout: float = limit(5.0, "time that a chat template takes", seconds, "SECONDS")


@dataclass(frozen=True, kw_only=True)
class SharedLimits:
    """Of all requests together: run-batch asks as many at a time as it wants."""

    TITLE: ClassVar = "limits of all requests together: a 503 beyond them"

    max_connections: int = limit(1024, "connections that are open")
    max_bodies_bytes: int = limit(
        64 * MIB,
        "request bodies that are being read, as 64MiB",
        byte_size,
        "SIZE",
        "--max-bodies-size",
    )
    max_waiting_texts: int = limit(
        1024, "requests that wait for their prompts to be rendered and tokenised"
    )
    max_waiting_grammars: int = limit(
        64, "requests that wait for their grammars or schemas to be checked"
    )


@dataclass(frozen=True, kw_only=True)
class Overload:
    """``max_queue``: None: 4 for each that may run, 1,024 at most."""

    TITLE: ClassVar = "overload: who is let in"

    max_queue: int | None = setting(
        None,
        "choices that may wait beyond the --max-running that are computed; more are refused with a "
        "503 that says when to come back (default: 4 times --max-running, 1024 at most)",
        positive,
        "N",
    )
    ttft_slo: float | None = setting(
        None,
        "refuse requests whose first token is predicted to come later than this, with a 503 that "
        "says when to come back (default: no limit)",
        seconds,
        "SECONDS",
    )
    rate_limit: int | None = setting(
        None,
        "requests a minute of each API key or, without keys, address; more are refused with a 429 "
        "(default: no limit)",
        positive,
        "N",
    )
    rate_limit_tokens: int | None = setting(
        None,
        "tokens a minute of each, prompts and answers together (default: no limit)",
        positive,
        "N",
    )


SEEN = (
    "; others on this machine can see them here, unlike those in a file or in the environment's "
    "HEADSTART_API_KEY and HEADSTART_ADMIN_KEY (with commas between)"
)
KEYS_OF_FILE = "more of them, one a line; lines that begin with # are comments"


@dataclass(frozen=True, kw_only=True)
class Access:
    TITLE: ClassVar = "access: keys and TLS"

    api_key: Sequence[str] = setting(
        (), f"everything but /health needs one{SEEN}", metavar="KEY", many=True
    )
    api_key_file: Path | None = setting(None, KEYS_OF_FILE, Path, "FILE")
    admin_key: Sequence[str] = setting(
        (), f"/metrics and loading adapters need one{SEEN}", metavar="KEY", many=True
    )
    admin_key_file: Path | None = setting(None, KEYS_OF_FILE, Path, "FILE")
    ssl_certfile: Path | None = setting(
        None, "certificate, and those in between, in PEM: HTTPS instead of HTTP", Path, "FILE"
    )
    ssl_keyfile: Path | None = setting(None, "its private key in PEM", Path, "FILE")
    ssl_keyfile_password_file: Path | None = setting(
        None, "the password of the private key", Path, "FILE"
    )


@dataclass(frozen=True, kw_only=True)
class Visitors:
    """``allowed_hosts``: without API keys, what Host may be beside this machine's loopback. None:
    neither Host nor Origin is looked at, for an app that no socket leads to."""

    TITLE: ClassVar = "access: who may ask, and share"

    shared_cache: bool = setting(
        False,
        "with several keys: all share one KV cache, so that each can find out by the time an "
        "answer takes whether another has sent a prompt",
    )
    cache_explain: bool = setting(
        True,
        "refuse cache_explain, whose answers show a client a few words of earlier prompts of the "
        "same key and cache_salt: where clients that do not trust each other share a key",
        flag="--no-cache-explain",
    )
    allowed_hosts: Sequence[str] | None = setting(
        (),
        "without keys: names and addresses, beside localhost and its own, that the server is "
        "asked under (the header Host), * for all",
        host_name,
        "HOST",
        many=True,
    )
    allowed_origins: Sequence[str] = setting(
        (),
        "web pages that may ask from a browser (CORS), * for all (default: none but, without "
        "keys, those of the server's own address)",
        origin,
        "ORIGIN",
        many=True,
    )
    lora_dir: Path | None = setting(
        None,
        "folder whose adapters may be loaded, and any unloaded, at run time over HTTP (default: "
        "none may)",
        existing_folder,
        "DIR",
    )


@dataclass(frozen=True, kw_only=True)
class Answers:
    TITLE: ClassVar = "answers: segment masks, tool calls, reasoning, vectors"

    segment_mask: str | None = setting(
        None,
        "of chats that name none (default: what the config of the model declares, else causal); "
        "an adapter's config comes before it",
        choices=("causal", "turns"),
    )
    tool_call_parser: str = setting(
        "auto",
        "how the model writes calls of tools; auto: as its chat template says",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = setting(
        "auto",
        "how it writes what it thinks before it answers; think: between <think> and </think>; "
        "auto: so if its chat template or its vocabulary knows these",
        choices=REASONING_PARSERS,
    )
    pooling: Pooling | None = setting(
        None,
        "which hidden state is the vector of a prompt: its last token's, the mean of all, its "
        "first token's (default: what the model's sentence-transformers settings say, else last)",
        choices=POOLINGS,
    )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Defaults are those of EngineConfig."""

    TITLE: ClassVar = "engine"

    backend: str = setting(
        "auto",
        "who computes (default: an NVIDIA GPU if torch sees one, else the CPU)",
        choices=("auto", "gpu", "cpu", "reference"),
    )
    isa: str = setting(
        "auto",
        "instruction set of the CPU kernels (default: the machine's best one, or what "
        "HEADSTART_AUTO_ISA names)",
        choices=INSTRUCTION_SETS,
    )
    weights: str = setting(
        "auto",
        "format of the weights: f16 for GPUs, int8 for CPUs (default: what the machine is "
        "fastest with and the model is good in, or on CPUs what HEADSTART_AUTO_WEIGHTS names)",
        choices=("auto", "f32", "f16", "bf16", "int8"),
    )
    kv_format: str = setting(
        "auto",
        "format of the KV cache: f32 or bf16 on a CPU (default: f32 beside f32 weights, else "
        "bf16), fp8 or int8 with a scale per token and head on a GPU (default: as the weights)",
        choices=("auto", "f32", "bf16", "fp8", "int8"),
    )
    kv_memory: int | None = setting(
        None, "size of the KV cache, as 2GiB or 500MB (default: from free memory)", byte_size
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt plus answer (default: what the model and the memory allow)",
        positive,
        "TOKENS",
    )
    max_batched_tokens: int | None = setting(
        None, "token budget of one step (default: 512, on a GPU 2048)", positive, "TOKENS"
    )
    step_time: float = setting(
        0.15,
        "seconds that a step may take on a CPU: what a running stream waits for its next token "
        "while prompts are computed; more where decoding takes a large part of it; 0: as long as "
        "--max-batched-tokens do",
        seconds_or_never,
        "SECONDS",
    )
    max_running: int | None = setting(
        None, "sequences computed in one step (default: 64, on a GPU 256)", positive, "N"
    )
    threads: int | None = setting(
        None,
        "threads of the kernels (default: one per core, shared among --tensor-parallel or "
        "--runahead processes)",
        positive,
    )
    prefix_caching: bool = setting(
        True, "forget the KV of finished requests", flag="--no-prefix-caching"
    )
    relay: str = setting(
        "auto",
        "read a prefix that running requests share once for all of them: where it is predicted "
        "to pay, always, never",
        choices=("auto", "on", "off"),
    )
    relay_check: int = setting(
        0,
        "on every Nth step that does so, compute it without, too, compare, and stop doing so if "
        "they differ; 0: at start-up only",
        count,
        "N",
    )
    async_scheduling: str = setting(
        "auto",
        "plan and launch a step while the one before is computed: where the backend computes "
        "beside the host, always, never",
        choices=("auto", "on", "off"),
    )
    scheduling_policy: str = setting(
        "fcfs",
        "who is computed first, and preempted last: who came first; or who has the lowest "
        "priority, a field of requests, and of those who came first",
        choices=("fcfs", "priority"),
    )
    stuck_after: float = setting(
        120.0,
        "how long the engine's process may show no sign of life, before it is killed and started "
        "again; longer than any step takes; 0: for ever",
        seconds_or_never,
        "SECONDS",
        flag="--engine-stuck-after",
    )


@dataclass(frozen=True, kw_only=True)
class Adapters:
    TITLE: ClassVar = "LoRA adapters"

    lora: Sequence[tuple[str, Path]] = setting(
        (),
        "adapters to load, each a folder; requests ask for NAME as their model",
        named_folder,
        "NAME=PATH",
        many=True,
    )
    max_adapters: int = setting(32, "adapters loaded at a time", positive, "N", flag="--max-loras")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    TITLE: ClassVar = "tensor parallelism: a model held by several processes"

    tensor_parallel: int = setting(
        1,
        "processes of this machine, the engine included, each with 1/N of every layer and of the "
        "KV cache; N has to divide the attention heads, key/value heads and MLP features",
        positive,
        "N",
    )


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What all ranks of a chain have."""

    TITLE: ClassVar = "KV-Runahead: long prompts computed by a chain of processes"

    runahead_secret_file: Path | None = setting(
        None,
        "what all ranks have to know, 16 characters or more (default: the environment's "
        "HEADSTART_RUNAHEAD_SECRET)",
        Path,
        "FILE",
    )
    runahead_transport: str = setting(
        "auto",
        "how KV goes from rank to rank: through shared memory where they are on one machine, "
        "NCCL between GPUs, else Gloo; or always Gloo",
        choices=("auto", "gloo"),
    )


@dataclass(frozen=True, kw_only=True)
class Runahead(Rank):
    TITLE: ClassVar = "KV-Runahead: the chain"

    runahead: int | None = setting(
        1,
        "processes of this machine that compute a long prompt, the engine included; env: one per "
        "machine or more, told apart by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun "
        "sets them, the last one serving",
        positive_or_env,
        "N|env",
    )
    runahead_hosts: Sequence[str] = setting(
        (),
        "ranks on other machines (headstart runahead-rank), before those of this one",
        host_port,
        "HOST:PORT",
        many=True,
    )
    runahead_min: int | None = setting(
        None,
        "let prompts run ahead that have so many tokens, cached ones apart (default: those for "
        "which it is predicted to be quicker)",
        positive,
        "TOKENS",
    )
    runahead_cuts: str = setting(
        "auto",
        "where prompts are cut: evenly, as interpolated from what headstart runahead-tune found, "
        "by the costs of ranks and links; auto: predicted where it was tuned, else modelled",
        choices=("auto", "even", "predicted", "modelled"),
    )
    runahead_timeout: float = setting(
        5.0,
        "how long a rank may not answer, or hand on nothing, until it is left out and the prompt "
        "is computed without it",
        seconds,
        "SECONDS",
    )


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Limits, SharedLimits, Overload, Requests, Visitors, Answers):
    """The server's share. ``inline_chars``: longer texts are tokenised in a thread, so that streams
    are not held up. ``keys``: who may ask what; none: everybody may everything."""

    allowed_hosts: Sequence[str] | None = None
    inline_chars: int = 8192
    keys: Keys = field(default_factory=Keys)
