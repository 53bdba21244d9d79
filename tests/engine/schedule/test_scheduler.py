"""Scheduler: rules one by one, then random use against a model that remembers what pages hold."""

import itertools
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.errors import RequestError
from headstart.engine.kv.pool import PagePool
from headstart.engine.kv.tree import RadixCache
from headstart.engine.ranges.segments import Segments, Span
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.schedule.scheduler import (
    LONGEST_RUN,
    MOST_LONG,
    NOTHING,
    NewToken,
    Scheduler,
    SchedulerOutput,
)
from headstart.engine.schedule.turns import Pace
from headstart.engine.sequence import FinishReason, ScheduledSequence, Sequence, Status

EOS = 2


def make_sequence(
    id_: int,
    prompt: list[int],
    max_tokens: int = 1,
    namespace: bytes = b"",
    spans: Iterable[Span] = (),
    priority: int = 0,
    **params: Any,
) -> Sequence:
    segments = Segments.of(spans, len(prompt))
    return Sequence(
        id=id_,
        token_ids=array("i", prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        namespace=namespace + bytes([bool(segments)]),
        segments=segments,
        priority=priority,
    )


def kv_contents(seq: Sequence, in_flight: Iterable[int] = ()) -> list[int]:
    """For each position a number for all that its KV depends on: the namespace, the tokens its
    row sees, and what each of their rows sees. ``in_flight``: tokens behind the known ones."""
    tokens = [*seq.token_ids, *in_flight]
    seen = seq.segments.visible(0, len(tokens))
    rows = zip(tokens, seen, strict=True)
    hashes = list(
        itertools.accumulate(rows, lambda h, row: hash((h, row)), initial=hash(seq.namespace))
    )
    return [hash((i, hashes[visible])) for i, visible in enumerate(seen)]


def decodes(seq: Sequence) -> bool:
    """Whether only the last tokens of its output are not computed yet."""
    in_output = seq.num_computed_tokens >= seq.num_prompt_tokens
    return seq.num_pending_tokens == 1 or (in_output and seq.num_pending_tokens <= LONGEST_RUN)


Sample = Callable[[Sequence], int | FinishReason | None]
"""The token a sequence is given, or why it ends; None: its logits were not numbers."""

Force = Callable[[Sequence], list[int]]
"""Tokens that come behind it without being chosen."""


class Engine:
    """A scheduler and a model that remembers for each slot of each page whose token it holds.

    ``long_steps``: how many steps a long chunk takes, the one it begins with included.
    """

    def __init__(
        self, num_pages: int = 64, page_size: int = 4, long_steps: int = 1, **options: Any
    ) -> None:
        self.long: ScheduledSequence | None = None
        self.long_steps = self.long_steps_left = long_steps
        self.pool = PagePool(num_pages, page_size)
        self.cache = RadixCache(self.pool)
        settings: dict[str, Any] = {
            "max_batched_tokens": 16,
            "max_running": 8,
            "max_model_len": 2000,
            "eos_token_ids": [EOS],
        }
        self.scheduler = Scheduler(self.pool, self.cache, **(settings | options))
        self.slots: dict[tuple[int, int], int] = {}
        self.num_computed = 0

    def schedule(self) -> SchedulerOutput:
        """The next step, with what must hold for every one."""
        running = list(self.scheduler._running)
        output = self.scheduler.schedule()
        if output.long_chunk is not None:
            assert self.long is None or self.long.seq.status is Status.FINISHED
            self.long, self.long_steps_left = output.long_chunk, self.long_steps
            self.check_long(output.long_chunk)
        assert output.scheduled or self.long or not self.scheduler.has_work
        chunks = {entry.seq: entry for entry in output.scheduled}
        held_up = self.long is not None and self.long.seq.status is Status.RUNNING
        decoding = [
            seq for seq in running if decodes(seq) and not (self.long and seq is self.long.seq)
        ]
        for seq in decoding:
            assert seq.status is Status.WAITING or seq in chunks, "must decode"
        rows = sum(chunks[seq].num_tokens for seq in decoding if seq in chunks)
        assert rows <= max(len(decoding), self.scheduler._max_batched_tokens), "runs are too long"
        # The first of those that run is passed over only for what the step computes for it; so is
        # the first of the prompts, or for a long chunk.
        alive = [seq for seq in running if seq.status is Status.RUNNING]
        for first in (alive[:1], [seq for seq in alive if seq not in decoding][:1]):
            for seq in first:
                waits = held_up and seq not in decoding
                assert waits or seq in chunks or self.computes_for(output, seq), "starves"
        prompts = [
            entry
            for entry in output.scheduled
            if entry.num_tokens > 1 and entry.seq not in decoding
        ]
        if held_up:
            assert not prompts, "beside a long chunk"
        if output.num_tokens > self.scheduler._max_batched_tokens:
            [entry] = prompts
            assert entry.num_tokens <= self.scheduler._max_batched_tokens
            self.check_long(entry)
        return output

    def computes_for(self, output: SchedulerOutput, seq: Sequence) -> bool:
        wanted = set(kv_contents(seq)[seq.num_computed_tokens :])
        return any(
            wanted & set(kv_contents(other)[start : start + num_tokens])
            for other, start, num_tokens, _ in output.scheduled
        )

    def check_long(self, entry: ScheduledSequence) -> None:
        """What goes beyond the budget ends with a segment that begins within a page."""
        seq, start, num_tokens, _ = entry
        [begin] = [first for first, end in seq.segments.spans if end == start + num_tokens]
        assert begin < start + self.pool.page_size

    def compute(self, entries: list[ScheduledSequence]) -> None:
        """Write the chunks' slots, then read everything up to their ends."""
        size = self.pool.page_size
        contents = {entry.seq: kv_contents(entry.seq) for entry in entries}
        for seq, start, num_tokens, samples in entries:
            assert seq.status is Status.RUNNING
            assert num_tokens > 0
            assert start == seq.num_computed_tokens
            assert samples is (start + num_tokens == seq.num_tokens)
            assert len(seq.pages) == -(-(start + num_tokens) // size)
            end = start + num_tokens
            assert max(seq.segments.visible(start, end)) == end, "a segment is cut"
            for i in range(start, start + num_tokens):
                page = seq.pages[i // size]
                assert self.pool._references[page] == 1, "writes to a page others use"
                self.slots[page, i % size] = contents[seq][i]
        for seq, start, num_tokens, _ in entries:
            for i in range(start + num_tokens):
                assert self.slots[seq.pages[i // size], i % size] == contents[seq][i]
            self.num_computed += num_tokens

    def step(self, sample: Sample = lambda seq: 1, force: Force = lambda seq: []) -> list[NewToken]:
        return self.complete(self.schedule(), sample, force)

    def complete(
        self,
        output: SchedulerOutput,
        sample: Sample = lambda seq: 1,
        force: Force = lambda seq: [],
    ) -> list[NewToken]:
        """Compute the step, and a long chunk when its last one has come; commit both."""
        new = self.complete_step(output, sample, force)
        if self.long is None or self.long.seq.status is not Status.RUNNING:
            self.long = None
            return new
        self.long_steps_left -= 1
        if not self.long_steps_left:
            entry, self.long = self.long, None
            new += self.complete_step(SchedulerOutput([entry], 0), sample)
        return new

    def complete_step(
        self, output: SchedulerOutput, sample: Sample, force: Force = lambda seq: []
    ) -> list[NewToken]:
        self.compute(output.scheduled)
        tokens = [sample(entry.seq) for entry in output.scheduled if entry.samples]
        new = self.scheduler.commit(output, tokens)
        self.extend(new, force)
        self.scheduler.check()
        return new

    def extend(self, new: list[NewToken], force: Force) -> None:
        for seq, _, finished in new:
            if finished:
                continue
            before, forced = seq.num_tokens, force(seq)
            taken = self.scheduler.extend(seq, forced)
            assert taken == forced[: len(taken)] == list(seq.token_ids[before:])
            assert (len(taken) < len(forced)) <= (seq.status is Status.FINISHED)
            assert EOS not in taken[:-1]

    def finish(self, limit: int) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"not done within {limit} steps"

    def drain(self, limit: int) -> None:
        self.finish(limit)
        self.cache.clear()
        assert self.pool.num_used == 0
        self.pool.check({})


def scheduled(output: SchedulerOutput) -> list[tuple[int, int, int]]:
    """The step's chunks, and behind them the long one that begins with it."""
    entries = output.scheduled + ([output.long_chunk] if output.long_chunk else [])
    return [(entry.seq.id, entry.start, entry.num_tokens) for entry in entries]


def test_decoding_comes_before_prefill_and_chunks_end_at_pages() -> None:
    engine = Engine()
    engine.scheduler.add(make_sequence(0, [1] * 3, max_tokens=9))
    engine.step()
    engine.scheduler.add(make_sequence(1, [3] * 40, max_tokens=9))
    engine.step()
    output = engine.scheduler.schedule()
    assert scheduled(output) == [(0, 4, 1), (1, 12, 12)]
    engine.compute(output.scheduled)
    engine.scheduler.commit(output, [1])
    engine.step()
    # 4 tokens are left of the second prompt; its last chunk samples.
    assert scheduled(engine.scheduler.schedule()) == [(0, 6, 1), (1, 36, 4)]


def test_a_budget_below_a_page_still_advances() -> None:
    engine = Engine(max_batched_tokens=3)
    engine.scheduler.add(make_sequence(0, [1] * 10))
    assert scheduled(engine.scheduler.schedule()) == [(0, 0, 3)]
    engine.scheduler.abort([0])
    engine.scheduler.add(make_sequence(1, [1] * 10))
    engine.drain(6)


def test_first_come_first_served_within_running_slots() -> None:
    engine = Engine(max_running=2)
    for i in range(3):
        engine.scheduler.add(make_sequence(i, [3 + i] * 2, max_tokens=2))
    assert [id_ for id_, _, _ in scheduled(engine.scheduler.schedule())] == [0, 1]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)


def test_a_second_request_computes_only_what_is_not_cached() -> None:
    engine = Engine()
    engine.scheduler.add(make_sequence(0, [1] * 14))
    engine.step()
    second = make_sequence(1, [1] * 12)
    engine.scheduler.add(second)
    # 12 tokens are cached, but the last must be computed: a match of 8.
    assert scheduled(engine.scheduler.schedule()) == [(1, 8, 4)]
    assert second.num_cached_tokens == 8
    assert (engine.scheduler.prompt_tokens, engine.scheduler.cached_tokens) == (26, 8)


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine = Engine(prefix_caching=False)
    for i in range(2):
        engine.scheduler.add(make_sequence(i, [1] * 8))
    engine.step()
    assert engine.num_computed == 16
    assert engine.pool.num_used == engine.cache.num_pages == 0


@pytest.mark.parametrize("budget", [64, 200, 512, 4096])
def test_equal_cold_prompts_compute_their_prefix_once(budget: int) -> None:
    engine = Engine(2000, 32, max_batched_tokens=budget, max_running=16)
    prompt = [i % 97 for i in range(1748)]
    for i in range(16):
        engine.scheduler.add(make_sequence(i, [*prompt, 100 + i], max_tokens=1))
    engine.drain(200)
    shared = 1748 // 32 * 32
    assert engine.num_computed == shared + 16 * (1749 - shared)
    assert engine.scheduler.cached_tokens == 15 * shared


def test_a_sequence_in_prefill_jumps_ahead_to_what_another_computed() -> None:
    engine = Engine(max_batched_tokens=8)
    prompt = list(range(10, 50))
    first, second = make_sequence(0, prompt), make_sequence(1, prompt)
    for seq in (first, second):
        engine.scheduler.add(seq)
    while first.status is not Status.FINISHED:
        engine.step()
    engine.drain(3)
    assert engine.num_computed == 40 + 4
    assert second.num_cached_tokens == 36


def test_a_jump_gives_up_a_page_computed_in_part() -> None:
    """One sequence decodes its way to a page that another has begun to compute."""
    engine = Engine(max_batched_tokens=2)
    engine.scheduler.add(make_sequence(0, [5, 6], max_tokens=4))
    late = make_sequence(1, [5, 6, 7, 8, 9, 9])
    engine.step(lambda seq: 7)
    engine.scheduler.add(late)
    engine.step(lambda seq: 8)
    assert late.num_computed_tokens == 1
    engine.step()
    assert late.num_computed_tokens == 1  # it waits for the page the other completes
    engine.step()
    assert (late.num_computed_tokens, late.num_cached_tokens) == (5, 3)
    engine.drain(9)


def test_pages_computed_twice_at_once_are_kept_once() -> None:
    """Two equal prompts of half a page each decode the same output."""
    engine = Engine()
    sequences = [make_sequence(i, [5, 6], max_tokens=9) for i in range(2)]
    for seq in sequences:
        engine.scheduler.add(seq)
    for _ in range(4):
        engine.step()
    assert sequences[0].pages[0] == sequences[1].pages[0]
    assert engine.cache.num_pages == 1
    engine.drain(9)


def test_namespaces_do_not_share() -> None:
    engine = Engine()
    for i, namespace in enumerate([b"a", b"b", b"a"]):
        engine.scheduler.add(make_sequence(i, [1] * 9, namespace=namespace))
        engine.step()
    assert engine.num_computed == 9 + 9 + 1
    engine.drain(1)


def test_decoding_fills_the_cache_with_the_output_too() -> None:
    engine = Engine()
    engine.scheduler.add(make_sequence(0, [3, 4, 5], max_tokens=6))
    while engine.scheduler.has_work:
        engine.step()
    follow_up = make_sequence(1, [3, 4, 5, *[1] * 6, 7, 8])
    engine.scheduler.add(follow_up)
    engine.step()
    assert follow_up.num_cached_tokens == 8


def test_the_youngest_is_preempted_and_resumes_from_the_cache() -> None:
    engine = Engine(num_pages=9, page_size=2)
    old = make_sequence(0, [3, 4], max_tokens=12)
    young = make_sequence(1, [5, 6, 7], max_tokens=9)
    for seq in (old, young):
        engine.scheduler.add(seq)
    for _ in range(12):
        if not engine.scheduler.preemptions:
            engine.step()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert young.num_output_tokens > 0
    computed = engine.num_computed
    left = old.num_pending_tokens + 12 - old.num_output_tokens
    engine.drain(40)
    assert (old.num_output_tokens, young.num_output_tokens) == (12, 9)
    assert (old.num_cached_tokens, young.num_cached_tokens) == (0, 0)
    # Less than all 11 positions of the young one.
    assert engine.num_computed - computed < left + 11


def test_a_decoding_sequence_already_scheduled_can_still_be_preempted() -> None:
    """Its row leaves the step when an older sequence needs its pages for a chunk."""
    engine = Engine(num_pages=11, page_size=2, max_batched_tokens=3)
    old, young = make_sequence(0, [3] * 16), make_sequence(1, [4], max_tokens=15)
    for seq in (old, young):
        engine.scheduler.add(seq)
    for _ in range(7):
        engine.step()
    assert young.num_output_tokens == 7
    output = engine.scheduler.schedule()
    assert (scheduled(output), output.preempted) == ([(0, 14, 2)], 1)
    engine.compute(output.scheduled)
    engine.scheduler.commit(output, [1])
    engine.scheduler.check()
    engine.drain(40)


def test_admission_counts_what_the_step_has_promised_already() -> None:
    engine = Engine(num_pages=11, page_size=2, max_batched_tokens=3)
    engine.scheduler.add(make_sequence(0, [3] * 20))
    engine.scheduler.add(make_sequence(1, [4]))
    assert scheduled(engine.scheduler.schedule()) == [(0, 0, 2)]


def test_a_page_at_others_cost_is_not_more_than_the_budget() -> None:
    engine = Engine(num_pages=10, page_size=4, max_batched_tokens=3)
    for seq in (make_sequence(0, [3] * 28), make_sequence(1, [4] * 2, max_tokens=30)):
        engine.scheduler.add(seq)
    engine.drain(60)
    assert engine.scheduler.preemptions == 1


def test_preemption_happens_and_nothing_is_lost() -> None:
    engine = Engine(num_pages=10, page_size=1, max_running=4)
    sequences = [make_sequence(i, [3 + i], max_tokens=9) for i in range(4)]
    for seq in sequences:
        engine.scheduler.add(seq)
    engine.drain(100)
    assert engine.scheduler.preemptions > 0
    assert sequences[0].num_preemptions == 0
    assert [seq.num_output_tokens for seq in sequences] == [9] * 4
    assert engine.scheduler.generation_tokens == 36
    assert engine.scheduler.prompt_tokens == 4
    assert engine.scheduler.cached_tokens == 0


def test_admission_leaves_room_to_grow() -> None:
    """A prompt that fits only for now waits, instead of being preempted a step later."""
    engine = Engine(num_pages=8, page_size=2)
    engine.scheduler.add(make_sequence(0, [3, 4], max_tokens=11))
    engine.step()
    engine.scheduler.add(make_sequence(1, [5] * 12))
    engine.drain(40)
    assert engine.scheduler.preemptions == 0


# ------------------------------------------------------------------------------- priority


def test_lower_priorities_come_first_and_equals_in_order_of_arrival() -> None:
    engine = Engine(max_running=2)
    for i, priority in enumerate([0, 3, -1, 0, -1]):
        engine.scheduler.add(make_sequence(i, [3 + i], max_tokens=1, priority=priority))
    order = []
    while engine.scheduler.has_work:
        order += [new.seq.id for new in engine.step()]
    assert order == [2, 4, 0, 3, 1]


def test_the_lowest_in_order_is_preempted_though_it_came_first() -> None:
    engine = Engine(num_pages=9, page_size=2)
    first = make_sequence(0, [3, 4], max_tokens=12, priority=5)
    then = make_sequence(1, [5, 6, 7], max_tokens=9, priority=5)
    urgent = make_sequence(2, [8], max_tokens=9, priority=-5)
    for seq in (first, then, urgent):
        engine.scheduler.add(seq)
    engine.drain(60)
    assert urgent.num_preemptions == 0
    assert then.num_preemptions > 0
    assert then.num_preemptions >= first.num_preemptions
    assert [seq.num_output_tokens for seq in (first, then, urgent)] == [12, 9, 9]


def test_who_was_preempted_waits_behind_the_urgent_and_before_later_equals() -> None:
    engine = Engine(num_pages=9, page_size=2, max_running=2)
    old, young = (make_sequence(i, [3 + i] * 2, max_tokens=13) for i in range(2))
    for seq in (old, young):
        engine.scheduler.add(seq)
    engine.scheduler.add(make_sequence(2, [6], max_tokens=1))
    while not engine.scheduler.preemptions:
        engine.step()
    engine.scheduler.add(make_sequence(3, [7], max_tokens=1, priority=-1))
    assert [seq.id for seq in engine.scheduler._waiting] == [3, 1, 2]
    engine.drain(60)


# ------------------------------------------------------------------------------- segments


def test_a_chunk_ends_where_a_segment_ends_or_begins() -> None:
    engine = Engine(max_batched_tokens=16)
    spans = [(2, 15), (15, 31), (33, 36), (41, 50)]
    engine.scheduler.add(make_sequence(0, list(range(60)), spans=spans))
    chunks = []
    while engine.scheduler.has_work:
        output = engine.schedule()
        chunks += [(start, num_tokens) for _, start, num_tokens in scheduled(output)]
        engine.complete(output)
    # Up to a segment's end, twice; before a segment, since 47 and 44 are in it; the rest.
    assert chunks == [(0, 15), (15, 16), (31, 10), (41, 15), (56, 4)]


def test_a_segment_that_fits_beside_other_prompts_runs_with_them() -> None:
    engine = Engine(max_batched_tokens=16)
    engine.scheduler.add(make_sequence(0, [3] * 3))
    # 12 would be a page's end, but in the segment; the 13 tokens that are left of the budget do.
    engine.scheduler.add(make_sequence(1, list(range(20)), spans=[(0, 13)]))
    assert scheduled(engine.schedule()) == [(0, 0, 3), (1, 0, 13)]


def test_a_segment_longer_than_the_budget_runs_whole() -> None:
    """With the begin of text before it; what follows is an ordinary chunk."""
    engine = Engine(max_batched_tokens=8)
    engine.scheduler.add(make_sequence(0, list(range(40)), spans=[(1, 26)]))
    output = engine.schedule()
    assert (scheduled(output), output.scheduled) == ([(0, 0, 26)], [])
    engine.complete(output)
    assert scheduled(engine.schedule()) == [(0, 26, 6)]


def test_a_long_segment_waits_for_its_turn_and_holds_up_other_prompts_while_it_runs() -> None:
    engine = Engine(max_batched_tokens=8, long_steps=2)
    engine.scheduler.add(make_sequence(0, [3] * 14, max_tokens=9))
    engine.scheduler.add(make_sequence(1, list(range(33)), spans=[(0, 30)]))
    engine.scheduler.add(make_sequence(2, [5] * 3))
    steps = []
    for _ in range(5):
        output = engine.schedule()
        steps.append(scheduled(output))
        engine.complete(output)
    assert steps == [
        [(0, 0, 8)],
        [(0, 8, 6)],  # 2 are left: not enough for the segment, and nobody overtakes it
        [(0, 14, 1), (1, 0, 30)],
        [(0, 15, 1)],
        [(0, 16, 1), (1, 30, 3), (2, 0, 3)],
    ]
    engine.drain(10)


def test_a_long_segment_is_not_passed_over_while_others_come() -> None:
    engine = Engine(max_batched_tokens=8, max_running=4)
    long = make_sequence(9, list(range(10, 60)), spans=[(6, 45)])
    engine.scheduler.add(make_sequence(0, [3] * 7))
    engine.scheduler.add(long)
    for i in range(1, 4):
        engine.scheduler.add(make_sequence(i, [3 + i] * 7))
        engine.step()
    # A token beside the first prompt, then all before the segment, then the segment.
    assert long.num_computed_tokens == 45
    engine.drain(20)


def test_those_that_decode_get_a_token_in_every_step_of_long_segments() -> None:
    engine = Engine(num_pages=200, max_batched_tokens=8, long_steps=5)
    decoding = [make_sequence(i, [3 + i] * 2, max_tokens=50) for i in range(3)]
    for seq in decoding:
        engine.scheduler.add(seq)
    engine.step()
    spans = [(0, 40), (40, 45), (50, 90)]
    long = [make_sequence(3 + i, [20 + i] * 100, max_tokens=2, spans=spans) for i in range(3)]
    for seq in long:
        engine.scheduler.add(seq)
    steps = 0
    while any(seq.status is not Status.FINISHED for seq in long):
        engine.step()
        steps += 1
        assert [seq.num_output_tokens for seq in decoding] == [1 + steps] * 3
    assert steps < 3 * 2 * 5 + 3 * 8
    engine.drain(60)


def test_a_chunk_begins_in_a_segment_whose_beginning_is_cached() -> None:
    engine = Engine(max_batched_tokens=16)
    prompts = [[*range(10, 29), last, *range(30, 50)] for last in (8, 9)]
    engine.scheduler.add(make_sequence(0, prompts[0], spans=[(2, 19)]))
    engine.finish(9)
    # The fifth page is another one, behind the segment.
    engine.scheduler.add(make_sequence(1, prompts[1], spans=[(2, 19)]))
    assert scheduled(engine.schedule()) == [(1, 16, 16)]


@pytest.mark.parametrize(
    ("tokens", "spans", "cached"),
    [
        ({}, [(2, 14), (20, 30)], 36),  # all the same
        ({}, [], 0),
        ({}, [(2, 14), (20, 29)], 20),  # where the page begins, too
        ({}, [(2, 14), (19, 30)], 16),
        ({}, [(2, 14)], 20),
        ({}, [(2, 14), (20, 24), (24, 30)], 20),
        ({}, [(3, 14), (20, 30)], 0),
        ({13: 9}, [(2, 14), (20, 30)], 0),
        ({14: 9}, [(2, 14), (20, 30)], 12),  # behind the segment, in its last page
        ({29: 9}, [(2, 14), (20, 30)], 20),  # the last token of a segment of three pages
        ({31: 9}, [(2, 14), (20, 30)], 28),
    ],
)
def test_hits_end_before_the_first_page_whose_segments_differ(
    tokens: dict[int, int], spans: list[Span], cached: int
) -> None:
    engine = Engine()
    prompt = list(range(100, 138))
    engine.scheduler.add(make_sequence(0, prompt, spans=[(2, 14), (20, 30)]))
    engine.finish(9)
    other = [tokens.get(i, token) for i, token in enumerate(prompt)]
    second = make_sequence(1, other, spans=spans)
    engine.scheduler.add(second)
    engine.drain(9)
    assert second.num_cached_tokens == cached


def test_equal_cold_segments_are_computed_once() -> None:
    engine = Engine(max_batched_tokens=8)
    sequences = [make_sequence(i, [*range(10, 43), 50 + i, 60], spans=[(1, 33)]) for i in range(4)]
    for seq in sequences:
        engine.scheduler.add(seq)
    engine.drain(12)
    assert engine.num_computed == 35 + 3 * 3
    assert [seq.num_cached_tokens for seq in sequences] == [0, 32, 32, 32]


def test_a_segment_takes_the_pages_of_the_youngest() -> None:
    engine = Engine(num_pages=15, page_size=2, max_batched_tokens=3)
    old = make_sequence(0, list(range(24)), spans=[(16, 24)])
    young = make_sequence(1, [4], max_tokens=20)
    for seq in (old, young):
        engine.scheduler.add(seq)
    while old.num_computed_tokens < 16:
        engine.step()
    assert not engine.scheduler.preemptions
    output = engine.schedule()
    assert (scheduled(output), output.preempted) == ([(0, 16, 8)], 1)
    engine.complete(output)
    engine.drain(60)
    assert young.num_output_tokens == 20


LAYOUTS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 12)), max_size=6)
"""Segments by their distance from the one before and their length."""


def laid_out(layout: list[Span], num_tokens: int, end: int = 0) -> list[Span]:
    """As many of these segments as begin before ``num_tokens``, from ``end`` on."""
    spans = []
    for gap, length in layout:
        if end + gap < num_tokens:
            spans.append((end + gap, min(end + gap + length, num_tokens)))
            end = spans[-1][1]
    return spans


def continued(
    data: st.DataObject, sequences: list[Sequence], prompt: list[int], layout: list[Span]
) -> tuple[list[int], list[Span]]:
    """A prompt and its segments: as drawn, or behind what a sequence has come to."""
    spans: list[Span] = []
    if sequences and data.draw(st.booleans()):
        # Some of it or all, and more: with its segments.
        known = data.draw(st.sampled_from(sequences))
        kept = data.draw(st.integers(0, min(known.num_tokens, 16)))
        prompt = [*known.token_ids[:kept], *prompt][:16]
        spans = [span for span in known.segments.spans if span[1] <= kept]
    return prompt, spans + laid_out(layout, len(prompt), spans[-1][1] if spans else 0)


@given(
    layout=LAYOUTS,
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    budget=st.integers(2, 5),
    page_size=st.integers(1, 4),
    spare=st.integers(0, 6),
)
def test_pages_run_short_while_a_prompt_is_computed(
    layout: list[Span], lengths: list[int], budget: int, page_size: int, spare: int
) -> None:
    """Young sequences grow beside an old one that takes many steps for its prompt."""
    engine = Engine(36 // page_size + spare, page_size, max_batched_tokens=budget)
    old = make_sequence(0, list(range(36)), spans=laid_out(layout, 36))
    young = [make_sequence(1 + i, [50 + i] * n, max_tokens=30) for i, n in enumerate(lengths)]
    for seq in (old, *young):
        engine.scheduler.add(seq)
    engine.drain(300)
    assert old.num_preemptions == 0
    assert [seq.num_output_tokens for seq in young] == [30] * len(young)


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "length"),
    [
        ({"max_tokens": 2}, [1, 1], FinishReason.LENGTH, 2),
        ({"max_tokens": 9}, [1, EOS], FinishReason.STOP, 2),
        ({"max_tokens": 3, "ignore_eos": True}, [EOS, EOS, EOS], FinishReason.LENGTH, 3),
        ({"max_tokens": 9, "stop_token_ids": (7,)}, [1, 7], FinishReason.STOP, 2),
        ({"max_tokens": 99}, [1] * 7, FinishReason.LENGTH, 7),  # max_model_len
        ({"max_tokens": 9}, [1, None], FinishReason.ERROR, 1),
        ({"max_tokens": 9}, [1, FinishReason.GRAMMAR], FinishReason.GRAMMAR, 1),
    ],
)
def test_finish_reasons(
    params: dict[str, Any],
    tokens: list[int | FinishReason | None],
    reason: FinishReason,
    length: int,
) -> None:
    engine = Engine(max_model_len=10)
    seq = make_sequence(0, [3, 4, 5], **params)
    engine.scheduler.add(seq)
    for i, token in enumerate(tokens):
        [new] = engine.step(lambda seq, token=token: token)
        sampled = None if isinstance(token, FinishReason) else token
        assert new == (seq, sampled, i == len(tokens) - 1)
    assert (seq.finish_reason, seq.num_output_tokens) == (reason, length)
    assert not seq.pages
    engine.drain(0)


