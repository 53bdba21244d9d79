"""The ``headstart`` command: serve a model, answer a file, pull, plan, be a rank of a chain.

Errors that a user can act on are one line on stderr and exit status 1; wrong usage exits 2.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headstart import __version__
from headstart.engine.errors import ConfigError, HeadstartError
from headstart.engine.runahead.placement import Placement
from headstart.server.cli.flags.access import add_access_flags, certificate
from headstart.server.cli.flags.adapters import adapters, add_adapter_flags, add_lora_dir
from headstart.server.cli.flags.answers import add_answer_flags
from headstart.server.cli.flags.engine import add_cache_dir, add_engine_flags, add_parallel_flags
from headstart.server.cli.flags.http import add_http_flags
from headstart.server.cli.flags.limits import add_limit_flags, add_server_limit_flags
from headstart.server.cli.flags.model import (
    add_model_flags,
    generation_defaults,
    model_names,
    tokenizer_of,
)
from headstart.server.cli.flags.runahead import (
    SECRET_VARIABLE,
    add_runahead_flags,
    add_runahead_rank_flags,
    runahead_secret,
)
from headstart.server.cli.flags.settings import answer_settings, engine_config, server_settings
from headstart.server.cli.values import host_port, positive

if TYPE_CHECKING:
    from headstart.engine.process.messages import ModelInfo

logger = logging.getLogger(__name__)


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
    add_cache_dir(serve)
    add_http_flags(serve)
    add_model_flags(serve)
    add_limit_flags(serve)
    add_server_limit_flags(serve)
    add_access_flags(serve)
    add_engine_flags(serve)
    add_adapter_flags(serve)
    add_lora_dir(serve)
    add_answer_flags(serve)
    add_parallel_flags(serve)
    add_runahead_flags(serve)

    batch = commands.add_parser(
        "run-batch",
        help="answer the requests of a file",
        description="Answers each line of INPUT, a request in OpenAI's batch format, with a line "
        "of OUTPUT, in the order in which they end. Exit status 1 if any line failed.",
        formatter_class=formatter,
    )
    batch.set_defaults(run=run_batch, refuse=batch.error)
    batch.add_argument("input", metavar="INPUT", type=Path, help="a JSON object per line")
    batch.add_argument("output", metavar="OUTPUT", type=Path, help="file to write")
    batch.add_argument("--model", default="smollm2-135m", help="as MODEL of serve")
    batch.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="lines at a time (default: as many as --max-running)",
        default=argparse.SUPPRESS,
    )
    batch.add_argument(
        "--resume",
        action="store_true",
        help="go on with an OUTPUT that exists: what it has is not asked again",
    )
    add_cache_dir(batch)
    add_model_flags(batch)
    add_limit_flags(batch)
    add_engine_flags(batch)
    add_adapter_flags(batch)
    add_answer_flags(batch)
    add_parallel_flags(batch)
    add_runahead_flags(batch)

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
    add_cache_dir(plan)
    add_engine_flags(plan)

    rank = commands.add_parser(
        "runahead-rank",
        help="compute the beginnings of long prompts for a server on another machine",
        description="A prefill rank of KV-Runahead. The server that names it in --runahead-hosts "
        "has to have the same model, weights and version, and the same secret.",
        formatter_class=formatter,
    )
    rank.set_defaults(run=run_rank)
    rank.add_argument("model", metavar="MODEL", help="as for serve")
    rank.add_argument(
        "--listen",
        type=host_port,
        required=True,
        metavar="HOST:PORT",
        help="an address of this machine that the other ranks reach; KV comes and goes through "
        "further ports of HOST, in the clear: a private network",
    )
    add_cache_dir(rank)
    add_engine_flags(rank)
    add_runahead_rank_flags(rank.add_argument_group("KV-Runahead"))

    tune = commands.add_parser(
        "runahead-tune",
        help="search where prompts are best cut for a chain of ranks, and keep that",
        description="Measures the time to the first token with cuts around even ones, ever nearer "
        "to the best, and keeps the result for --runahead-cuts auto and predicted.",
        formatter_class=formatter,
    )
    tune.set_defaults(run=run_tune)
    tune.add_argument("model", metavar="MODEL", help="as for serve")
    tune.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[1024, 2048, 4096, 8000],
        metavar="TOKENS",
        help="of prompts; those between are interpolated",
    )
    tune.add_argument("--repeats", type=positive, default=2, help="of each measurement")
    add_cache_dir(tune)
    add_engine_flags(tune)
    add_runahead_flags(tune)

    pull = commands.add_parser("pull", help="fetch and convert a model", formatter_class=formatter)
    pull.set_defaults(run=run_pull)
    pull.add_argument("model", metavar="NAME|HUB-ID|PATH", help="what to fetch")
    add_cache_dir(pull)
    return parser


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address, before anything slow happens; raises ConfigError.

    It does not listen yet, so that clients are refused at once instead of waiting in vain.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        # Of a failed bind, strerror repeats the address.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host, --port"
        ) from error


def run_serve(args: argparse.Namespace) -> int:
    """``headstart serve``."""
    started = time.monotonic()
    adapters(args)  # wrong usage is told before anything slow happens
    if args.tensor_parallel > 1 and args.runahead is None:
        raise ConfigError("--tensor-parallel and --runahead cannot be combined")
    if args.runahead is None:
        placement = Placement.from_environment()
        if not placement.serves:
            return run_rank(args, placement)
        args.runahead_hosts = placement.others()
    settings, tls = server_settings(args), certificate(args)
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
    from headstart.engine.models.store import resolve
    from headstart.engine.process.client import EngineClient

    with listener:
        folder = resolve(args.model, args.cache_dir, ProgressLines())
        engine = EngineClient(engine_config(args, folder))
        failures: list[HeadstartError] = []
        engine.begin()  # it imports as much as is imported here, at the same time
        try:
            from headstart.server.http.access_log import log_bare_lines
            from headstart.server.http.app import create_app
            from headstart.server.http.ready import summary
            from headstart.server.http.serving import serve, url

            if settings.access_log_format == "json":
                log_bare_lines(sys.stderr)

            def ready(model: ModelInfo) -> None:
                seconds, runtime = time.monotonic() - started, app.state.runtime
                logger.info("%s", summary(runtime, model, url(listener, tls), seconds))

            app = create_app(
                engine,
                tokenizer_of(args, folder),
                model_names=model_names(args),
                settings=settings,
                defaults=generation_defaults(args, folder),
                on_ready=ready,
                on_start_failure=failures.append,
            )
        except BaseException:
            engine.kill()
            raise
        serve(
            app,
            listener,
            failures,
            drain_seconds=args.shutdown_timeout,
            keep_alive_seconds=args.keep_alive_timeout,
            head_seconds=args.head_timeout,
            max_connections=settings.max_connections,
            certificate=tls,
        )
    if failures:
        raise failures[0]
    return 0


def run_batch(args: argparse.Namespace) -> int:
    """``headstart run-batch``."""
    adapters(args)
    if args.runahead is None:
        raise ConfigError("--runahead env is for servers; name a number of processes")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.models.store import resolve
    from headstart.engine.process.client import EngineClient
    from headstart.server.cli import run_batch as batch
    from headstart.server.cli.batch_progress import Progress
    from headstart.server.http.app import create_app

    output = batch.BatchOutput(args.output, resume=args.resume)
    folder = resolve(args.model, args.cache_dir, ProgressLines())
    failures: list[HeadstartError] = []

    async def run() -> batch.Tally:
        app = create_app(
            EngineClient(engine_config(args, folder)),
            tokenizer_of(args, folder),
            model_names=model_names(args),
            settings=answer_settings(args),
            defaults=generation_defaults(args, folder),
            on_start_failure=failures.append,
        )
        return await batch.run_batch(
            app,
            failures,
            args.input,
            output,
            concurrency=getattr(args, "concurrency", None),
            progress=Progress(sys.stderr),
        )

    try:
        tally = asyncio.run(run())
    except asyncio.CancelledError:
        print(f"headstart: stopped; --resume goes on with {args.output}", file=sys.stderr)
        return 130
    finally:
        output.close()
    print(f"headstart: {tally}", file=sys.stderr)
    return tally.status


def run_rank(args: argparse.Namespace, placement: Placement | None = None) -> int:
    """``headstart runahead-rank``, or a rank of ``headstart serve --runahead env``."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    _exit_on_sigterm(0)
    secret = runahead_secret(args)
    if secret is None:
        raise ConfigError(f"a rank needs --runahead-secret-file, or {SECRET_VARIABLE} set")
    from headstart.engine.models.store import resolve
    from headstart.engine.runahead.rank import Rank, RankConfig

    listen = args.listen if placement is None else placement.address
    folder = resolve(args.model, args.cache_dir, ProgressLines())
    config = msgspec.structs.replace(engine_config(args, folder), runahead_hosts=[])
    rank = Rank(
        RankConfig(engine=config, listen=listen, secret=secret, transport=args.runahead_transport)
    )
    logging.getLogger(__name__).info("listening on %s", listen)
    if placement is not None:
        placement.publish()
    try:
        rank.serve()
    finally:
        rank.close()
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """``headstart runahead-tune``."""
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.engine import Engine
    from headstart.engine.models.store import resolve
    from headstart.engine.runahead.tune import tune

    if args.runahead in (None, 1) and not getattr(args, "runahead_hosts", []):
        raise ConfigError("there is nothing to tune: name ranks with --runahead, --runahead-hosts")
    engine = Engine(engine_config(args, resolve(args.model, args.cache_dir, ProgressLines())))
    try:
        for line in tune(engine, args.lengths, args.repeats):
            print(line, flush=True)
    finally:
        engine.close()
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


MEASURED_FOR = 3.0
"""Seconds after which it is said how long a stage will take."""


def _exit_on_sigterm(status: int) -> None:
    """SIGTERM tidies up and ends; a container's first process would not notice it otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))


class ProgressLines:
    """Stages on stderr: a line rewritten in place on a terminal, a line per quarter in a log; with
    what is left of a stage's time once it has taken some."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown: dict[str, int] = {}
        self._clock = clock
        self._begun: dict[str, tuple[float, int]] = {}
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        percent = 100 * done // total if total > 0 else 100
        if not self._terminal:
            percent -= percent % 25
        now = self._clock()
        begun, first = self._begun.setdefault(what, (now, done))
        if percent <= self._shown.get(what, -1):
            return
        self._shown[what] = percent
        left = ""
        if now - begun >= MEASURED_FOR and first < done < total:
            left = f", {(total - done) * (now - begun) / (done - first):.0f} s to go"
        left = left.ljust(self._width)  # over what stood there
        start, end = "", "\n"
        if self._terminal:
            start, end = "\r", "" if percent < 100 else "\n"
            self._width = len(left) if percent < 100 else 0
        print(f"{start}{what}: {percent:3d}%{left}", end=end, file=sys.stderr, flush=True)
