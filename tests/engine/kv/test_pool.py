"""PagePool: reference counts against a plain list of owners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.kv.pool import AccountingError, OutOfPagesError, PagePool


def test_allocate_takes_free_pages_once() -> None:
    pool = PagePool(3, 16)
    pages = pool.allocate(2)
    assert len(set(pages)) == 2
    assert (pool.num_free, pool.num_used) == (1, 2)
    with pytest.raises(OutOfPagesError, match="2 KV pages wanted, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_a_page_is_free_when_its_last_owner_releases_it() -> None:
    pool = PagePool(1, 16)
    [page] = pool.allocate(1)
    pool.retain([page])
    pool.release([page])
    assert pool.num_free == 0
    pool.release([page])
    assert pool.num_free == 1
    with pytest.raises(AccountingError, match="freed twice"):
        pool.release([page])
    with pytest.raises(AccountingError, match="retained while free"):
        pool.retain([page])


def test_check_finds_leaks_and_missing_references() -> None:
    pool = PagePool(2, 16)
    [page] = pool.allocate(1)
    pool.check({page: 1})
    for wrong in ({}, {page: 2}, {page: 1, 1 - page: 1}):
        with pytest.raises(AccountingError, match="references"):
            pool.check(wrong)


def test_pages_for_rounds_up() -> None:
    pool = PagePool(2, 16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 9))))
def test_counts_follow_the_owners(operations: list[tuple[str, int]]) -> None:
    pool = PagePool(5, 4)
    held: list[int] = []  # one entry for each reference
    for name, n in operations:
        if name == "allocate" and n <= pool.num_free:
            held += pool.allocate(n)
        elif name == "retain" and held:
            page = held[n % len(held)]
            pool.retain([page])
            held.append(page)
        elif name == "release" and held:
            pool.release([held.pop(n % len(held))])
        pool.check({page: held.count(page) for page in held})
        assert pool.num_used == len(set(held))