def test_broken_kv_does_not_stay_in_the_cache() -> None:
    engine = Engine()
    engine.scheduler.add(make_sequence(0, [1] * 20))
    engine.step()
    assert engine.cache.num_pages == 4
    engine.step(lambda seq: None)
    assert engine.cache.num_pages == 0


def test_whose_grammar_ends_leaves_its_kv_to_others() -> None:
    """What the last step computed, too."""
    engine = Engine()
    prompt = [1] * 20
    engine.scheduler.add(make_sequence(0, prompt))
    new = None
    while new is None:
        new = next(iter(engine.step(lambda seq: FinishReason.GRAMMAR)), None)
    assert (new.token_id, new.finished) == (None, True)
    assert engine.cache.num_pages == 5
    other = make_sequence(1, [*prompt, 2])
    engine.scheduler.add(other)
    engine.step()
    assert other.num_cached_tokens == 20


def test_abort_frees_waiting_running_and_computing_sequences_at_once() -> None:
    engine = Engine(max_running=2)
    sequences = [make_sequence(i, [3 + i] * 5, max_tokens=4) for i in range(3)]
    for seq in sequences:
        engine.scheduler.add(seq)
    engine.step()
    output = engine.scheduler.schedule()
    engine.compute(output.scheduled)
    assert engine.scheduler.abort([2, 0, 99, 0]) == [sequences[2], sequences[0]]
    engine.scheduler.check()
    new = engine.scheduler.commit(output, [1] * len(output.scheduled))
    assert [token.seq.id for token in new] == [1]
    assert sequences[0].finish_reason is FinishReason.ABORT
    assert sequences[0].num_output_tokens == 1
    engine.drain(5)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 1, "no tokens"),
        (50, 1, "50 tokens; this model takes at most 49"),
        (9, 33, "KV memory for 41 tokens; there is room for 40"),
    ],
)
def test_what_can_never_run_is_refused(prompt: int, max_tokens: int, message: str) -> None:
    engine = Engine(num_pages=10, max_model_len=50)
    with pytest.raises(RequestError, match=message):
        engine.scheduler.add(make_sequence(0, [1] * prompt, max_tokens))
    assert not engine.scheduler.has_work
    engine.scheduler.add(make_sequence(0, [1] * 9, 32))
    with pytest.raises(RequestError, match="already running"):
        engine.scheduler.add(make_sequence(0, [1] * 9, 32))
    engine.drain(33)


