"""The flags of the ``headstart`` command, and the settings that they make."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from headstart.engine.config import EngineConfig, default_home
from headstart.engine.errors import ConfigError
from headstart.engine.sampling_params import POOLINGS
from headstart.server.flag_values import (
    byte_size,
    count,
    existing_folder,
    host_port,
    named_folder,
    origin,
    port_number,
    positive,
    positive_or_env,
    seconds,
)
from headstart.server.keys import Keys, read_keys
from headstart.server.settings import REASONING_PARSERS, TOOL_CALL_PARSERS, ServerSettings
from headstart.server.tls import Certificate

SECRET_VARIABLE = "HEADSTART_RUNAHEAD_SECRET"
API_KEY_VARIABLE = "HEADSTART_API_KEY"
ADMIN_KEY_VARIABLE = "HEADSTART_ADMIN_KEY"


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=Path, default=default_home(), help="where models are kept"
    )


def add_http_flags(parser: argparse.ArgumentParser) -> None:
    limits = ServerSettings()
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on")
    http.add_argument("--port", type=port_number, default=8000, help="0 picks a free one")
    http.add_argument(
        "--shutdown-timeout",
        type=positive,
        default=30,
        metavar="SECONDS",
        help="how long running requests may take to end after SIGTERM",
    )
    http.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least to log",
    )
    http.add_argument(
        "--access-log-format",
        choices=("text", "json"),
        default=limits.access_log_format,
        help="of the line that each request gets; json: an object",
    )
    http.add_argument(
        "--keep-alive-timeout",
        type=positive,
        default=5,
        metavar="SECONDS",
        help="how long a connection without a request stays open",
    )
    http.add_argument(
        "--body-timeout",
        type=seconds,
        default=limits.body_timeout,
        metavar="SECONDS",
        help="how long a request may take to send its body",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What the model is called, and what its vectors are."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names clients may use; answers carry the first (default: from MODEL)",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="which hidden state is the vector of a prompt: its last token's, the mean of all, its "
        "first token's (default: what the model's sentence-transformers settings say, else last)",
        default=argparse.SUPPRESS,
    )


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    limits = ServerSettings()
    group = parser.add_argument_group("limits: the most that one request may ask for")
    group.add_argument(
        "--max-body-size",
        type=byte_size,
        default=limits.max_body_bytes,
        help="largest request body, bytes or 8MiB",
    )
    group.add_argument("--max-n", type=positive, default=limits.max_n, help="largest n")
    group.add_argument(
        "--max-prompts",
        type=positive,
        default=limits.max_prompts,
        help="most prompts in one request",
    )
    group.add_argument(
        "--max-choices",
        type=positive,
        default=limits.max_choices,
        help="most choices in one request, prompts times n",
    )
    group.add_argument(
        "--max-stop", type=positive, default=limits.max_stop, help="most stop strings"
    )


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Who may ask, from where, and whether it is encrypted."""
    group = parser.add_argument_group("access: keys, origins, TLS")
    for kind, variable, use in (
        ("api", API_KEY_VARIABLE, "everything but /health needs one"),
        ("admin", ADMIN_KEY_VARIABLE, "/metrics and loading adapters need one"),
    ):
        group.add_argument(
            f"--{kind}-key",
            nargs="+",
            action="extend",
            metavar="KEY",
            help=f"{use}; others on this machine can see them here, unlike those in a file or in "
            f"the environment's {variable} (with commas between)",
            default=argparse.SUPPRESS,
        )
        group.add_argument(
            f"--{kind}-key-file",
            type=Path,
            metavar="FILE",
            help="more of them, one a line; lines that begin with # are comments",
            default=argparse.SUPPRESS,
        )
    group.add_argument(
        "--allowed-origins",
        type=origin,
        nargs="+",
        action="extend",
        metavar="ORIGIN",
        help="web pages that may ask from a browser (CORS), * for all (default: none)",
        default=argparse.SUPPRESS,
    )
    for flag, use in (
        ("--ssl-certfile", "certificate, and those in between, in PEM: HTTPS instead of HTTP"),
        ("--ssl-keyfile", "its private key in PEM"),
        ("--ssl-keyfile-password-file", "the password of the private key"),
    ):
        group.add_argument(flag, type=Path, metavar="FILE", help=use, default=argparse.SUPPRESS)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend",
        choices=("auto", "gpu", "cpu", "reference"),
        default="auto",
        help="who computes (default: an NVIDIA GPU if torch sees one, else the CPU)",
    )
    engine.add_argument(
        "--isa",
        choices=("auto", "avx512_bf16", "avx512", "avx2", "portable"),
        default="auto",
        help="instruction set of the CPU kernels",
    )
    engine.add_argument(
        "--weights",
        choices=("auto", "f32", "f16", "bf16", "int8"),
        default="auto",
        help="format of the weights: f16 for GPUs, int8 for CPUs",
    )
    engine.add_argument(
        "--kv-format",
        choices=("auto", "fp8", "int8"),
        default="auto",
        help="format of the KV cache on a GPU: as the weights, or 8 bits with a scale per token "
        "and head",
    )
    engine.add_argument(
        "--kv-memory",
        type=byte_size,
        help="size of the KV cache, as 2GiB or 500MB (default: from free memory)",
        default=argparse.SUPPRESS,
    )
    engine.add_argument(
        "--max-model-len",
        type=positive,
        metavar="TOKENS",
        help="longest prompt plus answer (default: what the model and the memory allow)",
        default=argparse.SUPPRESS,
    )
    engine.add_argument(
        "--max-batched-tokens",
        type=positive,
        metavar="TOKENS",
        help="token budget of one step (default: 512, on a GPU 2048)",
    )
    engine.add_argument(
        "--max-running",
        type=positive,
        metavar="N",
        help="sequences computed in one step (default: 64, on a GPU 256)",
    )
    engine.add_argument(
        "--threads",
        type=positive,
        help="threads of the kernels (default: one per core, shared among --tensor-parallel or "
        "--runahead processes)",
        default=argparse.SUPPRESS,
    )
    engine.add_argument(
        "--no-prefix-caching",
        action="store_true",
        help="forget the KV of finished requests",
    )
    engine.add_argument(
        "--relay",
        choices=("auto", "on", "off"),
        default="auto",
        help="read a prefix that running requests share once for all of them: where it is "
        "predicted to pay, always, never",
    )
    engine.add_argument(
        "--relay-check",
        type=count,
        default=0,
        metavar="N",
        help="on every Nth step that does so, compute it without, too, compare, and stop doing so "
        "if they differ; 0: at start-up only",
    )
    engine.add_argument(
        "--async-scheduling",
        choices=("auto", "on", "off"),
        default="auto",
        help="plan and launch a step while the one before is computed: where the backend computes "
        "beside the host, always, never",
    )


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """How the model writes calls of tools, and thoughts."""
    group = parser.add_argument_group("answers: tool calls and reasoning")
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_CALL_PARSERS,
        default="auto",
        help="how the model writes calls of tools; auto: as its chat template says",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        default="auto",
        help="how it writes what it thinks before it answers; think: between <think> and </think>; "
        "auto: so if its chat template or its vocabulary knows these",
    )


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("segment masks and LoRA adapters")
    group.add_argument(
        "--segment-mask",
        choices=("causal", "turns"),
        help="of chats that name none (default: what the config of the model declares, else "
        "causal); an adapter's config comes before it",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--lora",
        type=named_folder,
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="adapters to load, each a folder; requests ask for NAME as their model",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--max-loras", type=positive, default=32, metavar="N", help="adapters loaded at a time"
    )


