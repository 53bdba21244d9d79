"""tune: search where prompts are best cut on these machines, and keep it (KVR-S, KVR-P)."""

from __future__ import annotations

import random
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence

from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.runahead.cuts import Positions, Trial, even_cuts, search_cuts
from headstart.engine.sampling.params import SamplingParams

FORMING_SECONDS = 120.0
"""How long ranks may take to be there."""


def await_chain(engine: Engine, seconds: float = FORMING_SECONDS) -> None:
    """Until every rank is in the chain; raises ConfigError if that takes too long."""
    deadline = time.monotonic() + seconds
    assert engine.runahead is not None
    while not engine.runahead.whole:
        engine.attend_chain()
        if time.monotonic() > deadline:
            raise ConfigError(f"the chain is not whole after {seconds:g} s: {engine.runahead}")
        time.sleep(0.01)


def first_token_seconds(engine: Engine, prompt: array[int], request_id: int) -> float:
    """Time from adding a prompt to its first token; nothing else runs."""
    begin = time.perf_counter()
    engine.add(request_id, prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    while not engine.step():
        pass
    return time.perf_counter() - begin


class Measurement:
    """Times of prompts of random tokens, with the cuts as asked."""

    def __init__(self, engine: Engine, repeats: int, seed: int = 0) -> None:
        self._engine = engine
        self._repeats = repeats
        self._random = random.Random(seed)
        self._count = 0

    def seconds(self, bounds: Sequence[int]) -> float:
        """Median time to the first token of a prompt cut at these bounds."""
        chain = self._engine.runahead
        assert chain is not None
        chain.forced_bounds = list(bounds)
        try:
            return statistics.median(self._once(bounds[-1]) for _ in range(self._repeats))
        finally:
            chain.forced_bounds = None

    def _once(self, length: int) -> float:
        self._count += 1
        vocabulary = self._engine.model.vocab_size
        prompt = array("i", (self._random.randrange(vocabulary) for _ in range(length)))
        return first_token_seconds(self._engine, prompt, self._count)


def search(engine: Engine, length: int, measurement: Measurement) -> Iterator[Trial]:
    """Every trial of the search for the best cuts of a prompt of ``length`` tokens."""
    assert engine.runahead is not None
    positions = Positions(0, length, engine.model.page_size)
    start = even_cuts(positions, engine.runahead.num_ranks)
    yield from search_cuts(measurement.seconds, positions, start)


def tune(engine: Engine, lengths: Sequence[int], repeats: int) -> Iterator[str]:
    """Search the cuts of these lengths and keep them; lines that say how it goes.

    Raises ConfigError where ranks are missing or a length is beyond the model.
    """
    longest = engine.model.max_model_len - 1
    for length in lengths:
        if not 2 * engine.model.page_size <= length <= longest:
            raise ConfigError(
                f"--lengths: {length} is not between {2 * engine.model.page_size} and {longest}"
            )
    engine.warm_up()
    await_chain(engine)
    chain = engine.runahead
    assert chain is not None
    measurement = Measurement(engine, repeats)
    folder = None
    for length in sorted(set(lengths)):
        measurement.seconds(even_cuts(Positions(0, length, engine.model.page_size), 2))  # warm
        trials: list[Trial] = []
        for trial in search(engine, length, measurement):
            trials.append(trial)
            yield f"{length} tokens  {trial.seconds:8.3f} s  cuts {_cuts(trial.bounds)}"
        best = min(trials, key=lambda trial: trial.seconds)
        folder = chain.tuned(best.bounds)
        gain = trials[0].seconds / best.seconds
        yield f"{length} tokens: best {_cuts(best.bounds)}, {gain:.3f}x even, {len(trials)} trials"
    yield f"kept in {folder}" if folder else "kept nowhere"


def _cuts(bounds: Sequence[int]) -> str:
    return " ".join(map(str, bounds[1:-1])) or "none"
