"""RadixCache against a dictionary of prefixes, and its order of eviction."""

import random
from array import array
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headstart.engine.kv.pool import AccountingError, PagePool
from headstart.engine.kv.tree import Match, Node, RadixCache

NAMESPACES = [b"a", b"b"]


def put(cache: RadixCache, pool: PagePool, tokens: list[int], namespace: bytes = b"") -> Match:
    """Insert ``tokens`` with new pages, none of which the caller keeps."""
    pages = pool.allocate(len(tokens) // pool.page_size)
    match = cache.insert(cache.root(namespace), array("i", tokens), pages)
    pool.release(pages)
    return match


def find(cache: RadixCache, tokens: list[int], namespace: bytes = b"") -> list[int]:
    return cache.match(cache.root(namespace), array("i", tokens), len(tokens)).pages


def test_match_takes_whole_pages_within_the_limit() -> None:
    pool = PagePool(8, 2)
    cache = RadixCache(pool)
    pages = put(cache, pool, [1, 2, 3, 4, 5, 6]).pages
    assert find(cache, [1, 2, 3, 4, 5, 6, 7]) == pages
    assert find(cache, [1, 2, 3, 4, 5]) == pages[:2]
    assert find(cache, [1, 2, 3, 9]) == pages[:1]
    assert find(cache, [1]) == []
    root = cache.root(b"")
    assert cache.match(root, array("i", [1, 2, 3, 4]), 3).pages == pages[:1]


def test_match_goes_on_from_a_node() -> None:
    pool = PagePool(8, 2)
    cache = RadixCache(pool)
    pages = put(cache, pool, [1, 2, 3, 4, 5, 6]).pages
    tokens = array("i", [1, 2, 3, 4, 5, 6])
    start = cache.match(cache.root(b""), tokens, 2).node
    assert start.depth == 2
    node, rest = cache.match(start, tokens, 6)
    assert (node.depth, rest) == (6, pages[1:])


def test_insert_keeps_the_pages_the_tree_has() -> None:
    pool = PagePool(8, 2)
    cache = RadixCache(pool)
    first = put(cache, pool, [1, 2, 3, 4]).pages
    own = pool.allocate(3)
    node, held = cache.insert(cache.root(b""), array("i", [1, 2, 3, 4, 5, 6]), own)
    assert held == [*first, own[2]]
    assert node.depth == 6
    pool.release(own)
    pool.check(cache.check({}))


def test_a_leaf_grows_in_place_only_for_its_single_user() -> None:
    pool = PagePool(8, 2)
    cache = RadixCache(pool)
    node = put(cache, pool, [1, 2]).node
    cache.lock(node)
    tokens = array("i", [1, 2, 3, 4, 5, 6])
    assert cache.insert(node, tokens, pool.allocate(1)).node is node
    cache.lock(node)  # somebody else's part ends here, too
    longer = cache.insert(node, tokens, pool.allocate(1)).node
    assert longer.parent is node
    assert node.depth == 4


def test_a_split_keeps_locks_where_their_sequences_end() -> None:
    pool = PagePool(8, 2)
    cache = RadixCache(pool)
    node = put(cache, pool, [1, 2, 3, 4, 5, 6]).node
    cache.lock(node)
    upper = cache.match(cache.root(b""), array("i", [1, 2, 9, 9]), 4).node
    assert (upper.depth, node.depth, node.parent) == (2, 6, upper)
    cache.check({node: 1})
    assert cache.evict(8) == 0
    cache.unlock(node)
    assert cache.evict(8) == 3


def test_eviction_cuts_the_tail_of_what_was_used_longest_ago() -> None:
    pool = PagePool(8, 1)
    cache = RadixCache(pool)
    nodes = [put(cache, pool, [i, i]).node for i in range(3)]
    for i in (1, 0, 2):
        cache.lock(nodes[i])
        cache.unlock(nodes[i])
    assert cache.evict(1) == 1
    assert [len(find(cache, [i, i])) for i in range(3)] == [2, 1, 2]
    assert cache.evict(2) == 2
    assert [len(find(cache, [i, i])) for i in range(3)] == [1, 0, 2]


def test_an_ancestor_is_as_recent_as_its_last_used_descendant() -> None:
    pool = PagePool(8, 1)
    cache = RadixCache(pool)
    put(cache, pool, [1, 2])
    put(cache, pool, [7, 8])
    leaf = cache.match(cache.root(b""), array("i", [1, 2]), 2).node
    cache.match(cache.root(b""), array("i", [1]), 1)  # splits it
    cache.lock(leaf)
    cache.unlock(leaf)
    cache.evict(2)
    assert [len(find(cache, [1, 2])), len(find(cache, [7, 8]))] == [2, 0]


def test_namespaces_share_nothing() -> None:
    pool = PagePool(4, 1)
    cache = RadixCache(pool)
    put(cache, pool, [1, 2], b"a")
    root = cache.root(b"b")
    cache.lock(root)
    assert cache.match(root, array("i", [1, 2]), 2).pages == []
    cache.unlock(root)
    cache.check({})  # fails if the empty tree were remembered


def test_discard_stops_at_what_others_use() -> None:
    pool = PagePool(8, 1)
    cache = RadixCache(pool)
    put(cache, pool, [1, 2, 3])
    other = put(cache, pool, [1, 2, 4]).node
    cache.discard(cache.match(cache.root(b""), array("i", [1, 2, 3]), 3).node)
    assert [len(find(cache, [1, 2, 3])), len(find(cache, [1, 2, 4]))] == [2, 3]
    cache.discard(other)
    assert cache.num_pages == 0


def test_unlocking_too_often_is_an_error() -> None:
    pool = PagePool(4, 1)
    cache = RadixCache(pool)
    node = put(cache, pool, [1]).node
    with pytest.raises(AccountingError, match="unlocked more often"):
        cache.unlock(node)


def test_use_without_eviction_does_not_grow_the_books() -> None:
    pool = PagePool(4, 1)
    cache = RadixCache(pool)
    node = put(cache, pool, [1, 2]).node
    for _ in range(1000):
        cache.lock(node)
        cache.unlock(node)
    assert len(cache._candidates) < 100
    cache.check({})
    assert cache.evict(2) == 2


def test_a_long_match_is_cheap(count_calls: Callable[..., int]) -> None:
    """A few calls a node, however many pages are in it: 0.3 ms where it was written."""
    pool = PagePool(1000, 32)
    cache = RadixCache(pool)
    rng = random.Random(0)
    prompt = [rng.randrange(49152) for _ in range(6048)]
    put(cache, pool, prompt[:6016])
    tokens = array("i", prompt)
    match = cache.match(cache.root(b""), tokens, len(tokens) - 1)
    assert len(match.pages) == 188
    root = cache.root(b"")
    assert count_calls(lambda: cache.match(root, tokens, len(tokens) - 1)) < 50


class Tree(RuleBasedStateMachine):
    """A cache that is used like sequences do, beside a dictionary: prefix -> page."""

    @initialize(page_size=st.integers(1, 4))
    def start(self, page_size: int) -> None:
        self.pool = PagePool(12, page_size)
        self.cache = RadixCache(self.pool)
        self.model: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self.locks: list[tuple[bytes, tuple[int, ...], Node]] = []

    def prefixes(self, tokens: list[int]) -> list[tuple[int, ...]]:
        size = self.pool.page_size
        return [tuple(tokens[: i + size]) for i in range(0, len(tokens) - size + 1, size)]

    tokens = st.lists(st.integers(0, 1), max_size=14)
    namespaces = st.sampled_from(NAMESPACES)

    @rule(namespace=namespaces, tokens=tokens)
    def match_and_lock(self, namespace: bytes, tokens: list[int]) -> None:
        found = self.cache.match(self.cache.root(namespace), array("i", tokens), len(tokens))
        expected = []
        for prefix in self.prefixes(tokens):
            if (namespace, prefix) not in self.model:
                break
            expected.append(self.model[namespace, prefix])
        assert found.pages == expected
        depth = len(expected) * self.pool.page_size
        assert found.node.depth == depth
        self.cache.lock(found.node)
        self.locks.append((namespace, tuple(tokens[:depth]), found.node))

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), suffix=tokens)
    def insert_and_move_the_lock(self, data: st.DataObject, suffix: list[int]) -> None:
        at = data.draw(st.integers(0, len(self.locks) - 1))
        namespace, tokens, node = self.locks[at]
        n = min(len(suffix) // self.pool.page_size, self.pool.num_free)
        longer = [*tokens, *suffix[: n * self.pool.page_size]]
        own = self.pool.allocate(n)
        end, held = self.cache.insert(node, array("i", longer), own)
        assert len(held) == n
        assert end.depth == len(longer)
        new = self.prefixes(longer)[len(tokens) // self.pool.page_size :]
        for prefix, page, mine in zip(new, held, own, strict=True):
            assert page == self.model.setdefault((namespace, prefix), mine)
        self.cache.lock(end)
        self.cache.unlock(node)
        self.locks[at] = (namespace, tuple(longer), end)
        self.pool.release(own)

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        _, _, node = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.cache.unlock(node)

    @rule(n=st.integers(1, 6))
    def evict(self, n: int) -> None:
        evictable = self.cache.num_evictable_pages
        assert self.cache.evict(n) == min(n, evictable)
        in_tree = self.cache.check(self.lock_counts())
        self.model = {key: page for key, page in self.model.items() if page in in_tree}

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        in_tree = self.cache.check(self.lock_counts())
        self.model = {key: page for key, page in self.model.items() if page in in_tree}
        assert self.cache.num_evictable_pages == 0

    def lock_counts(self) -> Counter[Node]:
        return Counter(node for _, _, node in self.locks)

    @invariant()
    def books_hold(self) -> None:
        held = self.cache.check(self.lock_counts())
        self.pool.check(held)
        assert sorted(held) == sorted(self.model.values())
        for namespace, tokens, node in self.locks:
            size = self.pool.page_size
            pages = [page for part in node.path() for page in part.pages]
            assert node.depth == len(tokens) == len(pages) * size
            assert pages == [self.model[namespace, prefix] for prefix in self.prefixes([*tokens])]
        protected = {
            (namespace, prefix)
            for namespace, tokens, _ in self.locks
            for prefix in self.prefixes([*tokens])
        }
        assert self.cache.num_evictable_pages == len(self.model) - len(protected)


TestTree = Tree.TestCase
TestTree.settings = settings(
    max_examples=3 * settings.default.max_examples // 2, stateful_step_count=40, deadline=None
)
