"""PagePool: which KV pages are free, and how many owners each of the others has.

Page ids only; the tensors belong to the backend. An owner is a sequence or the radix cache, and
holds one reference for each page it uses:

    page        0   1   2   3   4   5
    sequence a  x   x   .   .   .   .        a and b share pages 0 and 1, which the radix cache
    sequence b  x   x   x   .   .   .        keeps as well; page 4 is kept by the cache alone
    cache       x   x   .   .   x   .
    references  3   3   1   0   1   0        0: free
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headstart.engine.errors import HeadstartError


class OutOfPagesError(HeadstartError):
    """More pages were asked for than are free. The scheduler asks only for what is free."""


class AccountingError(RuntimeError):
    """The books of page ownership are wrong: a bug in headstart, whatever the request was."""


class PagePool:
    """Free list and reference counts of ``num_pages`` pages of ``page_size`` tokens each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"need at least one page of one token, got {num_pages}, {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.high_water = 0
        """Pages from here on have never been handed out: their memory is untouched."""
        self._references = [0] * num_pages
        # A stack: the page freed last is the one most likely still in a CPU cache.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, n: int) -> list[int]:
        """Take ``n`` free pages, each with one reference, which is the caller's.

        Raises OutOfPagesError, and takes none, if fewer are free.
        """
        if n > len(self._free):
            raise OutOfPagesError(f"{n} KV pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._references[page] = 1
        # Pages come in order of their ids until they come back.
        self.high_water = max(self.high_water, max(pages, default=-1) + 1)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add one reference to each page. Raises AccountingError for a free page."""
        for page in pages:
            if not self._references[page]:
                raise AccountingError(f"KV page {page} was retained while free")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Give up one reference to each page; a page without references is free again.

        Raises AccountingError for a page that is free already.
        """
        for page in pages:
            count = self._references[page]
            if not count:
                raise AccountingError(f"KV page {page} was freed twice")
            self._references[page] = count - 1
            if count == 1:
                self._free.append(page)

    def check(self, expected: Mapping[int, int]) -> None:
        """Prove that every page has just the references its owners hold.

        ``expected`` maps page to the number of owners, pages without one left out. Raises
        AccountingError for a leaked or missing reference and for a broken free list.
        """
        for page, count in enumerate(self._references):
            if count != expected.get(page, 0):
                raise AccountingError(
                    f"KV page {page} has {count} references, its owners hold "
                    f"{expected.get(page, 0)}"
                )
        free = {page for page, count in enumerate(self._references) if not count}
        if len(self._free) != len(free) or set(self._free) != free:
            raise AccountingError("the free list is not the set of pages without references")
