"""Relay against brute force: token prefixes compared one by one, costs added up page by page."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.engine.batch import SharedRange, build_batch
from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.kv.pool import PagePool
from headstart.engine.kv.tree import RadixCache
from headstart.engine.ranges.shared import Relay, RelayPlan, shared_runs
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.ranges import KVRanges

PAGE = 4
PARAMS = SamplingParams(max_tokens=1)
FREE = AttentionCosts([1, 1000], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1], [1.0], 1)
"""A key costs the same however many rows read it at once: sharing is for nothing."""
DEAR = AttentionCosts([1, 1000], [9.0, 9.0], [1.0, 1000.0], [1.0, 1000.0], [1], [1.0], 1)
"""A key costs every row the same, and a range something: sharing only adds a range."""

Group = frozenset[int]


@dataclass
class Step:
    """Scheduled sequences whose nodes are in one cache."""

    scheduled: list[ScheduledSequence]

    def __len__(self) -> int:
        return len(self.scheduled)

    def depth(self, i: int) -> int:
        """Keys of sequence i that the tree holds."""
        node = self.scheduled[i].seq.node
        return 0 if node is None else node.depth

    def groups(self, size: int) -> dict[int, list[Group]]:
        """By number of a block of ``size`` keys: who has it in common, by comparing tokens."""
        found: dict[int, list[Group]] = {}
        for block in range(max(map(self.depth, range(len(self)))) // size):
            end = (block + 1) * size
            alike: dict[tuple[bytes, bytes], set[int]] = defaultdict(set)
            for i, (seq, *_) in enumerate(self.scheduled):
                if self.depth(i) >= end:
                    alike[seq.namespace, seq.token_ids[:end].tobytes()].add(i)
            found[block] = [frozenset(group) for group in alike.values() if len(group) > 1]
        return found


def scheduled(
    cache: RadixCache,
    tokens: list[int],
    namespace: bytes = b"",
    *,
    computed: int = 0,
    num_tokens: int = 1,
    first_page: int = 1000,
) -> ScheduledSequence:
    """A sequence locked where ``cache`` stops to hold ``tokens``, ``computed`` tokens further.

    Its other pages are its own.
    """
    ids = array("i", tokens)
    node = cache.match(cache.root(namespace), ids, len(ids)).node
    cache.lock(node)
    start = node.depth + computed
    end = start + num_tokens
    ids = array("i", [*ids[: node.depth], *[7] * (end - node.depth)])
    seq = Sequence(first_page, ids, len(ids), PARAMS, namespace, node=node)
    seq.pages = [page for part in node.path() for page in part.pages]
    seq.pages += range(first_page, first_page + -(-end // PAGE) - len(seq.pages))
    return ScheduledSequence(seq, start, num_tokens, True)


def put(cache: RadixCache, pool: PagePool, tokens: list[int], namespace: bytes = b"") -> None:
    if not tokens:
        return
    pages = pool.allocate(len(tokens) // PAGE)
    cache.insert(cache.root(namespace), array("i", tokens), pages)
    pool.release(pages)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Trees of prompts over two tokens, split by prompts that come later, and users of them."""
    pool = PagePool(400, PAGE)
    cache = RadixCache(pool)
    # Pages that differ at once, and pages that differ in their last token only.
    pages = st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 1)])

    def prompt_after(common: list[int]) -> list[int]:
        kept = draw(st.integers(0, len(common) // PAGE)) * PAGE
        return common[:kept] + [t for page in draw(st.lists(pages, max_size=4)) for t in page]

    stem = [t for page in draw(st.lists(pages, min_size=4, max_size=6)) for t in page]
    namespaces = st.sampled_from([b"", b"", b"tenant"])
    known = [(b"", stem)]
    for _ in range(draw(st.integers(1, 5))):
        known.append((draw(namespaces), prompt_after(draw(st.sampled_from(known))[1])))
    for namespace, prompt in known:
        put(cache, pool, prompt, namespace)
    entries = []
    for i in range(draw(st.integers(2, 8))):
        namespace, prompt = draw(st.sampled_from(known))
        length = len(prompt)
        entries.append(
            scheduled(
                cache,
                prompt[: draw(st.one_of(st.just(length), st.integers(0, length)))],
                namespace,
                computed=draw(st.integers(0, 9)),
                num_tokens=draw(st.one_of(st.just(1), st.integers(2, 11))),
                first_page=1000 * (i + 1),
            )
        )
        if draw(st.booleans()):  # who is locked already stays so where others split its node
            put(cache, pool, prompt_after(prompt), namespace)
    pool.check(cache.check(Counter(entry.seq.node for entry in entries if entry.seq.node)))
    return Step(draw(st.permutations(entries)))


@st.composite
def cost_tables(draw: st.DrawFn) -> AttentionCosts:
    """Any table that can be measured, and many that cannot."""
    rows = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))
    cold = [draw(st.floats(0.01, 10)) for _ in rows]
    hot = [draw(st.floats(0.1, 1)) * one for one in cold]
    fixed = [draw(st.one_of(st.just(0.0), st.floats(0, 60))) for _ in rows]
    footprints = sorted(draw(st.sets(st.integers(1, 200), min_size=1, max_size=3)))
    coldness = [draw(st.floats(0, 1)) for _ in footprints]
    return AttentionCosts(rows, fixed, cold, hot, footprints, coldness, draw(st.integers(1, 3)))