def test_a_step_of_64_decoding_sequences_is_cheap(count_calls: Callable[..., int]) -> None:
    """0.4 ms where it was written."""
    engine = Engine(5000, 32, max_batched_tokens=4096, max_running=64, max_model_len=4096)
    for i in range(64):
        engine.scheduler.add(make_sequence(i, [i] * 1000, max_tokens=500))
    while engine.scheduler.num_waiting or len(engine.scheduler.schedule().scheduled) < 64:
        output = engine.scheduler.schedule()
        engine.scheduler.commit(output, [1] * sum(e.samples for e in output.scheduled))

    def step() -> None:
        engine.scheduler.commit(engine.scheduler.schedule(), [1] * 64)

    assert sorted(count_calls(step) for _ in range(100))[50] < 60 * 64


PRIORITIES = st.sampled_from([0, 0, 0, -1, 2**31 - 1])


class Use(RuleBasedStateMachine):
    """Random requests with shared prefixes and segments, tiny pools, aborts at any moment."""

    @initialize(
        page_size=st.integers(1, 4),
        num_pages=st.integers(3, 14),
        budget=st.integers(1, 12),
        max_running=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, True, False]),
        long_steps=st.integers(1, 3),
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        budget: int,
        max_running: int,
        prefix_caching: bool,
        long_steps: int,
    ) -> None:
        self.engine = Engine(
            num_pages,
            page_size,
            long_steps,
            max_batched_tokens=budget,
            max_running=max_running,
            max_model_len=24,
            prefix_caching=prefix_caching,
        )
        self.sequences: list[Sequence] = []

    @rule(
        data=st.data(),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        layout=LAYOUTS,
        copies=st.integers(1, 3),
        max_tokens=st.integers(1, 12),
        namespace=st.sampled_from([b"a", b"a", b"b"]),
        priority=PRIORITIES,
    )
    def add(
        self,
        data: st.DataObject,
        prompt: list[int],
        layout: list[Span],
        copies: int,
        max_tokens: int,
        namespace: bytes,
        priority: int,
    ) -> None:
        prompt, spans = continued(data, self.sequences, prompt, layout)
        for _ in range(copies):
            seq = make_sequence(len(self.sequences), prompt, max_tokens, namespace, spans, priority)
            longest = min(len(prompt) + max_tokens, 24) - 1
            if self.engine.pool.pages_for(longest) > self.engine.pool.num_pages:
                with pytest.raises(RequestError):
                    self.engine.scheduler.add(seq)
                return
            self.engine.scheduler.add(seq)
            self.sequences.append(seq)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        tokens = st.sampled_from([0, 0, 0, 1, 1, 1, EOS])
        runs = st.lists(tokens, max_size=14)
        self.engine.step(lambda seq: data.draw(tokens), lambda seq: data.draw(runs))

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(n=st.integers(1, 8))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step(lambda seq: seq.num_tokens % 2)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(
        data=st.data(),
        while_computing=st.booleans(),
        others=st.sampled_from([1, FinishReason.GRAMMAR, None]),
    )
    def abort(
        self, data: st.DataObject, while_computing: bool, others: int | FinishReason | None
    ) -> None:
        scheduler = self.engine.scheduler
        alive = [seq.id for seq in self.sequences if seq.status is not Status.FINISHED]
        ids = data.draw(st.lists(st.sampled_from(alive), min_size=1, max_size=2))
        if not while_computing:
            scheduler.abort(ids)
        else:
            output = self.engine.schedule()
            self.engine.compute(output.scheduled)
            scheduler.abort(ids)
            scheduler.check()
            num_samples = sum(entry.samples for entry in output.scheduled)
            scheduler.commit(output, [others] * num_samples)
        scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # At least the first in order advances by a token in each step; others' work may be lost.
        steps = sum(seq.num_prompt_tokens + 12 for seq in self.sequences)
        self.engine.drain(steps * self.engine.long_steps)
        for seq in self.sequences:
            assert seq.status is Status.FINISHED
            assert not seq.pages
            assert seq.num_cached_tokens < seq.num_prompt_tokens
            wanted = min(seq.params.max_tokens, 24 - seq.num_prompt_tokens)
            if seq.finish_reason is FinishReason.LENGTH:
                assert seq.num_output_tokens == wanted
            elif seq.finish_reason is FinishReason.STOP:
                assert seq.token_ids[-1] == EOS
                assert seq.num_output_tokens <= wanted
            else:
                others = (FinishReason.ABORT, FinishReason.ERROR, FinishReason.GRAMMAR)
                assert seq.finish_reason in others


