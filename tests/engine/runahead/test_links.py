"""Links: pages of one pool arrive in another, byte for byte, whatever happens at the two ends."""

from __future__ import annotations

import itertools
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.engine.process import groups as process_groups
from headstart.engine.process.groups import Store, gloo_group
from headstart.engine.runahead import group_links
from headstart.engine.runahead.group_links import GroupSender
from headstart.engine.runahead.links import Pool, readable
from headstart.engine.runahead.messages import LinkEnd
from headstart.engine.runahead.opening import Opening
from headstart.engine.runahead.shared_links import SharedSender
from headstart.kernels.memory import SharedMemory

pytestmark = pytest.mark.covering

LAYERS, PAGES, PAGE_BYTES = 3, 24, 64
SECONDS = 120.0
"""A deadline, for what takes milliseconds."""


def make_pool(seed: int, num_pages: int = PAGES, page_bytes: int = PAGE_BYTES) -> Pool:
    memory = SharedMemory(LAYERS * num_pages * page_bytes)
    pages = torch.frombuffer(memory.buffer, dtype=torch.uint8).view(LAYERS, num_pages, page_bytes)
    generator = torch.Generator().manual_seed(seed)
    pages.copy_(torch.randint(256, pages.shape, dtype=torch.uint8, generator=generator))
    return Pool(pages, memory)


