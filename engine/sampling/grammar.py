"""Grammars: which tokens may come next where the output has to follow one.

A grammar is the text that ``llguidance.LLMatcher`` takes. It is compiled once, in a thread of its
own; each sequence gets a copy of the result, its own place in the grammar:

    text ──compile──> matcher ──copy──> Constraint of a sequence
                                          fill     tokens that may come next, a bit each
                                          advance  by the token that came
                                          forced   tokens that have to come then

Where one text alone may follow, as in ``"shipping_address":`` behind its first letter, nothing is
to be chosen: its tokens are the output, and the next step computes them at once.

Masks are filled while the forward pass is computed, which does not need them, by a thread of
their own; behind it where the pass takes every core, since its threads wait for the slowest one:

    step      run ............................ sample
    thread    fill fill fill                     ^ masks

The rules of llguidance, not ours: the end of the sequence may come where the grammar is complete,
and nothing else may where it can't go on; special tokens are no text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import stack_size
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from headstart.engine.errors import RequestError

KEPT = 128
"""Compiled grammars that are kept for the next request with the same."""

MANY = 64
"""Masks that are filled by threads of the library; fewer take less time than waking those: 16 take
0.33 ms in turn, and 0.85 ms with threads on two cores that the kernels share."""

RUN_SECONDS = 0.02
"""How long a step may look for tokens that are certain; others are sampled."""

SLOW_RUN = 0.005
"""Seconds; a grammar with one that takes longer to find, as a text of 60,000 characters does, is
not asked again."""

COMPILER_STACK = 64 << 20
"""Bytes; rules that refer to each other in a long chain take some stack each."""

Mask = npt.NDArray[np.int32]


def limits() -> LLParserLimits:
    """What compiling a grammar, and one step in it, may take: about 20 ms and 20 MB.

    Beyond it the grammar is refused, or its sequence ends.
    """
    return LLParserLimits(
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def load_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """What the model's tokens spell, from its ``tokenizer.json``. Raises RequestError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RequestError(f"the model has no tokenizer to spell its answers: {path} is missing")
    try:
        return LLTokenizer(str(path), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:  # the library raises what comes
        raise RequestError(f"the model's tokenizer cannot spell its answers: {error}") from error


class Grammar:
    """A grammar, compiled. ``certain``: what has to come next is looked for."""

    __slots__ = ("_matcher", "certain")

    def __init__(self, vocabulary: LLTokenizer, text: str) -> None:
        """Raises RequestError with what is wrong with ``text``."""
        self._matcher = LLMatcher(vocabulary, text, limits=limits(), log_level=0)
        self.certain = True
        if self._matcher.is_error():
            raise RequestError(reason(self._matcher))

    def begin(self) -> Constraint:
        """A sequence's own place, at the beginning."""
        return Constraint(self, self._matcher.deep_copy())


def reason(matcher: LLMatcher) -> str:
    """What its grammar is refused for, in one line."""
    text = matcher.get_error().replace("<non-verbose/>", "")
    return " ".join(text.split())[:500]


class Constraint:
    """A sequence's place in its grammar. ``matcher``: nobody else's."""

    __slots__ = ("_grammar", "matcher")

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self._grammar = grammar
        self.matcher = matcher

    def advance(self, token_id: int) -> None:
        """Go on by the token that was chosen, one that may come."""
        self.matcher.consume_token(token_id)

    def forced(self) -> list[int]:
        """The tokens that have to come next, as far as that is quickly known; goes on by them."""
        if not self._grammar.certain:
            return []
        begin = perf_counter()
        token_ids = self.matcher.compute_ff_tokens()
        if token_ids:
            self.matcher.consume_tokens(token_ids)
        if perf_counter() - begin > SLOW_RUN:
            self._grammar.certain = False
        return token_ids

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may come."""
        return self.matcher.is_stopped() and self.matcher.is_accepting()


class Masks(NamedTuple):
    """``rows``: those of the step's rows that have a mask. ``bits``: int32 ``[len(rows),
    ceil(vocab / 32)]``; bit ``i % 32`` of word ``i // 32`` says whether token i may come.

    ``failed``: rows without one, since their grammars cannot be followed any further, and why.
    """

    rows: list[int]
    bits: Mask
    failed: dict[int, str]


class Grammars:
    """The grammars of one model. Not thread-safe: one thread calls it; its own compile and fill."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        *,
        spare_core: bool = False,
    ) -> None:
        """``spare_core``: there is one that the forward pass does not use."""
        self._spare_core = spare_core
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None  # read by the compiling thread
        self._kept: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._compiler: ThreadPoolExecutor | None = None
        self._executors: dict[int | None, LLExecutor] = {}  # by their number of threads
        self._filler: ThreadPoolExecutor | None = None

    def compile(self, grammar: str) -> Future[Grammar]:
        """The compiled grammar, now or later; its exception is a RequestError."""
        future = self._kept.get(grammar)
        if future is None:
            future = self._kept[grammar] = self._thread().submit(self._compile, grammar)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return future

    def start_filling(self, constraints: Items[Constraint | None]) -> Callable[[], Masks | None]:
        """Begin to fill the masks, if there is a core to do so; what is returned waits for them.

        Until then nobody may touch the constraints.
        """
        if not self._spare_core or not any(constraints):
            return partial(self.fill, constraints)
        if self._filler is None:
            self._filler = ThreadPoolExecutor(1, thread_name_prefix="masks")
        return self._filler.submit(self.fill, constraints).result

    def fill(self, constraints: Items[Constraint | None]) -> Masks | None:
        """The masks of those rows that have a constraint; None if no row has."""
        rows = [i for i, constraint in enumerate(constraints) if constraint is not None]
        if not rows:
            return None
        matchers = [each.matcher for each in constraints if each is not None]
        bits = np.zeros((len(rows), -(-self._vocab_size // 32)), dtype=np.int32)
        self._fill(matchers, bits)
        failed = {
            row: reason(matcher)
            for row, matcher in zip(rows, matchers, strict=True)
            if matcher.is_error()
        }
        if failed:
            kept = [i for i, row in enumerate(rows) if row not in failed]
            rows, bits = [rows[i] for i in kept], bits[kept]
        return Masks(rows, bits, failed)

    def _fill(self, matchers: list[LLMatcher], bits: Mask) -> None:
        n, row = len(matchers), bits.shape[1] * bits.itemsize
        start: int = bits.ctypes.data
        if n < MANY and not self._spare_core:
            for i, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(start + i * row, row)
            return
        # Unlike the matchers, an executor lets go of the interpreter's lock.
        threads = 1 if n < MANY else None
        if threads not in self._executors:
            self._executors[threads] = LLExecutor(threads)
        indexed = [(matcher, i) for i, matcher in enumerate(matchers)]
        self._executors[threads].unsafe_compute_mask_ptr(indexed, start, row, n)

    def _compile(self, grammar: str) -> Grammar:
        if self._vocabulary is None:
            self._vocabulary = load_vocabulary(self._folder, self._vocab_size, self._eos_token_ids)
        return Grammar(self._vocabulary, grammar)

    def _thread(self) -> ThreadPoolExecutor:
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            before = stack_size(COMPILER_STACK)
            self._compiler.submit(int).result()  # the thread starts now
            stack_size(before)
        return self._compiler
