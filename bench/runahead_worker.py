"""Engines in processes of their own, alone or at the end of a chain of ranks that run ahead.

All that this benchmark knows of engine/runahead is in this module: how ranks are started, which
settings an engine gets, and what it says of a prompt. It is both the parent's side (``Chain``)
and, as a command, the engine's process, which answers lines as bench/allgather.py does.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from headstart.bench.http_client import BenchError
from headstart.bench.line_process import LineProcess, answer_lines, ended
from headstart.bench.links import Place, free_port
from headstart.bench.prefill_run import PrefillRun, kv_room
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.runahead.cuts import CutTable, Positions, even_cuts, search_cuts
from headstart.engine.runahead.tune import await_chain
from headstart.engine.sampling.params import SamplingParams


class EngineProcess:
    """An engine as a server has it, for one prompt at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._chain = engine.runahead
        engine.warm_up()
        if self._chain is not None:
            await_chain(engine)
        self._tokens: list[int] = []
        self._prompts = 0

    @property
    def about(self) -> dict[str, Any]:
        model = self._engine.model
        return {
            "page_size": model.page_size,
            "vocab_size": model.vocab_size,
            "description": f"{model.weights}, {model.backend}",
        }

    def prepare(self, tokens: list[int], bounds: list[int] | None) -> dict[str, Any]:
        """What comes before the clock starts: memory, and the cuts, if they are forced."""
        self._tokens = tokens
        while self._engine.prepare_memory():
            pass
        if self._chain is not None:
            self._engine.attend_chain()  # what ranks said since the last prompt
            await_chain(self._engine)
            self._chain.forced_bounds = bounds
            self._chain.last = None
        return {}

    def start(self) -> dict[str, Any]:
        """The fields of a PrefillRun. Nothing of the prompt is in the prefix cache: its salt is
        new."""
        self._prompts += 1
        self._engine.add(
            self._prompts,
            array("i", self._tokens),
            SamplingParams(max_tokens=1, temperature=0.0),
            salt=self._prompts.to_bytes(4, "little"),
        )
        while not (outputs := self._engine.step()):
            pass
        answer: dict[str, Any] = {"end": time.perf_counter(), "token": outputs[0].token_ids[0]}
        if self._chain is not None:
            report = self._chain.last
            if report is None:
                raise BenchError("the engine computed a prompt alone: see its log")
            answer["idle_s"] = list(report.idle)
            answer["sent_bytes"] = list(report.sent_bytes)
            answer["bounds"] = list(report.bounds)
            answer["predicted_s"] = report.predicted_seconds
        return answer


# ------------------------------------------------------------------ the parent's side


@dataclass(frozen=True, slots=True)
class Chain:
    """An engine, ready, and the cuts forced on it, or None for its own: a Contestant."""

    engine: LineProcess
    page_size: int
    vocab_size: int
    description: str
    bounds: list[int] | None = None

    def prepare(self, tokens: Sequence[int]) -> None:
        self.engine.ask({"tokens": list(tokens), "bounds": self.bounds})

    def start(self) -> PrefillRun:
        return PrefillRun(**self.engine.ask({}))

    def with_bounds(self, bounds: list[int]) -> Chain:
        """The same engine, whose next prompts are cut at ``bounds``."""
        return replace(self, bounds=bounds)


@contextmanager
def start_chain(
    places: Sequence[Place],
    model_path: str,
    *,
    max_tokens: int,
    cuts: str = "even",
    weights: str = "auto",
    threads: int = 1,
    timeout: float = 600.0,
) -> Iterator[Chain]:
    """A rank in each of ``places``, the engine in the last; in one place, an engine alone.

    ``cuts``: how the engine cuts prompts, if nobody else does. Each has room for two prompts of
    ``max_tokens`` tokens. No answer may take longer than ``timeout`` seconds.
    """
    *others, last = places
    settings = {
        "model_path": model_path,
        "weights": weights,
        "threads": threads,
        "max_model_len": max_tokens + 1,
        "kv_memory": kv_room(model_path, max_tokens),
        "relay": "off",
        "log_level": "warning",
    }
    secret = secrets.token_hex(16)
    with ExitStack() as stack:
        hosts = []
        for place in others:
            hosts.append(f"{place.address}:{free_port()}")
            rank = subprocess.Popen(
                [*place.prefix, sys.executable, "-m", "headstart.engine.runahead.rank"],
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
            )
            stack.callback(ended, rank)
            listening = {"listen": hosts[-1], "secret": secret, "transport": "gloo"}
            assert rank.stdin is not None
            rank.stdin.write(msgspec.json.encode({"engine": settings, **listening}) + b"\n")
            rank.stdin.flush()
        chained = {
            "runahead_hosts": hosts,
            "runahead_secret": secret,
            "runahead_transport": "gloo",
            "runahead_cuts": cuts,
            "runahead_min": 1,
        }
        engine = stack.enter_context(
            LineProcess(
                f"engine of {len(places)} ranks",
                [*last.prefix, sys.executable, "-m", "headstart.bench.runahead_worker"],
                timeout,
            )
        )
        yield Chain(engine, **engine.ask(settings | (chained if hosts else {})))


def searched_bounds(
    chain: Chain, measure: Callable[[list[int]], float], tokens: int, ranks: int
) -> list[int]:
    """The cuts of a prompt of ``tokens`` tokens that ``measure(bounds)``, seconds, is least for."""
    positions = Positions(0, tokens, chain.page_size)
    trials = search_cuts(measure, positions, even_cuts(positions, ranks))
    return min(trials, key=lambda trial: trial.seconds).bounds


def predicted_bounds(
    chain: Chain, searched: Iterable[list[int]], tokens: int, ranks: int
) -> list[int] | None:
    """The cuts of ``tokens`` tokens by a table of what was searched; None for want of any."""
    table = CutTable()
    for bounds in searched:
        table = table.with_cuts(bounds)
    return table.predict(ranks, Positions(0, tokens, chain.page_size))


def main() -> None:
    """The engine's process: its settings are the first line."""
    settings = msgspec.json.decode(sys.stdin.readline())
    config = msgspec.convert(settings, EngineConfig)
    logging.basicConfig(level=config.log_level.upper())
    engine = EngineProcess(Engine(config))
    print(msgspec.json.encode(engine.about).decode(), flush=True)
    answer_lines(lambda request: engine.prepare(**request) if request else engine.start())


if __name__ == "__main__":
    main()