@pytest.fixture(scope="module", autouse=True)
def nccl() -> Iterator[None]:
    """What NCCL carries from GPU to GPU, another Gloo group carries from pool to pool here."""

    def stand_in(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return gloo_group(store, rank, size, "127.0.0.1", timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_groups, "nccl_group", stand_in)
        yield


def until(holds: Callable[[], Any], otherwise: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.001)


class Link:
    """A sender's pool, a receiver's with other contents, and the link between them."""

    def __init__(self, transport: str, folder: Path, name: str, timeout: float = SECONDS) -> None:
        self.theirs, self.own = make_pool(1), make_pool(2)
        self.store = Store("127.0.0.1")
        here = there = LinkEnd(name, transport, path=str(folder / name))
        if transport != "shared":
            there = LinkEnd(name, transport, host=self.store.host, port=self.store.port)
        openings = [
            Opening(True, here, self.theirs, self.store, timeout),
            Opening(False, there, self.own, None, timeout),
        ]
        until(lambda: all(opening.done for opening in openings), "not open")
        assert [opening.error for opening in openings] == [None, None]
        self.sender, self.receiver = (opening.end for opening in openings)

    def begin(self, job: int, of: list[int], to: list[int]) -> None:
        self.sender.offer(job, of)
        self.receiver.expect(job, to)

    def pass_on(self, job: int, layer: int) -> None:
        until(lambda: self.sender.send(job, layer), "not sent")
        self.wait_for(job, layer)

    def wait_for(self, job: int, layer: int) -> None:
        until(lambda: self.receiver.arrived(job, layer), "not arrived")

    def wait_until_taken(self, job: int) -> None:
        until(lambda: self.sender.taken(job), "not taken")

    def pass_all(self, job: int) -> None:
        for layer in range(LAYERS):
            self.pass_on(job, layer)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        for end in (self.sender, self.receiver):
            end.join(SECONDS)


@pytest.fixture(params=["shared", "gloo", "nccl"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


MakeLink = Callable[..., Link]


@pytest.fixture
def make_link(transport: str, tmp_path: Path) -> Iterator[MakeLink]:
    made: list[Link] = []

    def make(**options: Any) -> Link:
        made.append(Link(transport, tmp_path, f"link-{len(made)}", **options))
        return made[-1]

    yield make
    for link in made:
        link.close()


@pytest.fixture
def link(make_link: MakeLink) -> Link:
    return make_link()


def test_pages_arrive_byte_for_byte_and_no_others_change(link: Link) -> None:
    of, to = [5, 6, 7, 2, 9, 0, 1], [1, 2, 3, 4, 20, 21, 10]
    expected = link.own.pages.clone()
    link.begin(1, of, to)
    for layer in range(LAYERS):
        assert not link.receiver.arrived(1, layer)
        link.pass_on(1, layer)
        expected[layer, to] = link.theirs.pages[layer, of]
        assert torch.equal(link.own.pages, expected)
    assert link.receiver.arrived(1, 0)
    link.wait_until_taken(1)
    assert (link.sender.error, link.receiver.error) == (None, None)


def test_what_is_sent_before_it_is_expected_waits(link: Link) -> None:
    link.sender.offer(1, [3, 4])
    for layer in range(LAYERS):
        assert link.sender.send(1, layer)
    readable([link.receiver], SECONDS)
    link.receiver.read()
    link.receiver.expect(1, [8, 6])
    for layer in range(LAYERS):
        link.wait_for(1, layer)
    assert torch.equal(link.own.pages[:, [8, 6]], link.theirs.pages[:, [3, 4]])


def test_the_descriptor_says_when_something_comes(link: Link) -> None:
    """Whoever sleeps on it wakes up: for as long as a test may take it would wait otherwise."""
    link.begin(1, [1], [1])
    link.pass_on(1, 0)
    link.receiver.read()
    poller = select.poll()
    poller.register(link.receiver, select.POLLIN)
    assert not poller.poll(50), "it has been read"
    timer = threading.Timer(0.05, lambda: link.sender.send(1, 1))
    timer.start()
    readable([link.receiver], 3600.0)
    timer.join()
    link.wait_for(1, 1)


def test_pages_that_are_taken_may_change(link: Link) -> None:
    """Shared memory copies when the receiver asks: they must not be taken before."""
    sent = link.theirs.pages.clone()
    link.begin(1, [3, 4], [8, 6])
    for layer in range(LAYERS):
        assert link.sender.send(1, layer)
        if link.sender.taken(1):
            link.theirs.pages[layer, [3, 4]] = 0
    for layer in range(LAYERS):
        link.wait_for(1, layer)
        assert torch.equal(link.own.pages[layer, [8, 6]], sent[layer, [3, 4]])
    link.wait_until_taken(1)


@pytest.mark.parametrize("layers", range(LAYERS + 1))
@pytest.mark.parametrize("end", ["sender", "receiver", "both"])
def test_a_dropped_job_frees_its_pages_and_leaves_others_alone(
    link: Link, end: str, layers: int
) -> None:
    link.begin(1, [3, 4], [8, 6])
    link.begin(2, [5], [7])
    for layer in range(layers):
        link.pass_on(1, layer)
    link.pass_on(2, 0)
    kept = link.own.pages.clone()
    if end != "receiver":
        link.sender.drop(1)
    if end != "sender":
        link.receiver.drop(1)

    def taken() -> bool:
        link.receiver.read()
        return bool(link.sender.taken(1))

    until(taken, "not taken")
    for layer in range(1, LAYERS):
        link.pass_on(2, layer)
        kept[layer, 7] = link.theirs.pages[layer, 5]
    assert torch.equal(link.own.pages, kept)
    link.begin(3, [4, 3], [8, 6])
    link.pass_all(3)
    assert torch.equal(link.own.pages[:, [8, 6]], link.theirs.pages[:, [4, 3]])


def test_a_job_dropped_by_the_receiver_before_it_is_offered(link: Link) -> None:
    link.receiver.expect(1, [8])
    link.receiver.drop(1)
    link.receiver.drop(2)  # never expected
    before = link.own.pages.clone()
    for job in (1, 2):
        link.sender.offer(job, [3])
        for layer in range(LAYERS):
            assert link.sender.send(job, layer)
    link.begin(3, [5], [7])
    link.pass_all(3)
    for job in (1, 2):
        link.wait_until_taken(job)
    before[:, 7] = link.theirs.pages[:, 5]
    assert torch.equal(link.own.pages, before)


@pytest.mark.parametrize("count", [1, 3])
def test_other_pages_than_expected_are_an_error(link: Link, count: int) -> None:
    before = link.own.pages.clone()
    link.begin(1, [3, 4], list(range(count)))
    link.sender.send(1, 0)
    until(lambda: link.receiver.arrived(1, 0) or link.receiver.error, "no error")
    assert "not what was expected" in link.receiver.error
    assert not link.receiver.arrived(1, 0)
    assert torch.equal(link.own.pages, before)


@pytest.mark.parametrize("layers", range(LAYERS))
def test_an_end_notices_that_the_other_one_has_closed(link: Link, layers: int) -> None:
    link.begin(1, [3, 4], [8, 6])
    for layer in range(layers):
        link.pass_on(1, layer)
    link.sender.close()
    until(lambda: link.receiver.arrived(1, layers) or link.receiver.error, "no error")
    assert not link.receiver.arrived(1, layers)
    assert link.receiver.error
    link.receiver.drop(1)


def test_a_sender_notices_that_the_receiver_has_closed(link: Link) -> None:
    link.begin(1, [3, 4], [8, 6])
    link.pass_on(1, 0)
    link.receiver.close()
    if link.receiver.fileno() >= 0:  # gloo's goes on to take what comes, for the other's goodbye
        link.sender.close()
        link.sender.join(SECONDS)
        link.receiver.join(SECONDS)
    else:
        until(lambda: not link.sender.send(1, 1) or link.sender.error, "no error")
    link.wait_until_taken(1)
    link.sender.drop(1)


def test_a_closed_sender_keeps_its_pages_until_the_receiver_is_gone(link: Link) -> None:
    """Which may be copying at that very moment, whatever the sender does afterwards."""
    sent = link.theirs.pages.clone()
    link.begin(1, [3, 4], [8, 6])
    assert link.sender.send(1, 0)
    link.sender.close()
    link.sender.drop(1)
    if isinstance(link.sender, SharedSender):
        assert not link.sender.taken(1)
    link.receiver.close()
    link.wait_until_taken(1)
    assert torch.equal(link.theirs.pages, sent)


def test_what_has_arrived_may_wait_long(
    make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver may be busy with another prompt for longer than any patience of the link's."""
    monkeypatch.setattr(group_links, "STAGED_BYTES", 3 * PAGE_BYTES)
    link = make_link(timeout=1.0)
    jobs = range(1, 7)
    waiting = [(job, layer) for job in jobs for layer in range(LAYERS)]
    for job in jobs:
        link.begin(job, [job, job + 7], [2 * job, 2 * job + 1])
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        if waiting and link.sender.send(*waiting[0]):
            del waiting[0]
        time.sleep(0.005)
    if isinstance(link.sender, GroupSender):
        assert waiting, "no limit to what is under way"
    for job in jobs:
        for layer in range(LAYERS):

            def arrived(job: int = job, layer: int = layer) -> bool:
                while waiting and link.sender.send(*waiting[0]):
                    del waiting[0]
                assert not link.receiver.error
                return bool(link.receiver.arrived(job, layer))

            until(arrived, "not arrived")
        assert torch.equal(
            link.own.pages[:, [2 * job, 2 * job + 1]], link.theirs.pages[:, [job, job + 7]]
        )
    assert (link.sender.error, link.receiver.error) == (None, None)


def test_a_closed_receiver_that_is_full_hears_the_goodbye(
    make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_links, "STAGED_BYTES", PAGE_BYTES)
    link = make_link()
    for job in range(1, 5):
        link.begin(job, [1, 2], [1, 2])
        link.sender.send(job, 0)
    time.sleep(0.05)
    link.receiver.close()
    link.sender.close()
    for end in (link.sender, link.receiver):
        end.join(3600.0)  # for as long as a test may take


def test_an_end_that_never_comes_is_an_error(transport: str, tmp_path: Path) -> None:
    store = Store("127.0.0.1")
    here = LinkEnd("a", transport, path=str(tmp_path / "a"))
    there = LinkEnd("b", transport, path=str(tmp_path / "b"), host=store.host, port=store.port)
    openings = [
        Opening(True, here, make_pool(1), store, 0.3),
        Opening(False, there, make_pool(2), None, 0.3),
    ]
    until(lambda: all(opening.done for opening in openings), "hangs")
    assert all(opening.error and opening.end is None for opening in openings)


def test_what_is_closed_while_it_opens_stays_closed(transport: str, tmp_path: Path) -> None:
    store = Store("127.0.0.1")
    here = there = LinkEnd("a", transport, path=str(tmp_path / "a"))
    if transport != "shared":
        there = LinkEnd("a", transport, host=store.host, port=store.port)
    sender = Opening(True, here, make_pool(1), store, SECONDS)
    sender.close()
    receiver = Opening(False, there, make_pool(2), None, SECONDS)
    until(lambda: sender.done and receiver.done, "hangs")
    if receiver.end is not None:
        receiver.end.expect(1, [0])
        until(lambda: receiver.end.arrived(1, 0) or receiver.end.error, "no error")
        assert receiver.end.error
        receiver.close()
    for opening in (sender, receiver):
        if opening.end is not None:
            opening.end.join(SECONDS)


@pytest.mark.parametrize("first", [b"", b"\x00", msgspec.msgpack.encode({"shape": (1, 2, 3)})])
def test_a_stranger_at_a_shared_link_is_an_error(tmp_path: Path, first: bytes) -> None:
    path = str(tmp_path / "a")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        opening = Opening(False, LinkEnd("a", "shared", path=path), make_pool(1), None, SECONDS)
        connection = listener.accept()[0]
        if first:
            connection.send(first)
        connection.close()
        until(lambda: opening.done, "hangs")
        assert opening.end is None
        assert opening.error


# --------------------------------------------------------------------------- random use


@pytest.fixture(scope="module", params=["shared", "gloo", "nccl"])
def lasting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Link]:
    link = Link(request.param, tmp_path_factory.mktemp("links"), "lasting")
    yield link
    link.close()


JOBS = itertools.count(1)
PAGE = st.integers(0, PAGES - 1)
DEEDS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["send", "send", "ask", "ask", "drop", "leave"])),
    max_size=40,
)