def relay(mode: str = "auto", step: int = PAGE, costs: AttentionCosts = FREE) -> Relay:
    return Relay(mode, PAGE, step, lambda: costs)


def plan_of(relay: Relay, some: list[ScheduledSequence]) -> RelayPlan:
    plan = relay.plan(some)
    assert plan is not None
    return plan


# ---------------------------------------------------------------- runs


@settings(max_examples=3 * settings.default.max_examples // 2, deadline=None)
@given(steps())
def test_runs_are_all_that_is_shared(step: Step) -> None:
    runs = shared_runs(step.scheduled)
    found = [
        (page, frozenset(run.members))
        for run in runs
        for page in range(run.begin // PAGE, run.end // PAGE)
    ]
    expected = [(page, group) for page, some in step.groups(PAGE).items() for group in some]
    assert sorted(found, key=str) == sorted(expected, key=str)
    for run in runs:
        assert run.begin % PAGE == run.end % PAGE == 0
        assert len(set(run.members)) == len(run.members)
        for i in run.members:
            assert run.end <= step.depth(i)
    # One run for all the keys that the same sequences share: a group has but one.
    groups = [frozenset(run.members) for run in runs]
    assert len(set(groups)) == len(groups)


@settings(max_examples=6 * settings.default.max_examples // 5, deadline=None)
@given(steps())
def test_runs_come_deepest_first_and_know_their_branches(step: Step) -> None:
    runs = shared_runs(step.scheduled)
    assert [run.end for run in runs] == sorted((run.end for run in runs), reverse=True)
    for at, run in enumerate(runs):
        below = [other for other in runs if other.begin == run.end]
        below = [other for other in below if set(other.members) < set(run.members)]
        assert sorted(map(id, run.branches)) == sorted(map(id, below))
        assert all(branch in runs[:at] for branch in run.branches)


def test_equal_tokens_of_two_namespaces_are_not_shared() -> None:
    pool = PagePool(40, PAGE)
    cache = RadixCache(pool)
    prompt = [1] * 16
    for namespace in (b"a", b"b"):
        put(cache, pool, prompt, namespace)
    some = [scheduled(cache, prompt, namespace) for namespace in (b"a", b"b", b"a", b"b")]
    assert shared_runs(some[:2]) == []
    assert relay("on").plan(some[:2]) is None
    ranges = plan_of(relay("on"), some).ranges
    assert sorted(ranges) == [SharedRange(0, 16, [0, 2]), SharedRange(0, 16, [1, 3])]


# ---------------------------------------------------------------- plans


@settings(max_examples=6 * settings.default.max_examples // 5, deadline=None)
@given(steps(), cost_tables(), st.sampled_from(["on", "auto"]), st.sampled_from([4, 8, 12]))
def test_ranges_can_be_read(step: Step, costs: AttentionCosts, mode: str, size: int) -> None:
    plan = relay(mode, size, costs).plan(step.scheduled)
    shareable = step.groups(size)
    assert (plan is None) is not any(shareable.values())
    if plan is None:
        return
    come_to = [0] * len(step)
    for first, end, members in plan.ranges:
        assert first % size == end % size == 0
        assert first < end
        assert len(set(members)) == len(members) > 1
        assert any(set(members) == group for group in shareable[end // size - 1])
        for i in members:
            assert end <= step.depth(i)
            assert end <= step.scheduled[i].start
            assert come_to[i] == first
            come_to[i] = end
    if mode == "on":  # all that is shared, and by all who share it
        found = [
            (block, frozenset(members))
            for first, end, members in plan.ranges
            for block in range(first // size, end // size)
        ]
        expected = [(block, group) for block, some in shareable.items() for group in some]
        assert sorted(found, key=str) == sorted(expected, key=str)


def keys_read(ranges: KVRanges, num_rows: int) -> list[list[tuple[int, int]]]:
    """By row (page, offset) of every key it sees, in the order of its ranges."""
    seen: list[list[tuple[int, int]]] = [[] for _ in range(num_rows)]
    for i in range(len(ranges)):
        pages = ranges.pages[ranges.page_start[i] : ranges.page_start[i + 1]].tolist()
        for entry in range(ranges.row_start[i], ranges.row_start[i + 1]):
            row, visible = seen[ranges.rows[entry]], int(ranges.visible[entry])
            assert 0 < visible <= len(pages) * PAGE
            assert ranges.first_key[i] == len(row)
            row += [(pages[key // PAGE], key % PAGE) for key in range(visible)]
    return seen


@settings(max_examples=6 * settings.default.max_examples // 5, deadline=None)
@given(steps(), cost_tables(), st.sampled_from(["on", "auto"]), st.sampled_from([4, 8, 12]))
def test_every_row_sees_the_same_keys(
    step: Step, costs: AttentionCosts, mode: str, size: int
) -> None:
    plan = relay(mode, size, costs).plan(step.scheduled)
    plain = build_batch(step.scheduled, PAGE)
    shared = build_batch(step.scheduled, PAGE, plan.ranges if plan else ())
    for name in ("token_ids", "positions", "slots"):
        assert getattr(shared, name).tolist() == getattr(plain, name).tolist()
    expected = keys_read(plain.kv_ranges, plain.num_rows)
    assert keys_read(shared.kv_ranges, plain.num_rows) == expected
    assert [len(row) for row in expected] == [p + 1 for p in plain.positions.tolist()]
    if plan:
        assert len(shared.kv_ranges) == len(step) + len(plan.ranges)
        assert plan.pages_read == len(shared.kv_ranges.pages)
        assert plan.pages_distinct == len(set(plain.kv_ranges.pages.tolist()))


def predicted(step: Step, costs: AttentionCosts, ranges: Items[SharedRange]) -> float:
    """The time of a step under the documented model, page by page."""
    rows = [entry.num_tokens for entry in step.scheduled]
    prices = [costs.of(n) for n in rows]
    total = 0.0
    covering: dict[tuple[int, int], int] = {}  # (sequence, page) -> shared range
    for number, (first, end, members) in enumerate(ranges, len(step)):
        prices.append(costs.of(sum(rows[i] for i in members)))
        total += prices[-1][0]
        covering |= {(i, p): number for i in members for p in range(first // PAGE, end // PAGE)}
    ends: dict[Group, int] = {}  # where the keys end that a group shares
    own_from = [0] * len(step)
    shared = step.groups(PAGE)
    for page, groups in shared.items():
        for group in groups:
            ends[group] = (page + 1) * PAGE
            for i in group:
                own_from[i] = (page + 1) * PAGE
    for page, groups in shared.items():
        for group in groups:
            some = [prices[number] for number in {covering.get((i, page), i) for i in group}]
            hot = sum(price[2] for price in some)
            cold = sum(price[1] for price in some)
            # The one with most to lose comes first; the others find the keys more or less warm.
            warm = hot + max(price[1] - price[2] for price in some)
            total += PAGE * (warm + costs.coldness_after(ends[group]) * (cold - warm))
    for (_, start, count, _), (fixed, cold, _), first in zip(
        step.scheduled, prices, own_from, strict=False
    ):
        seen = sum(position + 1 - first for position in range(start, start + count))
        total += fixed + cold * seen / count
    return total


@settings(max_examples=3 * settings.default.max_examples // 2, deadline=None)
@given(steps(), cost_tables(), st.sampled_from(["on", "auto"]), st.sampled_from([4, 8, 12]))
def test_predicted_seconds(step: Step, costs: AttentionCosts, mode: str, size: int) -> None:
    plan = relay(mode, size, costs).plan(step.scheduled)
    if plan is None:
        return
    assert plan.seconds == pytest.approx(predicted(step, costs, plan.ranges), rel=1e-9)
    assert plan.plain_seconds == pytest.approx(predicted(step, costs, []), rel=1e-9)
    if mode == "auto":
        assert plan.seconds <= plan.plain_seconds * (1 + 1e-9)


def test_what_a_deeper_range_costs_above_it_is_counted() -> None:
    """Two of three read one page once; for the keys above it, that would be a loss."""
    pool = PagePool(400, PAGE)
    cache = RadixCache(pool)
    stem = [0] * 160
    for tail in (1, 2):
        put(cache, pool, stem + [tail] * PAGE)
    some = [
        scheduled(cache, stem + [tail] * PAGE, first_page=1000 * (i + 1))
        for i, tail in enumerate((1, 1, 2))
    ]
    costs = AttentionCosts([1, 2, 3], [0.0] * 3, [1, 1.4, 2.1], [0.5, 1.4, 2.0], [1], [0.0], 1)
    plan = plan_of(relay(costs=costs), some)
    assert plan.ranges == []
    assert plan.seconds == pytest.approx(plan.plain_seconds)


@settings(max_examples=3 * settings.default.max_examples // 2, deadline=None)
@given(steps(), cost_tables())
def test_alone_in_its_tree_a_run_is_read_once_if_that_pays(
    step: Step, costs: AttentionCosts
) -> None:
    """Where no run lies below another, each is decided as if it were the only one."""
    plan = relay(costs=costs).plan(step.scheduled)
    if plan is None or any(run.branches for run in shared_runs(step.scheduled)):
        return
    for run in shared_runs(step.scheduled):
        one = SharedRange(0, run.end, run.members)
        saved = plan.plain_seconds - predicted(step, costs, [one])
        read_apart = sum(costs.of(step.scheduled[i].num_tokens)[1] for i in run.members) * run.end
        # Never at a loss, and always if it saves the margin of what the branches take at most.
        assert saved > 0 or one not in plan.ranges
        assert saved <= 0.031 * read_apart or one in plan.ranges


@settings(max_examples=settings.default.max_examples, deadline=None)
@given(steps(), st.sampled_from([4, 8]))
def test_free_sharing_is_taken_and_dear_sharing_is_not(step: Step, size: int) -> None:
    everything = relay("on", size).plan(step.scheduled)
    free = relay("auto", size, FREE).plan(step.scheduled)
    dear = relay("auto", size, DEAR).plan(step.scheduled)
    if everything is None:
        assert free is dear is None
        return
    assert free is not None
    assert dear is not None
    assert free.ranges == everything.ranges != []
    assert free.seconds < free.plain_seconds
    assert dear.ranges == []
    assert dear.seconds == pytest.approx(dear.plain_seconds, rel=1e-12)
    assert dear.pages_read == len(build_batch(step.scheduled, PAGE).kv_ranges.pages)


@pytest.fixture
def cache() -> RadixCache:
    """sys (12 keys), then tenant A (8 keys) or tenant B (4 keys)."""
    pool = PagePool(400, PAGE)
    cache = RadixCache(pool)
    for tenant in (A, B):
        put(cache, pool, SYS + tenant)
    return cache


SYS, A, B = [1] * 12, [2] * 8, [3] * 4


def five(cache: RadixCache) -> list[ScheduledSequence]:
    """The sequences of the picture in ranges/shared.py."""
    prompts = [SYS + A, SYS + A, SYS + B, SYS + B, SYS]
    return [scheduled(cache, prompt, first_page=1000 * i) for i, prompt in enumerate(prompts, 1)]


def in_order(ranges: list[SharedRange]) -> list[tuple[int, int, list[int]]]:
    return sorted((first, end, sorted(members)) for first, end, members in ranges)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4, [(0, 12, [0, 1, 2, 3, 4]), (12, 16, [2, 3]), (12, 20, [0, 1])]),
        # The rest of sys is read with what follows it, by those who share that.
        (8, [(0, 8, [0, 1, 2, 3, 4]), (8, 16, [0, 1]), (8, 16, [2, 3])]),
        (16, [(0, 16, [0, 1]), (0, 16, [2, 3])]),
        (20, [(0, 20, [0, 1])]),
    ],
)
def test_the_picture(
    cache: RadixCache, size: int, expected: list[tuple[int, int, list[int]]]
) -> None:
    plan = plan_of(relay("on", size), five(cache))
    assert in_order(plan.ranges) == expected


def test_less_than_a_step_is_nothing_to_share(cache: RadixCache) -> None:
    assert relay("on", 24).plan(five(cache)) is None


def test_a_run_that_does_not_pay_leaves_its_keys_to_the_branches(cache: RadixCache) -> None:
    """Two rows read a key at the price of one, four at that of four, as does any range more."""
    rows = [1, 2, 3, 4, 1000]
    cold = [1.0, 1.0, 3.0, 4.0, 1000.0]
    costs = AttentionCosts(rows, [0.5] * 5, cold, cold, [1], [1.0], 1)
    plan = plan_of(relay(costs=costs), five(cache))
    assert in_order(plan.ranges) == [(0, 16, [2, 3]), (0, 20, [0, 1])]
    # 20 keys, 16 keys and the 12 of the last one, two fixed costs for ranges and five for rows.
    assert plan.seconds == pytest.approx(20 + 16 + 12 + 7 * 0.5 + 5)
    assert plan.plain_seconds == pytest.approx(2 * 20 + 2 * 16 + 12 + 5 * 0.5 + 5)


def test_keys_left_over_above_count_where_they_are_read(cache: RadixCache) -> None:
    """A tenant's range begins at key 8, not at key 12: 8 keys pay for it, and 4 would not."""
    costs = AttentionCosts([1, 2, 5], [0.0, 6.0, 6.0], [1.0] * 3, [1.0] * 3, [1], [1.0], 1)
    plan = plan_of(relay("auto", 8, costs), five(cache))
    assert in_order(plan.ranges) == [(0, 8, [0, 1, 2, 3, 4]), (8, 16, [0, 1]), (8, 16, [2, 3])]


def test_what_is_read_again_from_a_cache_leaves_less_to_gain(cache: RadixCache) -> None:
    """20 keys of 10 bytes are read hot again after 200 bytes, and cold after 400."""
    pair = five(cache)[:2]
    table = {"rows": [1, 2], "fixed": [1.0, 1.0], "cold": [1.0, 1.2], "hot": [0.1, 0.3]}
    hot, cold = (
        AttentionCosts(**table, footprints=[size], coldness=[coldness], key_bytes=10)  # type: ignore[arg-type]
        for size, coldness in ((400, 0.0), (100, 1.0))
    )
    assert plan_of(relay(costs=hot), pair).ranges == []
    assert in_order(plan_of(relay(costs=cold), pair).ranges) == [(0, 20, [0, 1])]


def test_the_saving_must_beat_the_margin(cache: RadixCache) -> None:
    pair = five(cache)[:2]
    for price, shared in ((1.95, False), (1.93, True)):
        costs = AttentionCosts([1, 2], [0.0, 0.0], [1.0, price], [1.0, price], [1], [1.0], 1)
        assert bool(plan_of(relay(costs=costs), pair).ranges) is shared
        assert relay(costs=costs).break_even(20) == (2 if shared else None)


def test_rows_of_one_sequence_share_nothing_among_themselves(cache: RadixCache) -> None:
    chunk = scheduled(cache, SYS + A, num_tokens=100)
    assert relay("on").plan([chunk]) is None
    stranger = scheduled(cache, [9] * 20, num_tokens=50)
    assert relay("on").plan([chunk, stranger]) is None
    assert relay("on").plan([]) is None


def test_rows_of_chunks_count(cache: RadixCache) -> None:
    """A price is looked up for all rows of the members, not for their number."""
    some = [scheduled(cache, SYS + A, num_tokens=n, first_page=1000 * n) for n in (3, 1, 6)]
    costs = AttentionCosts([1, 3, 6, 10], [0.0] * 4, [1.0, 2.0, 3.0, 4.0], [1.0] * 4, [1], [1.0], 1)
    plan = plan_of(relay(costs=costs), some)
    assert in_order(plan.ranges) == [(0, 20, [0, 1, 2])]
    own = 2 * 2.0 + 1 * 1.0 + 3.5 * 3.0  # keys seen on average, times the price of their rows
    assert plan.seconds == pytest.approx(20 * 4.0 + own)
    assert plan.plain_seconds == pytest.approx(20 * (2.0 + 1.0 + 3.0) + own)


def test_sequences_without_a_node_are_left_alone(cache: RadixCache) -> None:
    """Prefix caching is off for them: whatever their tokens, their pages are their own."""
    some = five(cache)
    for entry in (some[0], some[3]):
        entry.seq.node = None
    plan = plan_of(relay("on"), some)
    assert in_order(plan.ranges) == [(0, 12, [1, 2, 4])]
    batch = build_batch(some, PAGE, plan.ranges)
    assert plan.pages_read == len(batch.kv_ranges.pages)
    for entry in some:
        entry.seq.node = None
    assert relay("on").plan(some) is None


# ---------------------------------------------------------------- Relay


@pytest.mark.parametrize("mode", ["On", "", "always"])
def test_a_mode_there_is_not(mode: str) -> None:
    with pytest.raises(ValueError, match="relay must be auto, on, off; got"):
        relay(mode)


def test_costs_are_measured_when_first_needed_and_once(cache: RadixCache) -> None:
    measured = []

    def measure() -> AttentionCosts:
        measured.append(1)
        return FREE

    off = Relay("off", PAGE, PAGE, measure)
    assert off.plan(five(cache)) is None
    auto = Relay("auto", PAGE, PAGE, measure)
    assert auto.plan(five(cache)[3:4]) is None
    assert measured == []
    for _ in range(3):
        assert plan_of(auto, five(cache)).ranges
        assert auto.break_even(20) == 2
    assert measured == [1]


def test_turned_off_it_plans_nothing(cache: RadixCache) -> None:
    on = relay("on")
    assert on.plan(five(cache))
    on.mode = "off"
    assert on.plan(five(cache)) is None


@settings(max_examples=settings.default.max_examples, deadline=None)
@given(cost_tables(), st.integers(1, 12), st.sampled_from([4, 8]))
def test_break_even_is_where_plans_begin_to_share(
    costs: AttentionCosts, pages: int, size: int
) -> None:
    pool = PagePool(40, PAGE)
    cache = RadixCache(pool)
    keys = pages * size
    put(cache, pool, [1] * keys)
    auto = relay("auto", size, costs)
    some = [scheduled(cache, [1] * keys, first_page=1000 * i) for i in range(1, 13)]
    pays = [count for count in range(2, 13) if plan_of(auto, some[:count]).ranges]
    assert auto.break_even(keys, most=12) == (pays[0] if pays else None)
    assert auto.break_even(keys + size - 1, most=1) is None


def test_break_even_of_less_than_a_step_is_never() -> None:
    assert relay("auto", 8).break_even(7) is None
    assert relay("auto", 8).break_even(8) == 2


# ---------------------------------------------------------------- what it costs


def test_planning_a_step_of_64_sequences_is_cheap(count_calls: Callable[..., int]) -> None:
    """0.3 ms where it was written."""
    pool = PagePool(2000, PAGE)
    cache = RadixCache(pool)
    prompts = [[1] * 400 + [2 + i % 4] * 200 + [6 + i % 16] * 100 for i in range(64)]
    for prompt in prompts[:16]:
        put(cache, pool, prompt)
    some = [scheduled(cache, prompt, first_page=1000 * i) for i, prompt in enumerate(prompts, 1)]
    plan = plan_of(relay(), some)
    assert len(plan.ranges) == 1 + 4 + 16
    planner = relay()
    assert count_calls(lambda: plan_of(planner, some)) < 50 * 64


def test_planning_on_a_chain_of_200_nodes_is_cheap(count_calls: Callable[..., int]) -> None:
    """One sequence more at each node of a path: every run lies below another."""
    pool = PagePool(300, PAGE)
    cache = RadixCache(pool)
    prompt = list(itertools.chain.from_iterable([i] * PAGE for i in range(200)))
    put(cache, pool, prompt)
    some = [
        scheduled(cache, prompt[: PAGE * i], first_page=1000 * i)
        for i in random.Random(0).sample(range(1, 201), 200)
    ]
    assert len({entry.seq.node for entry in some}) == 200
    plan = plan_of(relay(), some)
    assert [len(members) for _, _, members in plan.ranges] == list(range(200, 1, -1))
    planner = relay()
    assert count_calls(lambda: plan_of(planner, some)) < 500 * 200
