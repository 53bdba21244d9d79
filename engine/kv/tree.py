"""RadixCache: the KV pages of prompts and answers seen before, found by their tokens.

A radix tree for each namespace. An edge is a run of whole pages, so a page is the smallest thing
that is shared, and nodes split at page boundaries only. Page ids; no tensors.

    root(ns) ── A: pages 7 3 9 ──┬── B: pages 4 1        tokens of B's end: 5 pages deep
                                 └── C: page  8

Who owns which part of a sequence's tokens (page size 4; ``|`` page ends):

    token_ids    p p p p | p p p p | p p p p | o o o o | o o
    KV computed  ─────────────────────────────────────── ·      the last token has none yet
    in the tree  ├──── A, B ... the sequence's node ─────┤      every full page
                 pages of the tree (1 reference) and of the sequence (1 reference)
    private                                              ├──┤   the page being filled:
                                                                one reference, the sequence's

The tree holds one pool reference for each of its pages, whoever else uses them. A sequence that
uses the tree's pages holds its own reference to each and a lock on the node where its part ends.

Locks. ``node.pins`` counts the locks on the node itself and its children that are pinned, so a
lock reaches the root by pinning each ancestor once, and moving a lock from a node to its child
touches two nodes, not the path. A pinned node is never evicted. Splitting a node leaves the lower
part in place as the same object, since locks mean "to the end of this node"; the new upper part
has one child and so one pin or none.

Eviction takes the leaf whose last lock went first and cuts pages off its end; a long prompt loses
its tail, not everything. Candidates wait in a heap; entries that no longer hold are dropped when
they surface.

The idea is RadixAttention's (SGLang, arXiv 2312.07104).
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from headstart.engine.kv.pool import AccountingError, PagePool

TOKEN_BYTES = array("i").itemsize

Why = Literal["prompt", "answer", "broken", "cleared"]
"""What pages leave a tree for: a prompt that needs room, or an answer that grows; or their KV is
not numbers, or the cache is emptied."""


class Node:
    """A run of pages below ``parent``. The root of a namespace has no parent and no pages.

    key:    the run's tokens, 4 bytes each
    pages:  page ids, one for each ``page_size`` tokens of ``key``
    depth:  tokens from the root to the end of this node
    """

    __slots__ = ("children", "depth", "key", "last_used", "namespace", "pages", "parent", "pins")

    def __init__(
        self, namespace: bytes, parent: Node | None, key: bytes, pages: list[int], depth: int
    ) -> None:
        self.namespace = namespace
        self.parent = parent
        self.key = key
        self.pages = pages
        self.depth = depth
        self.children: dict[bytes, Node] = {}  # by the key of their first page
        self.pins = 0
        self.last_used = 0

    def path(self) -> list[Node]:
        """The nodes from the root's child down to this one; empty for a root."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Match(NamedTuple):
    """``node`` ends where the match ends; ``pages`` are those between the start and that end."""

    node: Node
    pages: list[int]


