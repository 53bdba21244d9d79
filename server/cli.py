"""The ``headstart`` command: serve a model, pull one, plan a batch.

Errors that a user can act on are one line on stderr and exit status 1; wrong usage exits 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from headstart import __version__
from headstart.engine.config import EngineConfig, default_home
from headstart.engine.errors import ConfigError, HeadstartError
from headstart.server.flag_values import (
    byte_size,
    count,
    existing_folder,
    named_folder,
    port_number,
    positive,
)
from headstart.server.settings import ServerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except HeadstartError as error:
        print(f"headstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is read by its command."""
    parser = argparse.ArgumentParser(prog="headstart", description="LLM inference server")
    parser.add_argument("--version", action="version", version=f"headstart {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter

    serve = commands.add_parser(
        "serve", help="serve a model over HTTP, fetching it first", formatter_class=formatter
    )
    serve.set_defaults(run=run_serve, refuse=serve.error)
    serve.add_argument("model", metavar="MODEL", help="name, hub id, or path of a model")
    _add_cache_dir(serve)
    _add_http_flags(serve)
    _add_engine_flags(serve)
    _add_adapter_flags(serve)

    plan = commands.add_parser(
        "plan",
        help="predict what reading a shared prefix once saves on this machine",
        description="Predicts the time of one decoding step of BATCH requests that have PREFIX "
        "tokens in common and SUFFIX of their own each, with RelayAttention and without.",
        formatter_class=formatter,
    )
    plan.set_defaults(run=run_plan)
    plan.add_argument(
        "model", metavar="MODEL", nargs="?", default="smollm2-135m", help="as for serve"
    )
    plan.add_argument("--prefix", type=positive, default=2048, help="tokens in common")
    plan.add_argument("--batch", type=positive, default=16, help="requests at a time")
    plan.add_argument("--suffix", type=positive, default=128, help="tokens of its own each has")
    plan.add_argument("--measure", action="store_true", help="run such steps, too")
    _add_cache_dir(plan)
    _add_engine_flags(plan)

    pull = commands.add_parser("pull", help="fetch and convert a model", formatter_class=formatter)
    pull.set_defaults(run=run_pull)
    pull.add_argument("model", metavar="NAME|HUB-ID|PATH", help="what to fetch")
    _add_cache_dir(pull)
    return parser


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=Path, default=default_home(), help="where models are kept"
    )


