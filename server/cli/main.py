"""The ``headstart`` command: serve a model, answer or explain requests of files, pull, plan, ...

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import msgspec

from headstart import __version__
from headstart.engine.errors import ConfigError, HeadstartError
from headstart.engine.runahead.placement import Placement
from headstart.server.cli.commands import (
    Command,
    Explain,
    Plan,
    Pull,
    RunaheadRank,
    RunaheadTune,
    RunBatch,
    Serve,
)
from headstart.server.cli.configure import (
    SECRET_VARIABLE,
    adapters,
    batch_settings,
    certificate,
    engine_config,
    explain_settings,
    generation_defaults,
    model_names,
    runahead_secret,
    server_settings,
    tokenizer_of,
)
from headstart.server.cli.flags import UsageError, add_settings, read_settings

if TYPE_CHECKING:
    from headstart.engine.process.messages import ModelInfo

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    name = given.pop("command")
    command, run = COMMANDS[name]
    try:
        return run(read_settings(command, given, ALL))
    except UsageError as error:
        commands_of(parser)[name].error(str(error))
    except HeadstartError as error:
        print(f"headstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse(*argv: str) -> Any:
    """The settings of a command line; raises ConfigError."""
    given = vars(build_parser().parse_args(argv))
    return read_settings(COMMANDS[given.pop("command")][0], given, ALL)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is read by its command."""
    parser = argparse.ArgumentParser(prog="headstart", description="LLM inference server")
    parser.add_argument("--version", action="version", version=f"headstart {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (command, _) in COMMANDS.items():
        description = command.DESCRIPTION
        add_settings(commands.add_parser(name, help=command.HELP, description=description), command)
    return parser


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of its commands."""
    [action] = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return action.choices


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


def run_serve(options: Serve) -> int:
    """``headstart serve``."""
    started = time.monotonic()
    adapters(options)  # wrong usage is told before anything slow happens
    if options.tensor_parallel > 1 and options.runahead is None:
        raise ConfigError("--tensor-parallel and --runahead cannot be combined")
    if options.runahead is None:
        placement = Placement.from_environment()
        if not placement.serves:
            return run_rank(options, placement)
        options = replace(options, runahead_hosts=tuple(placement.others()))
    settings, tls = server_settings(options), certificate(options)
    # The tokenizer's own thread pool would take cores from the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    listener = bind(options.host, options.port)
    _exit_on_sigterm(0)  # uvicorn's handler takes over when it runs
    # Only now: everything below is slow to import, and --help has to be quick.
    from headstart.engine.models.store import resolve
    from headstart.engine.process.client import EngineClient

    with listener:
        folder = resolve(options.model, options.cache_dir, ProgressLines())
        engine = EngineClient(engine_config(options, folder))
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
                tokenizer_of(options, folder),
                model_names=model_names(options),
                settings=settings,
                defaults=generation_defaults(options, folder),
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
            drain_seconds=options.shutdown_timeout,
            keep_alive_seconds=options.keep_alive_timeout,
            head_seconds=options.head_timeout,
            max_connections=settings.max_connections,
            certificate=tls,
        )
    if failures:
        raise failures[0]
    return 0


def run_batch(options: RunBatch) -> int:
    """``headstart run-batch``."""
    adapters(options)
    if options.runahead is None:
        raise ConfigError("--runahead env is for servers; name a number of processes")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.models.store import resolve
    from headstart.engine.process.client import EngineClient
    from headstart.server.cli import run_batch as batch
    from headstart.server.cli.batch_progress import Progress
    from headstart.server.http.app import create_app

    output = batch.BatchOutput(options.output, resume=options.resume)
    folder = resolve(options.model, options.cache_dir, ProgressLines())
    failures: list[HeadstartError] = []

    async def run() -> batch.Tally:
        app = create_app(
            EngineClient(engine_config(options, folder)),
            tokenizer_of(options, folder),
            model_names=model_names(options),
            settings=batch_settings(options),
            defaults=generation_defaults(options, folder),
            on_start_failure=failures.append,
        )
        return await batch.run_batch(
            app,
            failures,
            options.input,
            output,
            concurrency=options.concurrency,
            progress=Progress(sys.stderr),
        )

    try:
        tally = asyncio.run(run())
    except asyncio.CancelledError:
        print(f"headstart: stopped; --resume goes on with {options.output}", file=sys.stderr)
        return 130
    finally:
        output.close()
    print(f"headstart: {tally}", file=sys.stderr)
    return tally.status


def run_rank(options: RunaheadRank | Serve, placement: Placement | None = None) -> int:
    """``headstart runahead-rank``, or a rank of ``headstart serve --runahead env``."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    _exit_on_sigterm(0)
    secret = runahead_secret(options)
    if secret is None:
        raise ConfigError(f"a rank needs --runahead-secret-file, or {SECRET_VARIABLE} set")
    from headstart.engine.models.store import resolve
    from headstart.engine.runahead.rank import Rank, RankConfig

    listen = placement.address if placement else cast(RunaheadRank, options).listen
    folder = resolve(options.model, options.cache_dir, ProgressLines())
    config = msgspec.structs.replace(engine_config(options, folder), runahead_hosts=[])
    rank = Rank(
        RankConfig(
            engine=config, listen=listen, secret=secret, transport=options.runahead_transport
        )
    )
    logging.getLogger(__name__).info("listening on %s", listen)
    if placement is not None:
        placement.publish()
    try:
        rank.serve()
    finally:
        rank.close()
    return 0


def run_tune(options: RunaheadTune) -> int:
    """``headstart runahead-tune``."""
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.engine import Engine
    from headstart.engine.models.store import resolve
    from headstart.engine.runahead.tune import tune

    if options.runahead in (None, 1) and not options.runahead_hosts:
        raise ConfigError("there is nothing to tune: name ranks with --runahead, --runahead-hosts")
    engine = Engine(
        engine_config(options, resolve(options.model, options.cache_dir, ProgressLines()))
    )
    try:
        for line in tune(engine, options.lengths, options.repeats):
            print(line, flush=True)
    finally:
        engine.close()
    return 0


def run_explain(options: Explain) -> int:
    """``headstart explain``."""
    from headstart.server.cli import explain

    first, second = (explain.read_request(f, options.url) for f in (options.first, options.second))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level="ERROR", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.models.store import resolve
    from headstart.server.http.app import create_app

    folder = resolve(options.model, options.cache_dir, ProgressLines())
    app = create_app(
        explain.PaperEngine(explain.model_of(folder, options.page_size)),
        tokenizer_of(options, folder),
        model_names=model_names(options),
        settings=explain_settings(options),
        defaults=generation_defaults(options, folder),
    )
    found = asyncio.run(explain.compare(app, first, second))
    if options.json:
        print(msgspec.json.encode(found).decode())
    else:
        print(explain.report(found, first, second))
    return 0


def run_plan(options: Plan) -> int:
    """``headstart plan``."""
    logging.basicConfig(level="WARNING", format="%(levelname)s: %(message)s", stream=sys.stderr)
    from headstart.engine.engine import Engine
    from headstart.engine.models.store import resolve

    folder = resolve(options.model, options.cache_dir, ProgressLines())
    engine = Engine(engine_config(options, folder))
    result = engine.forecast(
        prefix=options.prefix, batch=options.batch, suffix=options.suffix, measure=options.measure
    )
    model = engine.model
    print(f"{options.model}, weights {model.weights}, {model.backend}\n\n{result}")
    return 0


def run_pull(options: Pull) -> int:
    """``headstart pull``."""
    from headstart.engine.models.store import pull

    _exit_on_sigterm(128 + signal.SIGTERM)
    folder = pull(options.model, options.cache_dir, ProgressLines())
    print(folder)
    return 0


COMMANDS: dict[str, tuple[type[Command], Callable[[Any], int]]] = {
    "serve": (Serve, run_serve),
    "run-batch": (RunBatch, run_batch),
    "explain": (Explain, run_explain),
    "plan": (Plan, run_plan),
    "runahead-rank": (RunaheadRank, run_rank),
    "runahead-tune": (RunaheadTune, run_tune),
    "pull": (Pull, run_pull),
}
ALL = [command for command, _ in COMMANDS.values()]

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