def add_lora_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora-dir",
        type=existing_folder,
        metavar="DIR",
        help="folder whose adapters may be loaded, and any unloaded, at run time over HTTP "
        "(default: none may)",
        default=argparse.SUPPRESS,
    )


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tensor parallelism: a model held by several processes")
    group.add_argument(
        "--tensor-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="processes of this machine, the engine included, each with 1/N of every layer and of "
        "the KV cache; N has to divide the attention heads, key/value heads and MLP features",
    )


def adapters(args: argparse.Namespace) -> dict[str, str]:
    """Name to folder, of ``--lora``; ends the process for wrong usage, as argparse does."""
    given: list[tuple[str, Path]] = getattr(args, "lora", [])
    folders: dict[str, str] = {}
    for name, path in given:
        if name in folders:
            args.refuse(f"argument --lora: the name {name!r} is given twice")
        if name in model_names(args):
            args.refuse(f"argument --lora: {name!r} is the model's name")
        folders[name] = str(path)
    if len(folders) > getattr(args, "max_loras", len(folders)):
        args.refuse(f"argument --lora: {len(folders)} adapters, and --max-loras {args.max_loras}")
    return folders


def add_runahead_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV-Runahead: long prompts computed by a chain of processes")
    group.add_argument(
        "--runahead",
        type=positive_or_env,
        default=1,
        metavar="N|env",
        help="processes of this machine that compute a long prompt, the engine included; env: one "
        "per machine or more, told apart by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as "
        "torchrun sets them, the last one serving",
    )
    group.add_argument(
        "--runahead-hosts",
        type=host_port,
        nargs="+",
        action="extend",
        metavar="HOST:PORT",
        help="ranks on other machines (headstart runahead-rank), before those of this one",
        default=argparse.SUPPRESS,
    )
    add_runahead_rank_flags(group)
    group.add_argument(
        "--runahead-min",
        type=positive,
        metavar="TOKENS",
        help="let prompts run ahead that have so many tokens, cached ones apart (default: those "
        "for which it is predicted to be quicker)",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--runahead-cuts",
        choices=("auto", "even", "predicted", "modelled"),
        default="auto",
        help="where prompts are cut: evenly, as interpolated from what headstart runahead-tune "
        "found, by the costs of ranks and links; auto: predicted where it was tuned, else modelled",
    )
    group.add_argument(
        "--runahead-timeout",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long a rank may not answer, or hand on nothing, until it is left out and the "
        "prompt is computed without it",
    )