class RadixCache:
    """Pages by token prefix, one tree for each namespace. ``dropped`` is told of the pages that
    leave the trees, and what for."""

    def __init__(
        self, pool: PagePool, dropped: Callable[[list[int], Why], None] = lambda pages, why: None
    ) -> None:
        self._pool = pool
        self._dropped = dropped
        self._page_bytes = pool.page_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._num_pages = 0
        self._num_evictable = 0
        self._num_nodes = 0
        self._clock = 0
        # (last_used, push number, node); the number breaks ties so that nodes are not compared.
        self._candidates: list[tuple[int, int, Node]] = []
        self._num_pushes = 0

    @property
    def num_pages(self) -> int:
        """Pages the trees hold."""
        return self._num_pages

    @property
    def num_evictable_pages(self) -> int:
        """Pages in nodes that no lock protects: ``evict`` can free that many."""
        return self._num_evictable

    def root(self, namespace: bytes) -> Node:
        """The tree of ``namespace``. An empty tree is forgotten when its last lock goes."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(namespace, None, b"", [], 0)
        return root

    def match(self, start: Node, tokens: array[int], limit: int) -> Match:
        """Follow ``tokens[start.depth:limit]`` down from ``start`` as far as whole pages agree.

        ``tokens`` is the whole sequence, of which ``start`` covers the first ``start.depth``.
        A match that ends inside a node splits it, so that a lock can end there. Lock the node
        before anything is evicted.
        """
        page_bytes = self._page_bytes
        node = start
        pages: list[int] = []
        if not node.children or limit - node.depth < self._pool.page_size:
            return Match(node, pages)
        wanted = tokens[node.depth : limit].tobytes()
        at = 0
        while at + page_bytes <= len(wanted):
            child = node.children.get(wanted[at : at + page_bytes])
            if child is None:
                break
            if wanted.startswith(child.key, at):
                at += len(child.key)
                node = child
                pages += child.pages
                continue
            n = self._equal_pages(child.key, wanted[at : at + len(child.key)])
            node = self._split(child, n)
            pages += node.pages
            break
        return Match(node, pages)

    def depth(self, namespace: bytes, tokens: array[int], limit: int) -> int:
        """How many of ``tokens[:limit]`` a match would find; nothing is changed."""
        node, depth = self._roots.get(namespace), 0
        if node is None:
            return 0
        wanted = tokens[:limit].tobytes()
        while depth + self._page_bytes <= len(wanted):
            node = node.children.get(wanted[depth : depth + self._page_bytes])
            if node is None:
                break
            pages = len(node.pages)
            if not wanted.startswith(node.key, depth):
                pages = self._equal_pages(node.key, wanted[depth : depth + len(node.key)])
            depth += pages * self._page_bytes
            if pages < len(node.pages):
                break
        return depth // TOKEN_BYTES

    def insert(self, start: Node, tokens: array[int], pages: list[int]) -> Match:
        """Put ``pages``, which hold the tokens that follow ``start``, into the tree.

        The tokens are ``tokens[start.depth : start.depth + len(pages) * page_size]``. The caller
        must hold the only lock that it counts on for ``start``: a leaf that nobody else locks
        grows in place. Returns the node at the end, and the pages the tree holds for these
        tokens: where the tree had a page already it is that one, and the caller swaps its own
        for it. The tree takes references only to pages it adds; locks stay where they are.
        """
        page_size = self._pool.page_size
        end = start.depth + len(pages) * page_size
        node, held = self.match(start, tokens, end)
        added = pages[len(held) :]
        if not added:
            return Match(node, held)
        key = tokens[node.depth : end].tobytes()
        if len(key) != len(added) * self._page_bytes:
            raise ValueError(f"{len(pages)} pages need tokens up to {end}, got {len(tokens)}")
        self._pool.retain(added)
        self._num_pages += len(added)
        if node is start and node.parent is not None and not node.children and node.pins <= 1:
            node.key += key
            node.pages += added
            node.depth = end
            if not node.pins:
                self._num_evictable += len(added)
        else:
            parent, node = node, Node(start.namespace, node, key, list(added), end)
            parent.children[key[: self._page_bytes]] = node
            self._num_nodes += 1
            self._num_evictable += len(added)
            self._unpinned(node)
        return Match(node, held + added)

    def lock(self, node: Node) -> None:
        """Protect the pages from the root to the end of ``node`` from eviction."""
        above: Node | None = node
        while above is not None:
            above.pins += 1
            if above.pins > 1:
                return
            self._num_evictable -= len(above.pages)
            if above.parent is None:  # it may have been forgotten while empty
                self._roots.setdefault(above.namespace, above)
            above = above.parent

    def unlock(self, node: Node) -> None:
        """Take one lock off ``node``. What is then unlocked counts as used just now."""
        if node.pins < 1:
            raise AccountingError("a radix cache node was unlocked more often than locked")
        self._clock += 1
        above: Node | None = node
        while above is not None:
            above.pins -= 1
            if above.pins:
                return
            if above.parent is None:
                self._forget_if_empty(above)
            else:
                self._num_evictable += len(above.pages)
                self._unpinned(above)
            above = above.parent

    def evict(self, n_pages: int, why: Why = "prompt") -> int:
        """Free ``n_pages`` pages, least recently used first; returns how many became free.

        Fewer if locks protect the rest. A page that a sequence holds without a lock leaves the
        tree but is not counted, as it is not free.
        """
        before = self._pool.num_free
        while (freed := self._pool.num_free - before) < n_pages and self._candidates:
            last_used, _, node = self._candidates[0]
            if node.last_used != last_used or not self._is_candidate(node):
                heapq.heappop(self._candidates)
                continue
            self._cut(node, n_pages - freed, why)
        return self._pool.num_free - before

    def discard(self, node: Node) -> None:
        """Drop what ends at ``node``, upwards until something locked or shared: its KV is bad."""
        while node.parent is not None and not node.pins and not node.children:
            above = node.parent
            self._cut(node, len(node.pages), "broken")
            node = above
        if node.parent is None:
            self._forget_if_empty(node)

    def clear(self) -> None:
        """Drop every page that no lock protects."""
        while self._num_evictable:
            self.evict(self._num_evictable, "cleared")

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def check(self, locks: Mapping[Node, int]) -> dict[int, int]:
        """Prove the trees' books; returns the references they hold, by page.

        ``locks``: how many locks the callers hold on each node, roots included. Raises
        AccountingError.
        """
        held: Counter[int] = Counter()
        evictable = num_nodes = 0
        waiting = {(last_used, id(node)) for last_used, _, node in self._candidates}
        for node in [*self._roots.values(), *self.nodes()]:
            pinned = sum(1 for child in node.children.values() if child.pins)
            _prove(node.pins == locks.get(node, 0) + pinned, "pins are not locks plus children")
            for first, child in node.children.items():
                _prove(child.parent is node, "a child has another parent")
                _prove(child.key[: self._page_bytes] == first, "a child is filed under other keys")
            if node.parent is None:
                _prove(self._roots[node.namespace] is node, "a root is filed elsewhere")
                _prove(bool(node.children or node.pins), "an empty root was not forgotten")
                continue
            num_nodes += 1
            held.update(node.pages)
            _prove(bool(node.pages), "a node has no pages")
            _prove(len(node.key) == len(node.pages) * self._page_bytes, "keys and pages differ")
            span = len(node.pages) * self._pool.page_size
            _prove(node.depth == node.parent.depth + span, "a node has the wrong depth")
            _prove(node.namespace == node.parent.namespace, "namespaces mix")
            if not node.pins:
                evictable += len(node.pages)
                found = bool(node.children) or (node.last_used, id(node)) in waiting
                _prove(found, "a leaf without locks cannot be evicted")
        in_trees = set(self.nodes()) | set(self._roots.values())
        _prove(all(node in in_trees for node in locks), "a locked node has left its tree")
        _prove(all(count == 1 for count in held.values()), "a page is in the trees twice")
        _prove(self._num_pages == len(held), "num_pages is wrong")
        _prove(self._num_nodes == num_nodes, "the number of nodes is wrong")
        _prove(self._num_evictable == evictable, "num_evictable_pages is wrong")
        return dict(held)

    def _equal_pages(self, a: bytes, b: bytes) -> int:
        """How many leading pages of two different keys agree."""
        low, high = 0, min(len(a), len(b)) // self._page_bytes  # pages: low agree
        while low < high:
            middle = (low + high + 1) // 2
            end = middle * self._page_bytes
            if a[:end] == b[:end]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: Node, n: int) -> Node:
        """Give the first ``n`` pages of ``node`` to a new node above it, and return that."""
        parent = node.parent
        assert parent is not None
        cut = n * self._page_bytes
        depth = parent.depth + n * self._pool.page_size
        upper = Node(node.namespace, parent, node.key[:cut], node.pages[:n], depth)
        upper.pins = 1 if node.pins else 0
        upper.last_used = node.last_used
        upper.children[node.key[cut : cut + self._page_bytes]] = node
        parent.children[node.key[: self._page_bytes]] = upper
        node.parent = upper
        node.key = node.key[cut:]
        node.pages = node.pages[n:]
        self._num_nodes += 1
        return upper

    def _cut(self, leaf: Node, n: int, why: Why) -> None:
        """Take up to ``n`` pages off the end of a leaf without locks, and the leaf if all."""
        parent = leaf.parent
        assert parent is not None
        keep = max(len(leaf.pages) - n, 0)
        dropped = leaf.pages[keep:]
        self._dropped(dropped, why)
        self._num_pages -= len(dropped)
        self._num_evictable -= len(dropped)
        self._pool.release(reversed(dropped))
        if not keep:
            del parent.children[leaf.key[: self._page_bytes]]
            self._num_nodes -= 1
        leaf.pages = leaf.pages[:keep]
        leaf.key = leaf.key[: keep * self._page_bytes]
        leaf.depth -= len(dropped) * self._pool.page_size
        if keep:
            return
        if parent.parent is None:
            self._forget_if_empty(parent)
        elif not parent.pins and not parent.children:
            self._push(parent)

    def _unpinned(self, node: Node) -> None:
        node.last_used = self._clock
        if not node.children:
            self._push(node)

    def _push(self, node: Node) -> None:
        self._num_pushes += 1
        heapq.heappush(self._candidates, (node.last_used, self._num_pushes, node))
        # Without eviction nothing pops the entries that no longer hold.
        if len(self._candidates) > 2 * self._num_nodes + 64:
            current = {
                node: (last_used, number, node)
                for last_used, number, node in self._candidates
                if node.last_used == last_used and self._is_candidate(node)
            }
            self._candidates = list(current.values())
            heapq.heapify(self._candidates)

    @staticmethod
    def _is_candidate(node: Node) -> bool:
        return bool(node.pages) and not node.children and not node.pins

    def _forget_if_empty(self, root: Node) -> None:
        if not root.children and not root.pins and self._roots.get(root.namespace) is root:
            del self._roots[root.namespace]


def _prove(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AccountingError(f"radix cache: {otherwise}")