TestUse = Use.TestCase
TestUse.settings = settings(
    max_examples=2 * settings.default.max_examples, stateful_step_count=40, deadline=None
)


# ------------------------------------------------------------------------------- steps that overlap

Draw = Callable[[Sequence, int], int | None]
"""Output token i of a sequence; None: its logits were not numbers."""


class OverlappingEngine(Engine):
    """Each step is scheduled and computed before the one before it is committed.

    ``on_device``: the tokens that the scheduler does not know yet, by sequence.
    """

    def __init__(self, draw: Draw = lambda seq, i: 1, **options: Any) -> None:
        super().__init__(**options)
        self.draw = draw
        self.force: Force = lambda seq: []
        self.in_flight: SchedulerOutput | None = None
        self.on_device: dict[Sequence, int | None] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.in_flight is not None

    def limit(self, seq: Sequence) -> int:
        """Tokens of a sequence that nothing else ends."""
        return min(seq.num_prompt_tokens + seq.params.max_tokens, self.scheduler._max_model_len)

    def launch(self) -> SchedulerOutput:
        """Schedule the next step, with what must hold for every one."""
        before = self.in_flight or NOTHING
        in_flight = {entry.seq for entry in before.scheduled if entry.samples}
        running = [seq for seq in self.scheduler._running if not self.is_long(seq)]
        output = self.scheduler.schedule(before)
        if output.long_chunk is not None:
            self.long, self.long_steps_left = output.long_chunk, self.long_steps
            self.check_long(output.long_chunk)
        assert output.scheduled or self.long or self.in_flight or not self.scheduler.has_work
        entries = {entry.seq: entry for entry in output.scheduled}
        for seq in running:
            waits = seq in in_flight and (
                seq.params.penalised or seq.num_tokens + 1 == self.limit(seq)
            )
            assert not waits or seq not in entries, "the token must be known first"
            decodes = seq in in_flight or seq.num_pending_tokens == 1
            if decodes and not waits and seq.status is Status.RUNNING:
                assert entries[seq].num_tokens == 1, "must decode"
        return output

    def is_long(self, seq: Sequence) -> bool:
        return self.long is not None and self.long.seq is seq

    def compute(self, entries: list[ScheduledSequence]) -> None:
        """Write the chunks' slots, then read all up to their ends."""
        size = self.pool.page_size
        before = {
            entry.seq: entry for entry in (self.in_flight or NOTHING).scheduled if entry.samples
        }
        contents = {}
        for seq, start, num_tokens, samples in entries:
            end = start + num_tokens
            pending = self.on_device[seq] if seq in before else None
            # Logits that were not numbers choose some token, too.
            contents[seq] = kv_contents(seq, [pending or 0] if seq in before else [])
            assert seq.status is Status.RUNNING
            assert num_tokens > 0
            assert samples is (end == len(contents[seq]))
            assert end < self.limit(seq), "nobody wants what comes then"
            assert len(seq.pages) == -(-end // size)
            assert max(seq.segments.visible(start, end)) == end, "a segment is cut"
            for i in range(start, end):
                assert self.pool._references[seq.pages[i // size]] == 1, "others use that page"
                self.slots[seq.pages[i // size], i % size] = contents[seq][i]
        for seq, start, num_tokens, _ in entries:
            for i in range(start + num_tokens):
                assert self.slots[seq.pages[i // size], i % size] == contents[seq][i]
            self.num_computed += num_tokens

    def tokens(self, output: SchedulerOutput) -> list[int | None]:
        return [
            self.draw(entry.seq, entry.end - entry.seq.num_prompt_tokens)
            for entry in output.scheduled
            if entry.samples
        ]

    def step(self, sample: Sample = lambda seq: 1) -> list[NewToken]:
        """Launch a step, then commit the one before, and a long chunk when its last one came."""
        output = self.launch()
        self.compute(output.scheduled)
        new = self.commit_in_flight()
        if output.scheduled:
            self.in_flight = output
            sampling = [entry.seq for entry in output.scheduled if entry.samples]
            self.on_device = dict(zip(sampling, self.tokens(output), strict=True))
        if self.long is None or self.long.seq.status is not Status.RUNNING:
            self.long = None
            return new
        self.long_steps_left -= 1
        if not self.long_steps_left:
            entry, self.long = self.long, None
            self.compute([entry])
            alone = SchedulerOutput([entry], 0)
            new += self.scheduler.commit(alone, self.tokens(alone))
            self.scheduler.check()
        return new

    def commit_in_flight(self) -> list[NewToken]:
        if self.in_flight is None:
            return []
        new = self.scheduler.commit(self.in_flight, list(self.on_device.values()))
        self.in_flight, self.on_device = None, {}
        self.extend(new, self.force)
        self.scheduler.check()
        return new

    def finish(self, limit: int) -> None:
        for _ in range(limit):
            if not self.has_work:
                break
            self.step()
        assert not self.has_work, f"not done within {limit} steps"


def test_a_token_in_flight_counts_as_there() -> None:
    engine = OverlappingEngine()
    engine.scheduler.add(make_sequence(0, [3] * 5, max_tokens=9))
    assert engine.step() == []
    assert scheduled(engine.launch()) == [(0, 5, 1)]
    [new] = engine.step()
    assert (new.token_id, new.finished) == (1, False)


def test_chunks_of_a_prompt_follow_each_other_without_a_commit() -> None:
    engine = OverlappingEngine(max_batched_tokens=8)
    engine.scheduler.add(make_sequence(0, list(range(30)), max_tokens=2))
    steps = []
    while engine.has_work:
        steps.append(scheduled(engine.launch()))
        engine.step()
    chunks = [(0, 0, 8), (0, 8, 8), (0, 16, 8), (0, 24, 6), (0, 30, 1)]
    assert steps == [*([chunk] for chunk in chunks), []]


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 5), (2, 6), (3, 7), (40, 9)])
def test_nothing_is_computed_past_an_end_by_length(max_tokens: int, rows: int) -> None:
    engine = OverlappingEngine(max_model_len=10)
    seq = make_sequence(0, [3] * 5, max_tokens=max_tokens)
    engine.scheduler.add(seq)
    engine.drain(20)
    assert (engine.num_computed, seq.num_tokens) == (rows, rows + 1)


def test_the_row_behind_an_end_of_sequence_is_dropped() -> None:
    engine = OverlappingEngine(draw=lambda seq, i: EOS if i == 2 else 1)
    seq = make_sequence(0, [3, 4, 5], max_tokens=9)
    engine.scheduler.add(seq)
    new = [token for _ in range(4) for token in engine.step()]
    assert [token.token_id for token in new] == [1, 1, EOS]
    assert engine.num_computed == 3 + 2 + 1  # the last one for nothing
    # Five positions are computed in earnest: a page of 4.
    assert (engine.cache.num_pages, engine.pool.num_used) == (1, 1)
    assert engine.step() == []
    assert not engine.has_work
    assert (engine.cache.num_pages, engine.pool.num_used) == (1, 1)
    assert list(seq.token_ids) == [3, 4, 5, 1, 1, EOS]


def test_who_is_penalised_waits_for_its_token_and_others_go_on() -> None:
    engine = OverlappingEngine()
    engine.scheduler.add(make_sequence(0, [3] * 2, max_tokens=4, presence_penalty=1.0))
    engine.scheduler.add(make_sequence(1, [4] * 2, max_tokens=4))
    steps = []
    for _ in range(4):
        steps.append([id_ for id_, _, _ in scheduled(engine.launch())])
        engine.step()
    assert steps == [[0, 1], [1], [0, 1], [1]]
    engine.drain(9)


def test_tokens_nobody_chose_are_computed_at_once_and_others_decode() -> None:
    engine = Engine()
    engine.scheduler.add(make_sequence(0, [3] * 5, max_tokens=20))
    engine.scheduler.add(make_sequence(1, [4] * 3, max_tokens=20))
    engine.step(force=lambda seq: [7, 8, 9] if seq.id == 0 else [])
    output = engine.schedule()
    assert scheduled(output) == [(0, 5, 4), (1, 3, 1)]
    assert [entry.samples for entry in output.scheduled] == [True, True]
    engine.complete(output)
    assert scheduled(engine.schedule()) == [(0, 9, 1), (1, 4, 1)]


def test_a_run_leaves_everybody_a_token() -> None:
    """What is left of it goes on with the next step, and samples with its last token."""
    engine = Engine(max_batched_tokens=8, max_running=8)
    for i in range(4):
        engine.scheduler.add(make_sequence(i, [3 + i], max_tokens=40))
    engine.step(force=lambda seq: [7] * 5 if seq.id in (1, 2) else [])
    output = engine.schedule()
    assert scheduled(output) == [(0, 1, 1), (1, 1, 5), (2, 1, 1), (3, 1, 1)]
    assert [entry.samples for entry in output.scheduled] == [True, False, False, True]
    engine.complete(output)
    assert scheduled(engine.schedule()) == [(0, 2, 1), (1, 6, 1), (2, 2, 5), (3, 2, 1)]


def test_a_run_goes_on_beside_prompts() -> None:
    """However long the prompts that came first are."""
    engine = Engine(num_pages=200, max_batched_tokens=8)
    engine.scheduler.add(make_sequence(0, list(range(400)), max_tokens=2))
    engine.scheduler.add(make_sequence(1, [3], max_tokens=40))
    while not engine.scheduler.has_work or engine.scheduler.num_waiting:
        engine.step(force=lambda seq: [7] * 4)
    later = [entry for entry in engine.schedule().scheduled if entry.seq.id == 1]
    assert [entry.num_tokens for entry in later] == [5]


def test_a_long_run_is_a_chunk() -> None:
    engine = Engine(num_pages=200, max_batched_tokens=24)
    engine.scheduler.add(make_sequence(0, [3], max_tokens=200))
    engine.scheduler.add(make_sequence(1, [4], max_tokens=200))
    engine.step(force=lambda seq: [7] * 60 if seq.id == 0 else [])
    assert scheduled(engine.schedule()) == [(1, 1, 1), (0, 1, 23)]


def test_who_is_preempted_keeps_the_token_in_flight() -> None:
    engine = OverlappingEngine(num_pages=9, page_size=2, draw=lambda seq, i: i % 2)
    old = make_sequence(0, [3, 4], max_tokens=12)
    young = make_sequence(1, [5, 6, 7], max_tokens=9)
    for seq in (old, young):
        engine.scheduler.add(seq)
    while not engine.scheduler.preemptions:
        known = young.num_output_tokens
        engine.step()
    assert young.status is Status.WAITING
    assert young.num_output_tokens == known + 1
    engine.drain(60)
    assert list(young.token_ids[3:]) == [i % 2 for i in range(9)]


@pytest.mark.parametrize("last", [EOS, None])
def test_who_is_preempted_may_end_by_the_token_in_flight(last: int | None) -> None:
    def until_preempted(draw: Draw) -> tuple[OverlappingEngine, Sequence]:
        engine = OverlappingEngine(draw, num_pages=9, page_size=2)
        young = make_sequence(1, [5, 6, 7], max_tokens=9)
        for seq in (make_sequence(0, [3, 4], max_tokens=12), young):
            engine.scheduler.add(seq)
        while not engine.scheduler.preemptions:
            engine.step()
        return engine, young

    _, young = until_preempted(lambda seq, i: 1)
    assert young.status is Status.WAITING
    index = young.num_output_tokens - 1  # of the token that was in flight then
    engine, young = until_preempted(lambda seq, i: last if (seq.id, i) == (1, index) else 1)
    expected = FinishReason.STOP if last == EOS else FinishReason.ERROR
    assert (young.status, young.finish_reason) == (Status.FINISHED, expected)
    if last is None:
        root = engine.cache.root(young.namespace)
        assert not engine.cache.match(root, young.token_ids, 3).pages
    engine.drain(20)


def test_broken_kv_does_not_stay_in_the_cache_while_its_next_row_is_in_flight() -> None:
    engine = OverlappingEngine(draw=lambda seq, i: None if seq.id == 0 and i == 1 else 1)
    first, second = make_sequence(0, [1] * 20, max_tokens=5), make_sequence(1, [2] * 20, 5)
    for seq in (first, second):
        engine.scheduler.add(seq)
    engine.drain(20)
    assert (first.finish_reason, first.num_output_tokens) == (FinishReason.ERROR, 1)
    assert (second.finish_reason, second.num_output_tokens) == (FinishReason.LENGTH, 5)


def test_a_long_segment_begins_when_nothing_of_its_prompt_is_in_flight() -> None:
    """Its pages may not change under it, as they do when a commit finds equal ones."""
    engine = OverlappingEngine(max_batched_tokens=8, long_steps=2)
    engine.scheduler.add(make_sequence(0, list(range(40)), max_tokens=2, spans=[(8, 36)]))
    steps = []
    while engine.has_work:
        steps.append(scheduled(engine.launch()))
        engine.step()
        if engine.long is not None:
            assert engine.in_flight is None
    assert [chunk for step in steps for chunk in step][:3] == [(0, 0, 8), (0, 8, 28), (0, 36, 4)]


class OverlappingUse(RuleBasedStateMachine):
    """Random requests with shared prefixes and segments, tiny pools, aborts at any moment, all
    of which come while a step is in flight. Each gets the tokens it would get alone."""

    @initialize(
        page_size=st.integers(1, 4),
        num_pages=st.integers(3, 14),
        budget=st.integers(1, 12),
        max_running=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, True, False]),
        long_steps=st.integers(1, 3),
        salt=st.integers(0, 999),
    )
    def start(self, page_size: int, num_pages: int, budget: int, max_running: int,
              prefix_caching: bool, long_steps: int, salt: int) -> None:  # fmt: skip
        kinds = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, EOS, None]

        def draw(seq: Sequence, i: int) -> int | None:
            return kinds[hash((salt, seq.id // 2, i)) % len(kinds)]

        self.engine = OverlappingEngine(
            draw,
            num_pages=num_pages,
            page_size=page_size,
            long_steps=long_steps,
            max_batched_tokens=budget,
            max_running=max_running,
            max_model_len=24,
            prefix_caching=prefix_caching,
        )

        def force(seq: Sequence) -> list[int]:
            """Those it would draw: of whom has to wait for tokens, and is in no step in flight."""
            if not seq.params.penalised:
                return []
            drawn = [draw(seq, seq.num_output_tokens + i) for i in range(seq.num_tokens % 6)]
            return [token for token in drawn[: [*drawn, None].index(None)] if token is not None]

        self.engine.force = force
        self.sequences: list[Sequence] = []

    @rule(
        data=st.data(),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        layout=LAYOUTS,
        copies=st.integers(1, 3),
        max_tokens=st.integers(1, 12),
        penalty=st.sampled_from([0.0, 0.0, 1.0]),
        priority=PRIORITIES,
    )
    def add(self, data: st.DataObject, prompt: list[int], layout: list[Span], copies: int,
            max_tokens: int, penalty: float, priority: int) -> None:  # fmt: skip
        prompt, spans = continued(data, self.sequences, prompt, layout)
        longest = min(len(prompt) + max_tokens, 24) - 1
        if self.engine.pool.pages_for(longest) > self.engine.pool.num_pages:
            return
        for _ in range(copies):
            id_ = len(self.sequences)
            seq = make_sequence(
                id_, prompt, max_tokens, b"", spans, priority, presence_penalty=penalty
            )
            self.engine.scheduler.add(seq)
            self.sequences.append(seq)

    @precondition(lambda self: self.engine.has_work)
    @rule(n=st.integers(1, 6))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [seq.id for seq in self.sequences if seq.status is not Status.FINISHED]
        ids = data.draw(st.lists(st.sampled_from(alive), min_size=1, max_size=2))
        self.engine.scheduler.abort(ids)
        self.engine.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = sum(seq.num_prompt_tokens + 12 for seq in self.sequences)
        self.engine.drain(2 * steps * self.engine.long_steps + 1)
        for seq in self.sequences:
            output, expected = list(seq.token_ids[seq.num_prompt_tokens :]), list[int]()
            wanted = min(seq.params.max_tokens, 24 - seq.num_prompt_tokens)
            reason = FinishReason.LENGTH
            for i in range(wanted):
                token = self.engine.draw(seq, i)
                if token is None:
                    reason = FinishReason.ERROR
                    break
                expected.append(token)
                if token == EOS:
                    reason = FinishReason.STOP
                    break
            assert not seq.pages
            if seq.finish_reason is FinishReason.ABORT:
                assert output == expected[: len(output)]
            else:
                assert (seq.finish_reason, output) == (reason, expected)


TestOverlappingUse = OverlappingUse.TestCase
TestOverlappingUse.settings = settings(
    max_examples=2 * settings.default.max_examples, stateful_step_count=30, deadline=None
)

# --------------------------------------------------------------------------- steps that are a time


class Costs:
    """What chunks take is said; decoding takes nothing, or ``per_row`` seconds a row."""

    def __init__(self, prefill: PrefillCosts, per_row: float = 0.0) -> None:
        self.prefill = prefill
        self._per_row = per_row

    def decode_seconds(self, rows: int, keys: int) -> float:
        return self._per_row * rows


SECOND = PrefillCosts(0.0, 1.0, 0.0)
"""A second a token."""


class PacedEngine(Engine):
    """A step has ``seconds``. What goes on beside the steps is computed in its own time."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        *,
        seconds: float = 8.0,
        prefill: PrefillCosts = SECOND,
        per_row: float = 0.0,
        undisturbed: float = 1.0,
        **options: Any,
    ) -> None:
        self.seconds, self.costs = seconds, Costs(prefill, per_row)
        self.beside: dict[Sequence, tuple[ScheduledSequence, float]] = {}  # and its seconds left
        self.passed = 0.0  # with them, since the last step
        pace = Pace(seconds, self.costs, 8, undisturbed)
        self.undisturbed = undisturbed
        super().__init__(num_pages, page_size, pace=pace, **options)

    def schedule(self) -> SchedulerOutput:
        running = list(self.scheduler._running)
        passed, self.passed = self.passed, 0.0
        self.beside = {s: work for s, work in self.beside.items() if s.status is Status.RUNNING}
        decoding = [seq for seq in running if decodes(seq) and seq not in self.beside]
        output = self.scheduler.schedule(beside=passed)
        if output.long_chunk is not None:
            seq, start, num_tokens, _ = output.long_chunk
            assert seq not in self.beside
            self.beside[seq] = output.long_chunk, self.costs.prefill.seconds(start, num_tokens)
            assert len(self.beside) <= MOST_LONG
        assert output.scheduled or output.beside or not self.scheduler.has_work
        chunks = {entry.seq: entry for entry in output.scheduled}
        assert not self.beside.keys() & chunks.keys()
        for seq in decoding:
            assert seq.status is Status.WAITING or seq in chunks, "must decode"
        inside = sum(
            self.costs.prefill.seconds(entry.start, entry.num_tokens)
            for entry in output.scheduled
            if entry.num_tokens > 1 and entry.seq not in decoding
        )
        taken = inside + sum(seconds for _, seconds in output.beside)
        spent = self.costs.decode_seconds(len(set(decoding) & chunks.keys()), 0)
        most = max(self.seconds - spent, min(3 * spent, self.seconds), spent) * (1 + 1e-9)
        if not set(decoding) & chunks.keys():
            most *= self.undisturbed
        if output.preempted:  # which is decided with others in the step
            return output
        assert taken <= most, "takes too long"
        if set(decoding) & chunks.keys() and inside:
            assert inside + passed <= most, "who decodes waits too long"
        return output

    def complete(
        self,
        output: SchedulerOutput,
        sample: Sample = lambda seq: 1,
        force: Force = lambda seq: [],
    ) -> list[NewToken]:
        new = self.complete_step(output, sample, force)
        self.beside = {s: work for s, work in self.beside.items() if s.status is Status.RUNNING}
        for seq, seconds in output.beside:
            if seq not in self.beside:
                continue
            entry, left = self.beside[seq]
            self.passed += min(left, seconds)
            self.beside[seq] = entry, left - seconds
            if left <= seconds:
                del self.beside[seq]
                new += self.complete_step(SchedulerOutput([entry], 0), sample)
        return new


def first_tokens(engine: PacedEngine, steps: int = 200) -> list[int]:
    """Who has a first token, in order."""
    order: dict[int, None] = {}
    for _ in range(steps):
        if not engine.scheduler.has_work:
            break
        order |= dict.fromkeys(token.seq.id for token in engine.step())
    return list(order)


def words(first: int, num: int) -> list[int]:
    return list(range(first, first + num))


def test_chunks_are_cut_to_what_a_step_has_time_for() -> None:
    engine = PacedEngine(prefill=PrefillCosts(1.0, 0.5, 0.0))
    engine.scheduler.add(make_sequence(0, words(0, 40)))
    # 1 + 12 / 2 seconds; two more would make it 8, and end within a page.
    assert scheduled(engine.schedule()) == [(0, 0, 12)]


def test_chunks_become_shorter_as_contexts_become_longer() -> None:
    engine = PacedEngine(prefill=PrefillCosts(0.0, 0.1, 0.02), max_batched_tokens=64)
    engine.scheduler.add(make_sequence(0, words(0, 60)))
    sizes = []
    while engine.scheduler.has_work:
        output = engine.schedule()
        sizes += [num_tokens for _, _, num_tokens in scheduled(output)]
        engine.complete(output)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]


@pytest.mark.parametrize(
    ("per_row", "tokens"), [(0.5, 4), (1.0, 4), (2.5, 4), (8 / 3, 8), (12, 12)]
)
def test_those_that_decode_leave_prompts_a_part_of_the_step(per_row: float, tokens: int) -> None:
    """In whole pages of 4 tokens, a second each."""
    engine = PacedEngine(per_row=per_row)
    engine.scheduler.add(make_sequence(0, [1], max_tokens=9))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(0, 40)))
    assert scheduled(engine.schedule())[1:] == [(1, 0, tokens)]


def test_chunks_are_longer_where_nobody_decodes() -> None:
    engine = PacedEngine(undisturbed=2.0, max_batched_tokens=32)
    engine.scheduler.add(make_sequence(0, words(0, 40), max_tokens=9))
    assert scheduled(engine.schedule()) == [(0, 0, 16)]
    engine = PacedEngine(undisturbed=2.0, max_batched_tokens=32)
    engine.scheduler.add(make_sequence(0, [1], max_tokens=9))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(0, 40), max_tokens=9))
    assert scheduled(engine.schedule()) == [(0, 1, 1), (1, 0, 8)]


def test_several_prompts_share_a_step() -> None:
    engine = PacedEngine()
    for i in range(3):
        engine.scheduler.add(make_sequence(i, words(100 * i, 4)))
    assert scheduled(engine.schedule()) == [(0, 0, 4), (1, 0, 4)]


def test_what_takes_longer_than_a_step_is_computed_beside_the_steps() -> None:
    engine = PacedEngine(seconds=8.0, prefill=PrefillCosts(0.0, 3.0, 0.0))
    engine.scheduler.add(make_sequence(0, words(0, 24)))
    output = engine.schedule()
    assert output.long_chunk is not None
    # A page takes 12 seconds; of 8 layers, half a step each, there is time for 8 tokens.
    assert (output.scheduled, output.beside) == ([], [(output.long_chunk.seq, 8.0)])
    assert scheduled(output) == [(0, 0, 8)]


def test_a_segment_is_whole_however_long_it_takes() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 40), spans=[(4, 34)]))
    assert scheduled(engine.schedule()) == [(0, 0, 4)]
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 40), spans=[(0, 34)]))
    assert scheduled(engine.schedule()) == [(0, 0, 34)]


def test_a_short_prompt_goes_on_before_a_long_segment() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 100), spans=[(0, 96)]))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(100, 6), max_tokens=4))
    assert scheduled(engine.schedule()) == [(1, 0, 6)]


def test_who_decodes_does_not_wait_for_what_is_beside_a_step_and_for_the_next_one() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, [1], max_tokens=90))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(0, 100), spans=[(0, 96)]))
    for _ in range(3):
        engine.step()  # 8 seconds of the segment follow it
    engine.scheduler.add(make_sequence(2, words(100, 6), max_tokens=4))
    output = engine.schedule()
    assert scheduled(output) == [(0, 4, 1)]
    engine.complete(output)
    assert scheduled(engine.schedule()) == [(0, 5, 1), (2, 0, 6)]


def test_several_long_segments_are_computed_at_a_time_the_shortest_first() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 100), spans=[(0, 96)]))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(100, 30), spans=[(0, 28)]))
    assert first_tokens(engine) == [1, 0]


def test_equal_prompts_are_computed_once() -> None:
    engine = PacedEngine()
    for i in range(2):
        engine.scheduler.add(make_sequence(i, words(0, 24)))
    engine.drain(40)
    assert engine.num_computed == 24 + 4  # and the last page of the other


def test_equal_segments_are_computed_once() -> None:
    engine = PacedEngine()
    for i in range(2):
        engine.scheduler.add(make_sequence(i, words(0, 24), spans=[(0, 20)]))
    engine.drain(40)
    assert engine.num_computed == 24 + 4


def test_the_soonest_done_is_next() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 60)))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(100, 16)))
    assert first_tokens(engine) == [1, 0]


def test_what_is_cached_is_not_left() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 60)))
    engine.finish(20)
    engine.scheduler.add(make_sequence(1, words(100, 16)))
    engine.scheduler.add(make_sequence(2, [*words(0, 60), 7, 8]))  # all but 6 tokens are cached
    assert first_tokens(engine) == [2, 1]


def test_none_starves_however_many_shorter_ones_come() -> None:
    engine = PacedEngine(num_pages=200)
    engine.scheduler.add(make_sequence(0, words(0, 200)))
    for i in range(1, 400):
        engine.scheduler.add(make_sequence(i, words(1000 * i, 8)))
        if 0 in {token.seq.id for token in engine.step()}:
            break
    # A quarter of the steps is the oldest one's: 200 tokens, 8 of them each.
    assert abs(i - 4 * 200 // 8) <= 8


def test_a_tenant_of_many_prompts_does_not_hold_up_one_of_few() -> None:
    engine = PacedEngine()
    for i in range(6):
        engine.scheduler.add(make_sequence(i, words(100 * i, 8), namespace=b"many"))
    engine.scheduler.add(make_sequence(6, words(900, 8), namespace=b"one"))
    assert first_tokens(engine).index(6) <= 2


def test_priorities_come_before_what_is_left() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 30), priority=-1))
    engine.scheduler.add(make_sequence(1, words(100, 12)))
    assert first_tokens(engine) == [0, 1]


def test_a_large_prompt_that_finds_no_pages_is_not_passed_over_for_ever() -> None:
    engine = PacedEngine(num_pages=12, max_running=2)
    engine.scheduler.add(make_sequence(0, words(0, 8), max_tokens=36))
    engine.step()
    engine.scheduler.add(make_sequence(1, words(100, 40)))
    for i in range(2, 60):
        engine.scheduler.add(make_sequence(i, words(1000 * i, 4)))
        engine.step()
        if i == 20:
            engine.scheduler.abort([0])
    assert 1 not in engine.scheduler._by_id


def test_the_backlog_is_what_is_left_of_all_prompts() -> None:
    engine = PacedEngine()
    engine.scheduler.add(make_sequence(0, words(0, 20), max_tokens=3))
    engine.scheduler.add(make_sequence(1, words(100, 12)))
    engine.step()
    assert sorted(engine.scheduler.backlog()) == [4.0, 20.0]
    engine.finish(20)
    assert engine.scheduler.backlog() == []


class PacedUse(Use):
    """The same random use, of steps that are a time."""

    @initialize(
        page_size=st.integers(1, 4),
        num_pages=st.integers(3, 14),
        budget=st.integers(1, 12),
        max_running=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, True, False]),
        seconds=st.sampled_from([1.0, 3.0, 8.0]),
        prefill=st.sampled_from([SECOND, PrefillCosts(1.0, 0.5, 0.1), PrefillCosts(0.0, 0.0, 0.0)]),
        per_row=st.sampled_from([0.0, 1.0]),
        undisturbed=st.sampled_from([1.0, 3.0]),
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        budget: int,
        max_running: int,
        prefix_caching: bool,
        seconds: float,
        prefill: PrefillCosts,
        per_row: float,
        undisturbed: float,
    ) -> None:
        self.engine = PacedEngine(
            num_pages,
            page_size,
            seconds=seconds,
            prefill=prefill,
            per_row=per_row,
            undisturbed=undisturbed,
            max_batched_tokens=budget,
            max_running=max_running,
            max_model_len=24,
            prefix_caching=prefix_caching,
        )
        self.sequences: list[Sequence] = []


TestPacedUse = PacedUse.TestCase
TestPacedUse.settings = settings(
    max_examples=2 * settings.default.max_examples, stateful_step_count=40, deadline=None
)