@given(
    of=st.lists(PAGE, min_size=8, max_size=8, unique=True),
    to=st.lists(PAGE, min_size=8, max_size=8, unique=True),
    deeds=DEEDS,
)
@settings(max_examples=3 * settings.default.max_examples // 5, deadline=None)
def test_random_use(lasting: Link, of: list[int], to: list[int], deeds: list[Any]) -> None:
    """Four jobs of two pages, sent and dropped in any order. Pages change as soon as they may."""
    link, first = lasting, next(JOBS) * 10
    sent, expected = link.theirs.pages.clone(), link.own.pages.clone()
    num_sent, num_arrived = [0] * 4, [0] * 4
    dropped: set[int] = set()  # by the sender
    left: set[int] = set()  # by the receiver
    for i in range(4):
        link.begin(first + i, of[2 * i : 2 * i + 2], to[2 * i : 2 * i + 2])

    def send(i: int) -> None:
        if num_sent[i] < LAYERS and i not in dropped and link.sender.send(first + i, num_sent[i]):
            num_sent[i] += 1
        done = num_sent[i] == LAYERS or i in dropped
        if done and link.sender.taken(first + i):
            link.theirs.pages[:, of[2 * i : 2 * i + 2]] += 1

    def ask(i: int) -> None:
        layer = num_arrived[i]
        if layer < LAYERS and i not in left and link.receiver.arrived(first + i, layer):
            assert layer < num_sent[i]
            pages = slice(2 * i, 2 * i + 2)
            expected[layer, to[pages]] = sent[layer, of[pages]]
            num_arrived[i] += 1
        assert torch.equal(link.own.pages, expected)

    for i, deed in deeds:
        if deed == "send":
            send(i)
        elif deed == "ask":
            ask(i)
        elif deed == "drop" and i not in dropped:
            link.sender.drop(first + i)
            dropped.add(i)
        elif deed == "leave" and i not in left:
            link.receiver.drop(first + i)
            left.add(i)

    def done() -> bool:
        for i in range(4):
            send(i)
            ask(i)
        link.receiver.read()
        return all(
            (i in dropped or i in left or num_arrived[i] == LAYERS)
            and (i in dropped or num_sent[i] == LAYERS)
            and link.sender.taken(first + i)
            for i in range(4)
        )

    until(done, "does not end")
    for i in range(4):
        link.receiver.drop(first + i)
    assert (link.sender.error, link.receiver.error) == (None, None)