def _add_http_flags(parser: argparse.ArgumentParser) -> None:
    limits = ServerSettings()
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on")
    http.add_argument("--port", type=port_number, default=8000, help="0 picks a free one")
    http.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names clients may use; answers carry the first (default: from MODEL)",
        default=argparse.SUPPRESS,
    )
    http.add_argument(
        "--max-body-size",
        type=byte_size,
        default=limits.max_body_bytes,
        help="largest request body, bytes or 8MiB",
    )
    http.add_argument("--max-n", type=positive, default=limits.max_n, help="largest n")
    http.add_argument(
        "--max-prompts",
        type=positive,
        default=limits.max_prompts,
        help="most prompts in one request",
    )
    http.add_argument(
        "--max-choices",
        type=positive,
        default=limits.max_choices,
        help="most choices in one request, prompts times n",
    )
    http.add_argument(
        "--max-stop", type=positive, default=limits.max_stop, help="most stop strings"
    )
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


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend", choices=("auto", "cpu", "reference"), default="auto", help="who computes"
    )
    engine.add_argument(
        "--isa",
        choices=("auto", "avx512_bf16", "avx512", "avx2", "portable"),
        default="auto",
        help="instruction set of the CPU kernels",
    )
    engine.add_argument(
        "--weights",
        choices=("auto", "f32", "bf16", "int8"),
        default="auto",
        help="format of the weights",
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
        default=512,
        metavar="TOKENS",
        help="token budget of one step",
    )
    engine.add_argument(
        "--max-running", type=positive, default=64, help="sequences computed in one step"
    )
    engine.add_argument(
        "--threads",
        type=positive,
        help="threads of the kernels (default: one per core)",
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


def _add_adapter_flags(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--lora-dir",
        type=existing_folder,
        metavar="DIR",
        help="folder whose adapters may be loaded, and any unloaded, at run time over HTTP "
        "(default: none may)",
        default=argparse.SUPPRESS,
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


def engine_config(args: argparse.Namespace, folder: Path) -> EngineConfig:
    """The engine's share of the flags."""
    return EngineConfig(
        model_path=str(folder),
        backend=args.backend,
        isa=args.isa,
        weights=args.weights,
        kv_memory=getattr(args, "kv_memory", None),
        max_model_len=getattr(args, "max_model_len", None),
        max_batched_tokens=args.max_batched_tokens,
        max_running=args.max_running,
        threads=getattr(args, "threads", None),
        prefix_caching=not args.no_prefix_caching,
        relay=args.relay,
        relay_check=args.relay_check,
        adapters=adapters(args),
        max_adapters=getattr(args, "max_loras", 32),
        cache_dir=str(args.cache_dir),
        log_level=getattr(args, "log_level", "warning"),
    )


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The server's share of the flags."""
    return ServerSettings(
        max_body_bytes=args.max_body_size,
        max_n=args.max_n,
        max_prompts=args.max_prompts,
        max_choices=args.max_choices,
        max_stop=args.max_stop,
        segment_mask=getattr(args, "segment_mask", None),
        lora_dir=getattr(args, "lora_dir", None),
    )


def model_names(args: argparse.Namespace) -> list[str]:
    """What the model is called: as asked for, or by the last part of a path."""
    given: list[str] | None = getattr(args, "served_model_name", None)
    if given:
        return given
    path = Path(args.model)
    return [path.resolve().name if path.exists() else args.model]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow happens; raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # Of a failed bind, strerror repeats the address.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host, --port"
        ) from error


def run_serve(args: argparse.Namespace) -> int:
    """``headstart serve``."""
    adapters(args)  # wrong usage is told before anything slow happens
    # The tokenizer's own thread pool would take cores from the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    listener = bind(args.host, args.port)
    _exit_on_sigterm(0)  # uvicorn's handler takes over when it runs
    # Only now: everything below is slow to import, and --help has to be quick.
    from headstart.engine.client import EngineClient
    from headstart.engine.models.store import resolve
    from headstart.server.app import create_app
    from headstart.server.serving import serve
    from headstart.server.tokenizer import Tokenizer

    with listener:
        folder = resolve(args.model, args.cache_dir, ProgressLines())
        engine = EngineClient(engine_config(args, folder))
        failures: list[HeadstartError] = []
        app = create_app(
            engine,
            Tokenizer.from_folder(folder),
            model_names=model_names(args),
            settings=server_settings(args),
            on_start_failure=failures.append,
        )
        serve(app, listener, failures, drain_seconds=args.shutdown_timeout)
    if failures:
        raise failures[0]
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """``headstart plan``."""
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.engine import Engine
    from headstart.engine.models.store import resolve

    folder = resolve(args.model, args.cache_dir, ProgressLines())
    engine = Engine(engine_config(args, folder))
    result = engine.forecast(
        prefix=args.prefix, batch=args.batch, suffix=args.suffix, measure=args.measure
    )
    model = engine.model
    print(f"{args.model}, weights {model.weights}, {model.backend}\n\n{result}")
    return 0


def run_pull(args: argparse.Namespace) -> int:
    """``headstart pull``."""
    from headstart.engine.models.store import pull

    _exit_on_sigterm(128 + signal.SIGTERM)
    folder = pull(args.model, args.cache_dir, ProgressLines())
    print(folder)
    return 0


def _exit_on_sigterm(status: int) -> None:
    """SIGTERM tidies up and ends; a container's first process would not notice it otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))


class ProgressLines:
    """Stages on stderr: a line rewritten in place on a terminal, a line per quarter in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        percent = 100 * done // total if total > 0 else 100
        if not self._terminal:
            percent -= percent % 25
        if percent <= self._shown.get(what, -1):
            return
        self._shown[what] = percent
        start = "\r" if self._terminal else ""
        end = "" if self._terminal and percent < 100 else "\n"
        print(f"{start}{what}: {percent:3d}%", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
