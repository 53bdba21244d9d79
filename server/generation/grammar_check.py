"""GrammarChecker: whether a grammar can be followed, found out where it can do no harm.

    python -m headstart.server.generation.grammar_check    what it starts for the first grammar

A grammar or schema that a client sends may take minutes to compile, or overflow the stack of who
compiles it. So a process of its own does that first, and fills a mask, under limits of time and
memory; if it does not come back in time, or at all, the grammar is refused, and the next one gets
a new process. The engine compiles only what has passed.

    server ── {"tokenizer", "vocab_size", "eos_token_ids"} ──> checker     once
           ── {"grammar"} ───────────────────────────────────>             a line each
           <──────────────────────────────────── {"error"} ───
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from headstart.engine.errors import RequestError

KEPT = 4096
"""Grammars whose fate is remembered, as 32 bytes and a message each."""

MEMORY = 2 << 30
"""Bytes the checker may use."""

START_SECONDS = 30.0
"""How long a new checker may take to read the vocabulary."""


class Vocabulary(msgspec.Struct, frozen=True):
    """What the checker has to know of the model. ``tokenizer``: the text of tokenizer.json."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: list[int]


class Question(msgspec.Struct, frozen=True):
    grammar: str


class Answer(msgspec.Struct, frozen=True):
    """``error``: what is wrong with it, or None."""

    error: str | None


class GrammarChecker:
    """Checks grammars one at a time; what it has seen before costs nothing.

    ``tokenizer``: gives the text of tokenizer.json. ``seconds``: how long one may take. ``place``:
    is held by each that waits or is checked; it raises what is told when there is none.
    """

    def __init__(
        self,
        tokenizer: Callable[[], str],
        seconds: float,
        place: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._place = place
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._busy = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []

    async def check(self, grammar: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        """Raises RequestError with what is wrong with ``grammar``."""
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest not in self._known:
            with self._place():
                await self._find_out(digest, grammar, vocab_size, eos_token_ids)
        self._known.move_to_end(digest)
        error = self._known[digest]
        if error is not None:
            raise RequestError(error)

    async def _find_out(
        self, digest: bytes, grammar: str, vocab_size: int, eos_token_ids: list[int]
    ) -> None:
        async with self._busy:
            if digest not in self._known:  # somebody may have asked the same meanwhile
                self._remember(digest, await self._ask(grammar, vocab_size, eos_token_ids))

    async def close(self) -> None:
        """End the process, if there is one, and wait for all that were ended."""
        self._kill()
        for process in self._killed:
            await process.wait()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            self._killed = [killed for killed in self._killed if killed.returncode is None]
            self._killed.append(process)
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _remember(self, digest: bytes, error: str | None) -> None:
        self._known[digest] = error
        if len(self._known) > KEPT:
            self._known.popitem(last=False)

    async def _ask(self, grammar: str, vocab_size: int, eos_token_ids: list[int]) -> str | None:
        for _ in range(2):  # the process may have ended before
            try:
                if self._process is None or self._process.returncode is not None:
                    await self._start(Vocabulary(self._tokenizer(), vocab_size, eos_token_ids))
                answer = await self._exchange(Question(grammar), self._seconds)
            except TimeoutError:
                self._kill()
                return f"it takes more than {self._seconds:g} s to compile; make it simpler"
            except (EOFError, OSError):  # it ended, perhaps by what the grammar did to it
                self._kill()
            except BaseException:  # cancelled: the answer to come is not for the next question
                self._kill()
                raise
            else:
                return answer.error
        return "it cannot be compiled: it is too deep or too large"

    async def _start(self, vocabulary: Vocabulary) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headstart.server.generation.grammar_check",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        await self._exchange(vocabulary, START_SECONDS)

    async def _exchange(self, message: Vocabulary | Question, seconds: float) -> Answer:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        async with asyncio.timeout(seconds):
            process.stdin.write(msgspec.json.encode(message) + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        if not line:
            raise EOFError
        return msgspec.json.decode(line, type=Answer)


def main() -> None:
    """Answer questions until standard input ends."""
    # Imported here: the server needs none of it.
    from headstart.engine.sampling.grammar import MANY, Grammar, Grammars, load_vocabulary

    os.nice(5)
    # Not RLIMIT_AS: with a thread for each of many cores, reserved addresses alone may be more.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = sys.stdin.buffer
    known = msgspec.json.decode(lines.readline(), type=Vocabulary)
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        path = Path(folder)
        (path / "tokenizer.json").write_text(known.tokenizer)
        vocabulary = load_vocabulary(path, known.vocab_size, known.eos_token_ids)
        grammars = Grammars(path, known.vocab_size, known.eos_token_ids)
    _answer(None)
    for line in lines:
        question = msgspec.json.decode(line, type=Question)
        try:
            grammar = Grammar(vocabulary, question.grammar)
            # As many as make the engine use threads, whose stacks are smaller.
            masks = grammars.fill([grammar.begin() for _ in range(MANY)])
            if masks is None or not masks.bits.any():
                raise RequestError("nothing can follow it")
        except RequestError as error:
            _answer(str(error))
        else:
            _answer(None)


def _answer(error: str | None) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(Answer(error)) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
