"""What each command of ``headstart`` is told: its settings, and what only it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from headstart.engine.config import PAGE_SIZE
from headstart.server import settings
from headstart.server.settings import setting
from headstart.server.values import host_port, positive

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Command(settings.Cache):
    HELP: ClassVar[str]
    DESCRIPTION: ClassVar[str | None] = None


@dataclass(frozen=True, kw_only=True)
class Computing(Command, settings.Engine):
    """A command that computes with a model."""

    model: str = setting(MISSING, "as for serve", metavar="MODEL", positional=True)


@dataclass(frozen=True, kw_only=True)
class Serve(
    settings.Runahead,
    settings.Parallel,
    settings.Answers,
    settings.Adapters,
    settings.Engine,
    settings.Visitors,
    settings.Access,
    settings.Overload,
    settings.SharedLimits,
    settings.Limits,
    settings.Model,
    settings.Requests,
    settings.Listen,
    Command,
):
    HELP: ClassVar = "serve a model over HTTP, fetching it first"

    model: str = setting(
        MISSING, "name, hub id, or path of a model", metavar="MODEL", positional=True
    )


@dataclass(frozen=True, kw_only=True)
class RunBatch(
    settings.Runahead,
    settings.Parallel,
    settings.Answers,
    settings.Adapters,
    settings.Engine,
    settings.Limits,
    settings.Model,
    Command,
):
    HELP: ClassVar = "answer the requests of a file"
    DESCRIPTION: ClassVar = (
        "Answers each line of INPUT, a request in OpenAI's batch format, with a line of OUTPUT, in "
        "the order in which they end. Exit status 1 if any line failed."
    )

    input: Path = setting(MISSING, "a JSON object per line", Path, metavar="INPUT", positional=True)
    output: Path = setting(MISSING, "file to write", Path, metavar="OUTPUT", positional=True)
    model: str = setting(DEFAULT_MODEL, "as MODEL of serve")
    concurrency: int | None = setting(
        None, "lines at a time (default: as many as --max-running)", positive, "N"
    )
    resume: bool = setting(
        False, "go on with an OUTPUT that exists: what it has is not asked again"
    )


@dataclass(frozen=True, kw_only=True)
class Explain(settings.Answers, settings.Model, Command):
    HELP: ClassVar = "say where one request leaves another, and what the cache would have of it"
    DESCRIPTION: ClassVar = (
        "Renders two requests as a server would, and prints where the prompt of SECOND leaves that "
        "of FIRST, and how much of it the cache has then. A file has one request: the body of a "
        "chat, a completion, a response or a message of Anthropic's API, or a line as run-batch "
        "takes it; FILE:N is line N of a file. No model is loaded."
    )

    first: str = setting(MISSING, "the request that came first", metavar="FIRST", positional=True)
    second: str = setting(MISSING, "the request to explain", metavar="SECOND", positional=True)
    model: str = setting(DEFAULT_MODEL, "as MODEL of serve")
    url: str | None = setting(
        None,
        "what the requests are asked at (default: as their fields say)",
        choices=("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    )
    page_size: int = setting(PAGE_SIZE, "tokens of a page of the cache", positive)
    json: bool = setting(False, "print the object that cache_explain has in answers")


@dataclass(frozen=True, kw_only=True)
class Plan(Computing):
    HELP: ClassVar = "predict what reading a shared prefix once saves on this machine"
    DESCRIPTION: ClassVar = (
        "Predicts the time of one decoding step of BATCH requests that have PREFIX tokens in "
        "common and SUFFIX of their own each, with RelayAttention and without."
    )

    model: str = setting(DEFAULT_MODEL, "as for serve", metavar="MODEL", positional=True)
    prefix: int = setting(2048, "tokens in common", positive)
    batch: int = setting(16, "requests at a time", positive)
    suffix: int = setting(128, "tokens of its own each has", positive)
    measure: bool = setting(False, "run such steps, too")


@dataclass(frozen=True, kw_only=True)
class RunaheadRank(Computing, settings.Rank):
    HELP: ClassVar = "compute the beginnings of long prompts for a server on another machine"
    DESCRIPTION: ClassVar = (
        "A prefill rank of KV-Runahead. The server that names it in --runahead-hosts has to have "
        "the same model, weights and version, and the same secret."
    )

    listen: str = setting(
        MISSING,
        "an address of this machine that the other ranks reach; KV comes and goes through further "
        "ports of HOST, in the clear: a private network",
        host_port,
        "HOST:PORT",
    )


@dataclass(frozen=True, kw_only=True)
class RunaheadTune(Computing, settings.Runahead):
    HELP: ClassVar = "search where prompts are best cut for a chain of ranks, and keep that"
    DESCRIPTION: ClassVar = (
        "Measures the time to the first token with cuts around even ones, ever nearer to the best, "
        "and keeps the result for --runahead-cuts auto and predicted."
    )

    lengths: Sequence[int] = setting(
        (1024, 2048, 4096, 8000),
        "of prompts; those between are interpolated",
        positive,
        "TOKENS",
        many=True,
    )
    repeats: int = setting(2, "of each measurement", positive)


@dataclass(frozen=True, kw_only=True)
class Pull(Command):
    HELP: ClassVar = "fetch and convert a model"

    model: str = setting(MISSING, "what to fetch", metavar="NAME|HUB-ID|PATH", positional=True)
