"""Buckets of requests and tokens a minute, whatever the order of what is taken and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.server.http.rates import Bucket, address_of, duration

LIMITS = st.integers(1, 10_000)
PAUSES = st.floats(0, 200, allow_nan=False)


@given(limit=LIMITS, moves=st.lists(st.tuples(PAUSES, st.integers(1, 50)), max_size=60))
def test_nobody_has_more_than_a_minutes_worth_and_what_fills_it(limit, moves):
    """Over any stretch: the limit, and its share of the time."""
    now = 1000.0
    bucket = Bucket(limit, now)
    taken: list[tuple[float, float]] = []
    for pause, amount in moves:
        now += pause
        amount = min(amount, limit)
        if bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            taken.append((now, amount))
        assert 0 <= bucket.level(now) <= limit
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            seconds = taken[last][0] - taken[first][0]
            total = sum(amount for _, amount in taken[first : last + 1])
            assert total <= limit + seconds * limit / 60 + 1e-6


@given(limit=LIMITS, taken=st.integers(0, 30_000), amount=st.integers(1, 30_000))
def test_it_is_let_in_after_the_wait_and_not_before(limit, taken, amount):
    bucket = Bucket(limit, 0.0)
    bucket.take(taken, 0.0)
    wait = bucket.wait(amount, 0.0)
    assert bucket.wait(amount, wait + 1e-6) <= 1e-6
    if wait > 1e-3:
        assert bucket.wait(amount, wait - 1e-3) > 0
        assert bucket.wait(amount, wait / 2) == pytest.approx(wait / 2)


@given(limit=LIMITS, taken=st.integers(0, 30_000))
def test_what_is_given_back_is_there_and_no_more_than_a_minutes_worth(limit, taken):
    bucket = Bucket(limit, 0.0)
    bucket.take(taken, 0.0)
    bucket.take(-taken, 0.0)
    assert bucket.level(0.0) == pytest.approx(limit)
    bucket.take(-1000, 0.0)
    assert bucket.level(0.0) == limit
    assert bucket.full_in(0.0) == 0


def test_more_than_a_minutes_worth_waits_for_a_full_bucket():
    bucket = Bucket(60, 0.0)
    assert bucket.wait(1000, 0.0) == 0
    bucket.take(1000, 0.0)
    assert bucket.level(0.0) == -940
    assert bucket.wait(1, 0.0) == 941
    assert bucket.wait(1000, 0.0) == 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.017, "17ms"), (1.25, "1.2s"), (59.96, "60s"), (360, "6m0s"), (61.6, "1m2s")],
)
def test_durations_are_written_as_openai_does(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("host", "caller"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_who_an_address_is(host, caller):
    assert address_of(host) == caller