def add_runahead_rank_flags(group: argparse._ArgumentGroup) -> None:
    """Those that all ranks of a chain have."""
    group.add_argument(
        "--runahead-secret-file",
        type=Path,
        metavar="FILE",
        help="what all ranks have to know, 16 characters or more (default: the environment's "
        f"{SECRET_VARIABLE})",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--runahead-transport",
        choices=("auto", "gloo"),
        default="auto",
        help="how KV goes from rank to rank: through shared memory where they are on one machine, "
        "NCCL between GPUs, else Gloo; or always Gloo",
    )


def runahead_secret(args: argparse.Namespace) -> str | None:
    """Raises ConfigError for a file that cannot be read."""
    path: Path | None = getattr(args, "runahead_secret_file", None)
    if path is None:
        return os.environ.get(SECRET_VARIABLE)
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--runahead-secret-file: {error}") from error


def engine_config(args: argparse.Namespace, folder: Path) -> EngineConfig:
    """The engine's share of the flags."""
    return EngineConfig(
        model_path=str(folder),
        backend=args.backend,
        isa=args.isa,
        weights=args.weights,
        kv_format=args.kv_format,
        kv_memory=getattr(args, "kv_memory", None),
        max_model_len=getattr(args, "max_model_len", None),
        max_batched_tokens=args.max_batched_tokens,
        max_running=args.max_running,
        threads=getattr(args, "threads", None),
        prefix_caching=not args.no_prefix_caching,
        relay=args.relay,
        relay_check=args.relay_check,
        async_scheduling=args.async_scheduling,
        adapters=adapters(args),
        max_adapters=getattr(args, "max_loras", 32),
        tensor_parallel=getattr(args, "tensor_parallel", 1),
        runahead=getattr(args, "runahead", 1) or 1,
        runahead_hosts=getattr(args, "runahead_hosts", []),
        runahead_secret=runahead_secret(args),
        runahead_min=getattr(args, "runahead_min", None),
        runahead_cuts=getattr(args, "runahead_cuts", "auto"),
        runahead_transport=getattr(args, "runahead_transport", "auto"),
        runahead_timeout=getattr(args, "runahead_timeout", 5.0),
        cache_dir=str(args.cache_dir),
        log_level=getattr(args, "log_level", "warning"),
    )


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The server's share of the flags."""
    return replace(
        answer_settings(args),
        lora_dir=getattr(args, "lora_dir", None),
        body_timeout=args.body_timeout,
        keys=Keys.of(
            api=_keys(args, "api", API_KEY_VARIABLE), admin=_keys(args, "admin", ADMIN_KEY_VARIABLE)
        ),
        allowed_origins=tuple(getattr(args, "allowed_origins", ())),
        access_log_format=args.access_log_format,
    )


def answer_settings(args: argparse.Namespace) -> ServerSettings:
    """What decides answers, however requests come in: limits, masks, formats."""
    return ServerSettings(
        max_body_bytes=args.max_body_size,
        max_n=args.max_n,
        max_prompts=args.max_prompts,
        max_choices=args.max_choices,
        max_stop=args.max_stop,
        segment_mask=getattr(args, "segment_mask", None),
        pooling=getattr(args, "pooling", None),
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )


def _keys(args: argparse.Namespace, kind: str, variable: str) -> list[str]:
    given = getattr(args, f"{kind}_key", [])
    return read_keys(f"--{kind}-key", given, getattr(args, f"{kind}_key_file", None), variable)


def certificate(args: argparse.Namespace) -> Certificate | None:
    """What ``--ssl-*`` name; raises ConfigError."""
    certfile, keyfile, password_file = (
        getattr(args, name, None)
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password_file")
    )
    if certfile is None and keyfile is None and password_file is None:
        return None
    if certfile is None or keyfile is None:
        raise ConfigError("TLS needs both --ssl-certfile and --ssl-keyfile")
    try:
        password = "" if password_file is None else password_file.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ssl-keyfile-password-file: {error}") from error
    return Certificate(certfile, keyfile, password)


def model_names(args: argparse.Namespace) -> list[str]:
    """What the model is called: as asked for, or by the last part of a path."""
    given: list[str] | None = getattr(args, "served_model_name", None)
    if given:
        return given
    path = Path(args.model)
    return [path.resolve().name if path.exists() else args.model]
