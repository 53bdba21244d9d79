"""Prompts with segments get the answers of transformers' model with an explicit mask.

conftest.py makes that mask from the definition, has the model answer under it, and says how near
ties are dealt with. The engine is given spans.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.engine.batch import Batch, build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decoder import Decoder
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.ranges.segments import Segments, Span
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.backend import Backend
from headstart.kernels.cpu.backend import CpuBackend
from headstart.kernels.devices import instruction_sets, load_backend

pytestmark = pytest.mark.covering

F32_LOGITS = 1e-4  # largest difference of a logit, relative to the largest logit; measured 1e-5
PAGE = 32
NEW = 12
ARCHITECTURES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
BACKENDS = [*instruction_sets(), "reference"]

# How the same prompts are computed: EngineConfig fields.
MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "uncached": {"prefix_caching": False},
    "chunks of 16": {"max_batched_tokens": 16},
    "chunks of 33": {"max_batched_tokens": 33},
    "few at a time": {"max_running": 3},
    "relay": {"relay": "on"},
}

References = Callable[[Path], Any]
Tiles = Callable[[int], None]


@dataclass(frozen=True)
class Chat:
    """A prompt, and the spans of its segments."""

    tokens: list[int]
    spans: list[Span] = field(default_factory=list)


def some_tokens(seed: int) -> Callable[[int], list[int]]:
    draw = random.Random(seed)
    return lambda n: [draw.randrange(3, 320) for _ in range(n)]


def chat(*parts: tuple[str, list[int]]) -> Chat:
    """Parts that are segments are called system and user; the others may have any name."""
    tokens: list[int] = []
    spans = []
    for role, part in parts:
        if role in ("system", "user"):
            spans.append((len(tokens), len(tokens) + len(part)))
        tokens += part
    return Chat(tokens, spans)


def chats() -> list[Chat]:
    some = some_tokens(1)
    system, begin, header = some(70), ("begin", [0]), ("header", some(3))
    turns = chat(
        begin, ("system", system), ("user", some(12)), ("assistant", some(20)),
        ("user", some(33)), header,
    )  # fmt: skip
    return [
        turns,
        chat(begin, ("system", system), ("user", some(9)), header),
        chat(begin, ("system", some(40)), ("user", some(25)), header),
        chat(begin, ("user", some(131)), header),  # longer than any budget below
        chat(("system", some(32)), ("user", some(32)), header),  # ends with pages
        chat(begin, ("system", system), ("assistant", some(2)), ("user", some(24))),  # at the end
        chat(("user", some(33))),
        Chat(some(40), [(0, 1), (5, 6), (6, 7), (7, 20), (20, 22), (39, 40)]),  # of one token
        Chat(turns.tokens),  # causal, with the same tokens
        Chat(some(50)),
    ]


def make(folder: Path, where: str = "auto", **settings: Any) -> Engine:
    fields = {
        "weights": "f32",
        "threads": 2,
        "kv_memory": 64 << 20,
        "max_model_len": 512,
        "relay": "off",
        **({"backend": "reference"} if where == "reference" else {"isa": where}),
    }
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


def run(engine: Engine, prompts: list[Chat], new: int = NEW) -> tuple[list[list[int]], list[int]]:
    """Computed together: each one's output, and how many of its tokens were cached."""
    outputs: list[list[int]] = [[] for _ in prompts]
    cached = [0 for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(i, array("i", prompt.tokens), greedy(new), segments=prompt.spans)
    while engine.has_work:
        for output in engine.step():
            outputs[output.id].extend(output.token_ids)
            cached[output.id] = output.cached_tokens
        engine.check()
    return outputs, cached


def check(
    reference: Any, prompts: list[Chat], outputs: list[list[int]], new: int | None = NEW
) -> None:
    reference.check([c.tokens for c in prompts], outputs, new, [c.spans for c in prompts])


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(request.param)


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """``tiles(rows)``: how many rows go through a layer at a time from now on."""
    return lambda rows: monkeypatch.setattr(CpuBackend, "tile_rows", rows)


# ------------------------------------------------------------------------------- logits


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of a logit, relative to the largest logit."""
    return float((result - expected).abs().max() / expected.abs().max())


def changed_rows(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    return torch.nonzero((one != other).any(dim=1))[:, 0].tolist()


def rows_that_see(prompt: Chat, position: int) -> list[int]:
    return [
        row
        for row in range(len(prompt.tokens))
        if position <= row
        or any(start <= row < end and start <= position < end for start, end in prompt.spans)
    ]


def with_another_token(prompt: Chat, position: int) -> Chat:
    tokens = list(prompt.tokens)
    tokens[position] = 3 + (tokens[position] + 100) % 300
    return Chat(tokens, prompt.spans)


def test_the_reference_honours_the_mask(tiny: Path, references: References) -> None:
    """It must not ignore what it is given, nor make something of its own of it."""
    reference, prompt = references(tiny), chats()[0]
    expected = reference.logits(prompt.tokens, prompt.spans)
    for position in (0, 5, 70, 71, 82, 83, 102, 103, 120, 138):
        other = with_another_token(prompt, position)
        found = reference.logits(other.tokens, other.spans)
        assert changed_rows(found, expected) == rows_that_see(prompt, position), position
    # One token is no segment: an explicit mask that is the causal one.
    causal = reference.logits(prompt.tokens)
    assert difference(reference.logits(prompt.tokens, [(0, 1)]), causal) < F32_LOGITS
    full = reference.logits(prompt.tokens, [(0, len(prompt.tokens))])
    # Far apart: whoever computes another mask is found out, by the last row alone, too.
    for rows in (slice(None), slice(-1, None)):
        for wrong in (causal, full):
            assert difference(wrong[rows], expected[rows]) > 100 * F32_LOGITS


def load(folder: Path, where: str) -> tuple[Decoder, Backend]:
    name, isa = ("reference", "auto") if where == "reference" else ("cpu", where)
    backend = load_backend(name, isa=isa, weights="f32", threads=2)
    return load_decoder(folder, ModelConfig.from_folder(folder), backend, "f32", 512), backend


def logits_of(
    model: tuple[Decoder, Backend], prompt: Chat, cuts: Iterable[int] = ()
) -> torch.Tensor:
    """Logits of every position, computed in chunks that end at ``cuts``."""
    # In a pool of its own: KV left there by an earlier call would hide that a row reads too early.
    runner = ModelRunner(*model, 512 // PAGE)
    n = len(prompt.tokens)
    seq = Sequence(
        0,
        array("i", prompt.tokens),
        n,
        SamplingParams(max_tokens=1),
        pages=list(range(-(-n // PAGE))),
        segments=Segments.of(prompt.spans, n),
    )
    parts, start = [], 0
    for end in (*cuts, n):
        chunk = ScheduledSequence(seq, start, end - start, False)
        parts.append(runner.run(build_batch([chunk], PAGE).with_all_logits()).clone())
        start = end
    return torch.cat(parts)


@pytest.mark.parametrize("where", BACKENDS)
def test_logits(tiny: Path, references: References, tiles: Tiles, where: str) -> None:
    model = load(tiny, where)
    for i in (0, 3, 4, 7):
        prompt = chats()[i]
        expected = references(tiny).logits(prompt.tokens, prompt.spans)
        segments = Segments.of(prompt.spans, len(prompt.tokens))
        cuts = sorted({segments.end_of(p) for p in range(1, len(prompt.tokens), 10)})
        for rows in (512, 8):
            tiles(rows)
            assert difference(logits_of(model, prompt), expected) < F32_LOGITS
            assert difference(logits_of(model, prompt, cuts[:-1]), expected) < F32_LOGITS


@pytest.mark.parametrize("where", BACKENDS)
def test_rows_depend_on_what_they_see_and_on_nothing_else(
    llama: Path, tiles: Tiles, where: str
) -> None:
    """Without a reference: neither a causal nor a full mask, nor one that is a row off, passes."""
    model, prompt = load(llama, where), chats()[0]
    for rows in (512, 8):
        tiles(rows)
        expected = logits_of(model, prompt)
        for position in (0, 1, 5, 70, 71, 82, 83, 102, 103, 120, 135, 136, 138):
            found = logits_of(model, with_another_token(prompt, position))
            assert changed_rows(found, expected) == rows_that_see(prompt, position), position


# ------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("mode", MODES)
def test_tokens(tiny: Path, references: References, mode: str) -> None:
    """All together, those with segments among causal ones; then again, from the cache."""
    engine, prompts = make(tiny, **MODES[mode]), chats()
    outputs, cached = run(engine, prompts)
    check(references(tiny), prompts, outputs)
    assert (sum(cached) > 0) is (mode != "uncached")
    again, cached = run(engine, prompts)
    check(references(tiny), prompts, again)
    if mode == "uncached":
        assert not sum(cached)
    else:
        # All full pages, but never a prompt's last token.
        assert cached == [(len(c.tokens) - 1) // PAGE * PAGE for c in prompts]


@pytest.mark.parametrize("mode", ["whole", "chunks of 33"])
def test_tokens_in_tiles(tiny: Path, references: References, tiles: Tiles, mode: str) -> None:
    """Tiles of 8 rows, so that most have rows of two requests, or no row that samples."""
    tiles(8)
    outputs, _ = run(make(tiny, **MODES[mode]), chats())
    check(references(tiny), chats(), outputs)


@pytest.mark.parametrize("where", BACKENDS)
def test_tokens_on_every_backend(llama: Path, references: References, where: str) -> None:
    engine = make(llama, where, max_batched_tokens=100)
    prompts = chats()
    for _ in range(2):
        outputs, _ = run(engine, prompts, 8)
        check(references(llama), prompts, outputs, 8)


def test_alone_and_turn_by_turn(tiny: Path, references: References) -> None:
    """Each conversation goes on twice, with its answers as assistant turns."""
    engine, prompts = make(tiny, max_batched_tokens=64), chats()
    known: list[int] = []
    for turn in range(3):
        outputs, hits = [], []
        for prompt in prompts:
            [output], [cached] = run(engine, [prompt])
            outputs.append(output)
            hits.append(cached)
        check(references(tiny), prompts, outputs)
        if turn:
            # All that was computed and fills a page: prompt and answer but for the last token.
            assert hits == [(n - 1) // PAGE * PAGE for n in known]
        known = [len(c.tokens) + NEW for c in prompts]
        question, header = some_tokens(turn)(20), some_tokens(turn)(4)
        prompts = [
            Chat(
                [*c.tokens, *output, *question, *header],
                [*c.spans, (n, n + len(question))] if c.spans else [],  # causal ones stay causal
            )
            for c, output, n in zip(prompts, outputs, known, strict=True)
        ]


# ------------------------------------------------------------------------------- the cache


def first() -> Chat:
    """Pages of 32: [0, 70) is begin and system, [70, 110) the user, then 3 of a header."""
    some = some_tokens(5)
    return chat(("begin", [0]), ("system", some(69)), ("user", some(40)), ("header", some(3)))


def with_tokens(at: int, tokens: list[int]) -> list[int]:
    return [*first().tokens[:at], *tokens, *first().tokens[at + len(tokens) :]]


# What comes after ``first``, and how many of its tokens are then cached.
SECOND: dict[str, tuple[Chat, int]] = {
    "the same": (first(), 96),
    "the system turn in two": (Chat(first().tokens, [(1, 40), (40, 70), (70, 110)]), 0),
    "the user's turn in two": (Chat(first().tokens, [(1, 70), (70, 97), (97, 110)]), 64),
    "one turn": (Chat(first().tokens, [(1, 110)]), 0),
    "a user's turn that ends earlier": (Chat(first().tokens, [(1, 70), (70, 109)]), 64),
    "a user's turn that begins later": (Chat(first().tokens, [(1, 70), (71, 110)]), 64),
    "a causal user": (Chat(first().tokens, [(1, 70)]), 64),
    "a causal system": (Chat(first().tokens, [(70, 110)]), 0),
    "all causal": (Chat(first().tokens), 0),
    "another user": (
        chat(("", [0]), ("system", first().tokens[1:70]), ("user", [9] * 30), ("", [7, 8])),
        64,
    ),
    # The user's tokens are equal up to the end of page 2, and differ beyond.
    "another user from a page's end on": (Chat(with_tokens(96, [9, 8]), first().spans), 64),
    "another last token of the user": (Chat(with_tokens(109, [9]), first().spans), 64),
    "another header": (Chat([*first().tokens[:110], *[9] * 30], first().spans), 96),
    "another header and nothing new": (Chat(with_tokens(110, [9]), first().spans), 96),
    # Text appended to a segment: its pages are others, even those that hold no token of that text.
    "a longer user's turn": (Chat(first().tokens, [(1, 70), (70, 113)]), 64),
    "text after the user's": (Chat([*first().tokens, *[9] * 30], [(1, 70), (70, 140)]), 64),
    "text after the system's": (
        Chat([*first().tokens[:70], 9, *first().tokens[70:]], [(1, 71), (71, 111)]),
        0,
    ),
    "another system turn": (Chat(with_tokens(69, [9]), first().spans), 0),
    "another begin": (Chat(with_tokens(0, [9]), first().spans), 0),
}


@pytest.mark.parametrize("name", SECOND)
def test_prefix_hits(llama: Path, references: References, name: str) -> None:
    second, expected = SECOND[name]
    engine = make(llama)
    run(engine, [first()])
    [output], [cached] = run(engine, [second])
    assert cached == expected
    check(references(llama), [second], [output])
    assert [output] == run(make(llama, prefix_caching=False), [second])[0]
    # And the other way round: what may be shared does not depend on who came first.
    engine = make(llama)
    run(engine, [second])
    [output], [cached] = run(engine, [first()])
    assert cached == min(expected, 96)
    check(references(llama), [first()], [output])


@pytest.mark.parametrize("causal_first", [True, False])
def test_causal_prompts_share_with_causal_ones_only(
    llama: Path, references: References, causal_first: bool
) -> None:
    """Not even the pages before the first segment: one rule, whatever the segments are."""
    tokens = some_tokens(7)(150)
    pair = [Chat(tokens), Chat(tokens, [(100, 140)])]
    if not causal_first:
        pair.reverse()
    engine = make(llama)
    for prompt in pair:
        for expected in (0, 128):
            outputs, cached = run(engine, [prompt])
            assert cached == [expected]
            check(references(llama), [prompt], outputs)


def test_prefix_hits_after_each_change(llama: Path, references: References) -> None:
    """One token at a time is another one; all pages before it count, but for its segment's."""
    tokens = some_tokens(6)(170)
    spans = [(1, 40), (50, 64), (64, 90), (90, 92), (100, 150)]
    engine = make(llama)
    run(engine, [Chat(tokens, spans)], 1)
    prompts, outputs = [], []
    positions = {0, 1, 31, 32, 39, 40, 49, 50, 63, 64, 89, 90, 91, 92, 95, 96, 99, 100, 127, 128}
    for position in sorted(positions | {149, 150, 159, 160, 168, 169}):
        other = with_another_token(Chat(tokens, spans), position)
        kept = next((start for start, end in spans if start <= position < end), position)
        [output], [cached] = run(engine, [other], 1)
        assert cached == min(kept, 169) // PAGE * PAGE, position
        prompts.append(other)
        outputs.append(output)
    check(references(llama), prompts, outputs, 1)
    assert outputs == run(make(llama, prefix_caching=False), prompts, 1)[0]


def test_the_answer_of_a_turn_is_reused(llama: Path, references: References) -> None:
    engine = make(llama)
    [answer], _ = run(engine, [first()], 40)
    some, begin = some_tokens(8), [*first().tokens, *answer]
    second = Chat([*begin, *some(30), *some(3)], [*first().spans, (153, 183)])
    [output], [cached] = run(engine, [second])
    assert cached == 128  # of 113 + 39 tokens whose KV was computed
    check(references(llama), [second], [output])
    # As a part of the user's turn the answer is something else.
    third = Chat(second.tokens, [*first().spans, (113, 183)])
    [output], [cached] = run(engine, [third])
    assert cached == 96
    check(references(llama), [third], [output])


# ------------------------------------------------------------------------------- together


def test_those_that_decode_get_a_token_in_every_step(
    llama: Path, references: References, tiles: Tiles
) -> None:
    """A segment of 300 tokens under a budget of 40 is computed beside steps of theirs."""
    tiles(64)
    some = some_tokens(9)
    early = [Chat(some(5)), chat(("user", some(20)), ("header", some(2)))]
    late = chat(("begin", [0]), ("user", some(300)), ("header", some(3)))
    engine = make(llama, max_batched_tokens=40)
    for i, prompt in enumerate(early):
        engine.add(i, array("i", prompt.tokens), greedy(14), segments=prompt.spans)
    outputs: list[list[int]] = [[], [], []]
    rows = []
    compute = engine._runner.run

    def counted(batch: Batch) -> torch.Tensor:
        rows.append(batch.num_rows)
        return compute(batch)

    engine._runner.run = counted  # type: ignore[method-assign]
    for step in range(14):
        if step == 3:
            engine.add(2, array("i", late.tokens), greedy(4), segments=late.spans)
        new = engine.step()
        assert [output.id for output in new][:2] == [0, 1]
        for output in new:
            outputs[output.id].extend(output.token_ids)
    # Five tiles of 61 rows; a step computes what takes one tile through both layers. The last
    # layer of those without logits is nothing.
    assert rows == [27, 2, 2, *[2] * 3, 5, 3, 3, 3, 2, 2, 2, 2]
    check(references(llama), early, outputs[:2], 14)
    check(references(llama), [late], outputs[2:], 4)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for attention costs, which are measured once."""
    return str(tmp_path_factory.mktemp("machine"))


def shared_system() -> list[Chat]:
    """Six users after one system turn [1, 291), a causal prompt, and one with the same tokens."""
    some = some_tokens(10)
    begin, system = ("begin", [0]), ("system", some(290))
    prompts = [
        chat(begin, system, ("user", some(5 + 13 * i)), ("header", some(3))) for i in range(6)
    ]
    return [*prompts, Chat(some(40)), Chat(prompts[0].tokens)]


@pytest.mark.parametrize(
    ("where", "relay"), [("auto", "auto"), *((where, "on") for where in BACKENDS)]
)
def test_a_shared_system_turn(
    llama: Path, references: References, costs: str, where: str, relay: str
) -> None:
    prompts, new = shared_system(), 6
    plain, _ = run(make(llama, where, max_batched_tokens=100), prompts, new)
    check(references(llama), prompts, plain, new)
    settings = {"relay": relay, "relay_check": 2, "cache_dir": costs}
    engine = make(llama, where, max_batched_tokens=100, **settings)
    outputs, cached = run(engine, prompts, new)
    assert outputs == plain
    # The 291 tokens before the users fill 9 pages; the last tokens of the turn are computed again.
    assert cached == [0, *[288] * 5, 0, 0]
    stats = engine.stats.relay
    assert not stats.refused
    if relay == "on":
        assert stats.steps >= new - 1
        assert stats.checks >= 2


@pytest.mark.parametrize("where", BACKENDS)
def test_a_shared_system_turn_is_one_full_range_of_all(llama: Path, costs: str, where: str) -> None:
    """In the users' prefill, and while they decode."""
    engine = make(llama, where, relay="on", cache_dir=costs)
    users, new = shared_system()[:6], 4
    run(engine, [users[0]], 1)
    batches = []
    compute = engine._runner.run

    def kept(batch: Batch) -> torch.Tensor:
        batches.append(batch)
        return compute(batch)

    engine._runner.run = kept  # type: ignore[method-assign]
    run(engine, users, new)
    assert [batch.num_rows for batch in batches] == [
        sum(len(user.tokens) - 288 for user in users), 6, 6, 6,
    ]  # fmt: skip
    step = engine._runner.backend.range_step
    end = 288 // step * step  # 256, or 288: inside the turn, which ends at 291
    for batch in batches:
        ranges = batch.kv_ranges
        assert len(ranges) == 1 + len(users)
        count = int(ranges.row_start[1])
        assert ranges.first_key.tolist() == [0] + [end] * len(users)
        assert ranges.page_start[1] * PAGE == end
        assert sorted(ranges.rows[:count]) == list(range(batch.num_rows))
        assert ranges.visible[:count].tolist() == [end] * batch.num_rows
    # The first user's rows: the rest of the turn sees the turn, the user's turn itself, ...
    rows = batches[0].kv_ranges.visible[batches[0].num_rows :][:11]
    assert (rows + end).tolist() == [291] * 3 + [296] * 5 + [297, 298, 299]


# ------------------------------------------------------------------------------- few pages


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: Chat
    max_tokens: int
    aborted_at: int | None


def workload(seed: int) -> list[Arrival]:
    """Conversations below two system turns, at all turns of theirs, some of them causal."""
    draw = random.Random(seed)
    some = some_tokens(seed + 100)
    systems = [some(n) for n in (75, 130)]
    users = [some(n) for n in (5, 26, 38, 64)]
    arrivals = []
    step = 0
    for _ in range(24):
        step += draw.choice((0, 0, 0, 1, 3))
        parts = [("begin", [0]), ("system", draw.choice(systems))]
        for _ in range(draw.choice((1, 1, 2))):
            parts += [("user", draw.choice(users)), ("assistant", users[1][: draw.randint(3, 26)])]
        prompt = chat(*parts)
        if draw.random() < 0.2:
            prompt = Chat(prompt.tokens)
        aborted_at = step + draw.choice((0, 1, 4)) if draw.random() < 0.2 else None
        arrivals.append(Arrival(step, prompt, draw.randint(2, 90), aborted_at))
    return arrivals


def run_workload(engine: Engine, arrivals: list[Arrival]) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in arrivals]
    step = 0
    while step <= arrivals[-1].step or engine.has_work:
        for i, arrival in enumerate(arrivals):
            if arrival.step == step:
                prompt = arrival.prompt
                engine.add(
                    i, array("i", prompt.tokens), greedy(arrival.max_tokens), segments=prompt.spans
                )
        # Some before their first step, while a segment of theirs waits.
        engine.abort([i for i, arrival in enumerate(arrivals) if arrival.aborted_at == step])
        if engine.has_work:
            for output in engine.step():
                outputs[output.id].extend(output.token_ids)
            engine.check()
        step += 1
    return outputs


