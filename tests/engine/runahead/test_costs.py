"""The simulated chain: timelines worked out by hand, and what holds for all of them."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.runahead.costs import (
    KEY_SHARE,
    Chain,
    LinkCosts,
    first_token_seconds,
    jitter,
    simulate,
    simulate_gathered,
)

FREE = LinkCosts(0.0, 0.0)
LINEAR = PrefillCosts(0.0, 1.0, 0.0)
"""A token takes a second, and attention nothing."""


def chain(
    *ranks: PrefillCosts, layers: int = 2, link: LinkCosts = FREE, back: LinkCosts = FREE
) -> Chain:
    return Chain(layers, 1, ranks, (link,) * (len(ranks) - 1), back)


# ---------------------------------------------------------------- costs


def test_seconds_of_a_chunk() -> None:
    costs = PrefillCosts(5.0, 2.0, 0.5)
    assert costs.seconds(0, 4) == 5 + 2 * 4 + 0.5 * 4 * 2
    assert costs.seconds(10, 4) == 5 + 2 * 4 + 0.5 * 4 * 12
    assert costs.seconds(10, 0) == 0
    assert LinkCosts(3.0, 0.5).seconds(10) == 8


@given(
    st.floats(0, 10),
    st.floats(1e-3, 10),
    st.floats(0, 1),
    st.integers(0, 1000),
    st.integers(1, 999),
)
def test_tokens_is_the_inverse_of_seconds(
    fixed: float, per_token: float, per_pair: float, start: int, num: int
) -> None:
    costs = PrefillCosts(fixed, per_token, per_pair)
    assert costs.tokens(start, costs.seconds(start, num)) == pytest.approx(num)
    assert costs.tokens(start, fixed) == costs.tokens(start, fixed / 2) == 0


def test_tokens_that_take_no_time() -> None:
    assert PrefillCosts(1.0, 0.0, 0.0).tokens(5, 2.0) == float("inf")
    assert PrefillCosts(1.0, 0.0, 2.0).tokens(0, 17.0) == pytest.approx(4)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_costs_are_finite_and_not_negative(wrong: float) -> None:
    for costs in ((wrong, 0.0, 0.0), (0.0, wrong, 0.0), (0.0, 0.0, wrong)):
        with pytest.raises(ValueError, match="0 or more"):
            PrefillCosts(*costs)
    for link in ((wrong, 0.0), (0.0, wrong)):
        with pytest.raises(ValueError, match="0 or more"):
            LinkCosts(*link)


# ---------------------------------------------------------------- fit

GRID = [(start, num) for start in (0, 500, 3000) for num in (64, 256, 1024)]


@given(
    st.sampled_from([0.0, 1e-3, 0.05]),
    st.sampled_from([0.0, 1e-5, 2e-3]),
    st.sampled_from([0.0, 1e-9, 1e-6]),
)
def test_fit_finds_the_costs_that_made_the_samples(
    fixed: float, per_token: float, per_pair: float
) -> None:
    true = PrefillCosts(fixed, per_token, per_pair)
    if true.seconds(0, 1) == 0:
        return
    found = PrefillCosts.fit([(start, num, true.seconds(start, num)) for start, num in GRID])
    for start, num in [(0, 1), (10_000, 4096), *GRID]:
        assert found.seconds(start, num) == pytest.approx(true.seconds(start, num), rel=1e-4)


def test_fit_is_the_best_of_what_is_not_negative() -> None:
    """Small changes of any cost only make the sum of squared relative errors larger."""
    draw = random.Random(7)
    for _ in range(30):
        samples = [(start, num, num * draw.uniform(0.5, 2)) for start, num in GRID]

        def error(costs: tuple[float, ...], samples=samples) -> float:  # type: ignore[no-untyped-def]
            return sum((PrefillCosts(*costs).seconds(a, n) / s - 1) ** 2 for a, n, s in samples)

        found = PrefillCosts.fit(samples)
        best = (found.fixed, found.per_token, found.per_pair)
        for i, step in itertools.product(range(3), (1.0, 1e-2, 1e-5)):
            for change in (step, -step):
                other = [*best]
                other[i] = max(other[i] + change, 0.0)
                assert error(tuple(other)) >= error(best) - 1e-9


def test_fit_squares_relative_errors() -> None:
    """The least of (a / 1 - 1)² + (a / 4 - 1)² lies at a = (1 + 1/4) / (1 + 1/16)."""
    found = PrefillCosts.fit([(0, 10, 10.0), (0, 10, 40.0)])
    assert found.per_token == pytest.approx(20 / 17)
    assert found.fixed == found.per_pair == 0


def test_fit_of_few_samples_leaves_open_what_they_do_not_say() -> None:
    def costs(*samples: tuple[int, int, float]) -> tuple[float, float, float]:
        found = PrefillCosts.fit(samples)
        return found.fixed, found.per_token, found.per_pair

    assert costs((1000, 50, 5.0)) == pytest.approx((0, 0.1, 0))
    assert costs(*[(0, 100, 10.0)] * 3) == pytest.approx((0, 0.1, 0))
    two = costs((0, 100, 100.0 + 5000), (900, 100, 100.0 + 95_000))
    assert two == pytest.approx((0, 1, 1))
    # Longer chunks that cost less per token: a fixed part, and no negative one.
    assert costs((0, 10, 20.0), (0, 100, 110.0)) == pytest.approx((10, 1, 0))


@pytest.mark.parametrize("samples", [[], [(0, 0, 1.0)], [(0, 5, 0.0)], [(0, 5, float("nan"))]])
def test_fit_refuses_what_is_no_sample(samples: list[tuple[int, int, float]]) -> None:
    with pytest.raises(ValueError, match="samples of some tokens"):
        PrefillCosts.fit(samples)


# ---------------------------------------------------------------- timelines by hand


def test_one_rank_takes_what_its_chunk_takes() -> None:
    alone = chain(PrefillCosts(1.0, 2.0, 0.5), layers=5)
    found = simulate(alone, [3], [3, 11])
    assert found.seconds == pytest.approx(PrefillCosts(1.0, 2.0, 0.5).seconds(3, 8))
    assert found.idle == (0.0,)
    assert found.received == (0,)


def test_free_links_and_linear_work() -> None:
    """Two layers, 10 tokens each: 5 s a layer and rank, the second never waits."""
    found = simulate(chain(LINEAR, LINEAR), [0, 0], [0, 10, 20])
    assert found.seconds == pytest.approx(10)
    assert found.idle == (0.0, 0.0)
    assert found.received == (0, 20)  # 10 tokens of 1 byte in 2 layers


def test_a_long_first_chunk_is_waited_for() -> None:
    """Rank 0: keys at 0.2 * 15 = 3 and 18 s. Rank 1: 5 s a layer, keys at 1 and 8 s.

    It waits 2 s, goes on at 3, has its keys of layer 1 at 8, waits 10 s, and ends 4 s later.
    """
    assert KEY_SHARE == 0.2
    found = simulate(chain(LINEAR, LINEAR), [0, 0], [0, 30, 40])
    assert found.seconds == pytest.approx(22)
    assert found.idle == pytest.approx((0, 12))


def test_attention_comes_after_the_keys_that_it_needs() -> None:
    """Only attention: rank 0 sees 10 * 5 pairs, rank 1 sees 10 * 15, in each of two layers."""
    costs = PrefillCosts(0.0, 0.0, 2.0)
    found = simulate(chain(costs, costs), [0, 0], [0, 10, 20])
    # Rank 0 has layer 1's keys after its attention of layer 0; that of layer 1 it leaves out.
    assert found.seconds == pytest.approx(2 * 150)
    slow = simulate(chain(PrefillCosts(0.0, 0.0, 8.0), costs), [0, 0], [0, 10, 20])
    assert slow.seconds == pytest.approx(8 * 50 / 2 + 150)
    assert slow.idle == pytest.approx((0, 8 * 50 / 2 - 150))


def test_messages_of_a_link_go_one_after_the_other() -> None:
    """3 layers, 10 tokens; a message takes 2 + 10 = 12 s, a layer 10/3 s on either rank.

    They leave at 2/3, 12 2/3, 24 2/3 and arrive 12 s later each; the rest of a layer ends it.
    """
    slow = chain(LINEAR, LINEAR, layers=3, link=LinkCosts(2.0, 1.0))
    found = simulate(slow, [0, 0], [0, 10, 20])
    layer = 10 / 3
    last = KEY_SHARE * layer + 36
    assert found.seconds == pytest.approx(last + (1 - KEY_SHARE) * layer)
    assert found.idle[1] == pytest.approx(found.seconds - 10)


def test_three_ranks_pass_on_what_they_were_sent() -> None:
    """One layer: arrivals at 0.2 + 1 and 1.2 + 2, after which 0.8 of a second is left."""
    three = chain(LINEAR, LINEAR, LINEAR, layers=1, link=LinkCosts(0.0, 1.0))
    found = simulate(three, [0, 0, 0], [0, 1, 2, 3])
    assert found.received == (0, 1, 2)
    assert found.seconds == pytest.approx(0.2 + 1 + 2 + 0.8)
    assert found.idle == pytest.approx((0, 0, 3))  # rank 1 computes nothing after its keys


def test_what_a_rank_holds_is_neither_computed_nor_sent() -> None:
    link = LinkCosts(0.0, 1.0)
    two = chain(LINEAR, LINEAR, layers=1, link=link, back=link)
    # Rank 1 lacks [4, 10) of rank 0's [0, 10).
    assert simulate(two, [0, 4], [0, 10, 20]).received == (0, 6)
    # It holds all before its chunk, and some of that.
    found = simulate(two, [0, 14], [0, 10, 20])
    assert found.received == (0, 0)
    assert found.seconds == pytest.approx(6)
    # Rank 0 holds part of its chunk: 4 tokens are left to compute; all 10 are sent.
    found = simulate(two, [6, 0], [0, 10, 20])
    assert found.received == (0, 10)
    assert found.seconds == pytest.approx(KEY_SHARE * 4 + 10 + 8)
    # It holds all of it: what it sends is there at the start.
    assert simulate(two, [15, 0], [0, 10, 20]).seconds == pytest.approx(10 + 8)


def test_the_engine_sends_the_first_rank_what_it_lacks() -> None:
    """20 of 30 tokens known to the engine only; two layers at 10 s each are there at the start."""
    back = LinkCosts(0.0, 0.5)
    two = chain(LINEAR, LINEAR, back=back)
    found = simulate(two, [0, 20], [20, 25, 30])
    assert found.received == (2 * 20, 2 * 5)
    # Rank 0: 2.5 s a layer; layer 0 at 10, its keys of layer 1 at 12.5, but KV only at 20.
    assert found.idle == pytest.approx((9.5, 20 - 2.5 - 0.5))
    assert found.seconds == pytest.approx(20 + 2)
    part = simulate(two, [12, 20], [20, 25, 30])
    assert part.received == (2 * 8, 2 * 5)


def test_a_rank_alone_cannot_receive() -> None:
    for simulated in (simulate, first_token_seconds):
        with pytest.raises(ValueError, match="alone"):
            simulated(chain(LINEAR), [3], [4, 10])


def test_chains_are_checked() -> None:
    for layers, size, links in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 2)):
        with pytest.raises(ValueError, match="a chain has"):
            Chain(layers, size, (LINEAR, LINEAR), (FREE,) * links, FREE)


def test_the_last_ranks_of_a_chain() -> None:
    ranks = tuple(PrefillCosts(float(i), 0.0, 0.0) for i in range(4))
    links = tuple(LinkCosts(float(i), 0.0) for i in range(3))
    whole = Chain(3, 7, ranks, links, FREE)
    assert whole.last(4) == whole
    assert whole.last(2) == Chain(3, 7, ranks[2:], links[2:], FREE)
    assert whole.last(1) == Chain(3, 7, ranks[3:], (), FREE)


# ---------------------------------------------------------------- any timeline


@st.composite
def runs(draw: st.DrawFn) -> tuple[Chain, list[int], list[int]]:
    """A chain, what its ranks hold, and bounds."""
    count = draw(st.integers(1, 5))
    cost = st.floats(0, 2)
    ranks = st.builds(PrefillCosts, cost, cost, st.floats(0, 0.01))
    links = st.builds(LinkCosts, cost, st.floats(0, 0.1))
    some = Chain(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 3)),
        tuple(draw(ranks) for _ in range(count)),
        tuple(draw(links) for _ in range(count - 1)),
        draw(links),
    )
    places = st.integers(0, 200)
    bounds = draw(st.lists(places, min_size=count + 1, max_size=count + 1, unique=True))
    bounds.sort()
    held = [draw(places) for _ in range(count)]
    held[-1] = max(held[-1], bounds[0]) if count == 1 else held[-1]
    return some, held, bounds


@given(runs())
def test_in_one_expression_as_message_by_message(run: tuple[Chain, list[int], list[int]]) -> None:
    assert first_token_seconds(*run) == pytest.approx(simulate(*run).seconds)


@given(runs())
def test_the_last_rank_computes_or_waits(run: tuple[Chain, list[int], list[int]]) -> None:
    some, held, bounds = run
    found = simulate(some, held, bounds)
    start = max(bounds[-2], min(held[-1], bounds[-1]))
    busy = some.ranks[-1].seconds(start, bounds[-1] - start)
    assert found.seconds == pytest.approx(busy + found.idle[-1])
    assert min(found.idle) >= 0


@given(runs(), st.integers(0, 2**32), st.floats(0, 2))
def test_noise_only_delays_and_no_more_than_it_may(
    run: tuple[Chain, list[int], list[int]], seed: int, most: float
) -> None:
    quiet = simulate(*run)
    noisy = simulate(*run, noise=jitter(seed, most))
    assert noisy.received == quiet.received
    assert quiet.seconds <= noisy.seconds * (1 + 1e-9)
    assert noisy.seconds <= quiet.seconds * (1 + most) * (1 + 1e-9)
    assert simulate(*run, noise=jitter(seed, most)) == noisy


def test_noise_is_drawn_for_each_message() -> None:
    factors = iter([1.0, 2.0, 3.0])
    slow = chain(LINEAR, LINEAR, layers=3, link=LinkCosts(0.0, 1.0))
    found = simulate(slow, [0, 0], [0, 10, 20], noise=lambda: next(factors))
    assert found.seconds == pytest.approx(KEY_SHARE * 10 / 3 + 60 + (1 - KEY_SHARE) * 10 / 3)
    assert list(factors) == []
    draws = [draw() for draw in [jitter(3, 0.5)] * 100]
    assert min(draws) >= 1
    assert max(draws) <= 1.5
    assert len(set(draws)) == 100


# ---------------------------------------------------------------- the baseline


def test_gathered_layers_wait_for_each_other() -> None:
    """Two layers, 3 ranks of 10 tokens, one half as fast; two ring steps of 1 + 10 s."""
    slow = PrefillCosts(0.0, 2.0, 0.0)
    three = chain(LINEAR, slow, LINEAR, link=LinkCosts(1.0, 1.0))
    found = simulate_gathered(three, 30, "causal")
    # Keys of layer 0 at 0.2 * 10; gathered 22 s later; the slow rank's of layer 1 after 10 more.
    assert found.seconds == pytest.approx(2 + 22 + 10 + 22 + 4)
    assert found.idle == pytest.approx((50, 44, 50))
    assert found.received == (40, 40, 40)


def test_the_slowest_link_of_the_ring_counts() -> None:
    three = Chain(1, 1, (LINEAR,) * 3, (FREE, LinkCosts(5.0, 0.0)), FREE)
    assert simulate_gathered(three, 3, "causal").seconds == pytest.approx(0.2 + 10 + 0.8)
    closed = Chain(1, 1, (LINEAR,) * 3, (FREE, FREE), LinkCosts(7.0, 0.0))
    assert simulate_gathered(closed, 3, "causal").seconds == pytest.approx(0.2 + 14 + 0.8)


def test_dense_attention_sees_all_keys() -> None:
    costs = PrefillCosts(0.0, 0.0, 1.0)
    two = chain(costs, costs, layers=1)
    assert simulate_gathered(two, 20, "causal").seconds == pytest.approx(10 * 15)
    dense = simulate_gathered(two, 20, "dense")
    assert dense.seconds == pytest.approx(10 * 20)
    assert dense.idle == (0, 0)


def test_one_rank_gathers_nothing() -> None:
    costs = PrefillCosts(1.0, 2.0, 0.5)
    alone = chain(costs, back=LinkCosts(9.0, 9.0))
    assert simulate_gathered(alone, 10, "causal").seconds == pytest.approx(costs.seconds(0, 10))


def test_half_the_traffic_of_the_baseline() -> None:
    """Section 4.1: (p - 1) C / 2 entries against (p - 1) C."""
    for count in (2, 4, 8):
        some = chain(*[LINEAR] * count)
        bounds = [100 * i for i in range(count + 1)]
        ours = simulate(some, [0] * count, bounds)
        theirs = simulate_gathered(some, bounds[-1], "causal")
        assert sum(theirs.received) == 2 * sum(ours.received)
        assert sum(ours.received) == 2 * (count - 1) * bounds[-1] // 2


def test_noise_reaches_the_baseline() -> None:
    two = chain(LINEAR, LINEAR, layers=3, link=LinkCosts(1.0, 0.0))
    quiet = simulate_gathered(two, 10, "causal").seconds
    noisy = simulate_gathered(two, 10, "causal", noise=lambda: 3.0).seconds
    assert noisy == pytest.approx(quiet + 3 * 2.0)


def test_costs_of_a_slower_rank() -> None:
    costs = PrefillCosts(0.1, 0.002, 3e-6)
    assert costs.times(2.5).seconds(640, 320) == pytest.approx(2.5 * costs.seconds(640, 320))
    assert costs.times(1.0) == costs