@pytest.mark.parametrize(("arch", "seed"), [("llama", 0), ("qwen3", 1), ("llama", 2)])
def test_workloads(
    tiny_model: Callable[..., Path], references: References, costs: str, arch: str, seed: int
) -> None:
    """Too few pages: nodes are evicted, sequences preempted, others aborted on their way."""
    folder, arrivals = tiny_model(arch), workload(seed)
    page = make(folder)._page_bytes
    kept = [i for i, arrival in enumerate(arrivals) if arrival.aborted_at is None]
    prompts = [arrivals[i].prompt for i in kept]
    expected: list[list[int]] = []
    for settings in (
        {"prefix_caching": False},
        {"kv_memory": 16 * page},
        {"kv_memory": 16 * page, "relay": "on", "relay_check": 5, "cache_dir": costs},
    ):
        engine = make(folder, max_batched_tokens=60, **settings)
        outputs = run_workload(engine, arrivals)
        found = [outputs[i] for i in kept]
        assert [len(output) for output in found] == [arrivals[i].max_tokens for i in kept]
        assert found == (expected or found)
        expected = found
        check(references(folder), prompts, found, None)
        stats = engine.stats
        if "kv_memory" in settings:
            assert stats.preemptions > 0
            assert stats.cached_tokens > 0
            computed = stats.prompt_tokens - stats.cached_tokens + stats.generation_tokens
            assert computed > stats.pages_total * PAGE  # more than there is room for
        if "relay" in settings:
            assert stats.relay.steps > 0
            assert stats.relay.largest_difference == 0.0


@pytest.mark.parametrize("caching", [True, False])
def test_preempted(llama: Path, references: References, caching: bool) -> None:
    """Young conversations lose their pages, segments of theirs too, and come back."""
    some = some_tokens(11)
    system = some(60)
    prompts = [chat(("system", system), ("user", some(20 + i)), ("", [7])) for i in range(8)]
    page = make(llama)._page_bytes
    engine = make(llama, kv_memory=16 * page, max_batched_tokens=48, prefix_caching=caching)
    outputs, cached = run(engine, prompts, 90)
    check(references(llama), prompts, outputs, 90)
    assert engine.stats.preemptions > 0
    assert (sum(cached) > 0) is caching
