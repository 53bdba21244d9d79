"""Forming: links are opened among the ranks that are there, and it is found what such a chain pays.

engine   Form ─▶              own ends open                     from how many tokens on?
rank             ends open                    ◀─ Formed         (planner.py)
"""

from __future__ import annotations

import logging
import secrets
import time

import msgspec

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.runahead.costs import Chain
from headstart.engine.runahead.cuts import Plan
from headstart.engine.runahead.last_rank import LastRank
from headstart.engine.runahead.links import Receiver, Sender
from headstart.engine.runahead.membership import RESPAWN_SECONDS, Member, Membership
from headstart.engine.runahead.messages import Form, Formed, LinkEnd, Welcome
from headstart.engine.runahead.opening import OPENING_SECONDS, Ends
from headstart.engine.runahead.planner import Planning, Prompt

logger = logging.getLogger(__name__)

_UPSTREAM = "upstream"


class Formation:
    """A chain of these ranks and the engine, from when its links are asked for until they close.

    costs:     what is known of it, once it is formed
    receiver:  the end of the link from its last prefill rank, once it is formed
    least:     tokens of a prompt that runs ahead, once that is known
    renew_at:  when to form it anew, after a failure
    """

    def __init__(
        self,
        number: int,
        ranks: list[Member],
        last: LastRank,
        membership: Membership,
        now: float,
    ) -> None:
        self.ranks = ranks
        self.last = last
        self.membership = membership
        self.costs: Chain | None = None
        self.receiver: Receiver | None = None
        self.least: int | None = None
        self.renew_at: float | None = None
        self._number = number
        self._finding_least: Planning[int] | None = None
        self._forming = bool(ranks)
        self._late_at = now + OPENING_SECONDS + last.config.runahead_timeout
        self._formed: dict[Member, Formed] = {}
        origins: dict[str, LinkEnd] = {}
        upstream: LinkEnd | None = None
        behind: list[Welcome | LastRank] = [*(rank.welcome for rank in ranks[1:]), last]
        for rank, other in zip(ranks, behind, strict=False):
            here, there = self._link(rank.welcome, other)
            origin, own = self._link(rank.welcome, last)
            rank.send(Form(number, upstream, here, origin))
            origins[rank.name] = own
            upstream = there
        receives = {} if upstream is None else {_UPSTREAM: upstream}
        self._ends = Ends(origins, receives, last.memory, None)

    def _link(self, rank: Welcome, other: Welcome | LastRank) -> tuple[LinkEnd, LinkEnd]:
        """The ends of a link between them."""
        name = secrets.token_hex(16)
        auto = self.last.config.runahead_transport == "auto"
        if auto and rank.shares and other.shares:
            end = LinkEnd(name, "shared", path=f"{self.membership.folder}/{name}")
            return end, end
        between_gpus = rank.gpu and other.gpu and rank.gpu != other.gpu
        transport = "nccl" if auto and between_gpus else "gloo"
        there = LinkEnd(name, transport, host=rank.host, port=rank.store_port)
        return LinkEnd(name, transport), there

    def note(self, rank: Member, message: Formed) -> None:
        """It has opened its links, or could not."""
        if message.generation == self._number:
            self._formed[rank] = message

    def poll(self, now: float) -> None:
        """Take the links that are open, and what has come over them; begin once all is known."""
        if self._forming:
            self._connect(now)
        if self.receiver is not None:
            self.receiver.read()
        if self._finding_least is not None and self._finding_least.done():
            self._begin(self._finding_least.result())

    def _connect(self, now: float) -> None:
        silent = [rank for rank in self.ranks if rank not in self._formed]
        if silent and now > self._late_at:
            for rank in silent:
                self.membership.leave_out(rank, "it did not open its links")
        if silent or not self._ends.done:
            return
        self._forming = False
        errors = [f"{rank.name}: {said.error}" for rank, said in self._formed.items() if said.error]
        errors += [self._ends.error] if self._ends.error else []
        if errors:
            logger.warning("runahead: the chain could not be formed: %s", "; ".join(errors))
            self.close()
            self.renew_at = now + RESPAWN_SECONDS
            return
        receiver: Receiver = self._ends.get(_UPSTREAM)
        links = [self._formed[rank].costs for rank in self.ranks[1:]]
        last = self.last
        self.receiver = receiver
        self.costs = Chain(
            layers=last.loaded.config.num_layers,
            token_bytes=last.memory.pages.shape[2] // last.page_size,
            ranks=self._paced(),
            links=(*(link for link in links if link is not None), receiver.costs),
            back=receiver.costs,
        )
        if last.config.runahead_min is None:
            longest = last.loaded.max_model_len
            self._finding_least = self.last.planner.pays_from(self.costs, longest)
        else:
            self._begin(last.config.runahead_min)

    def _begin(self, least: int) -> None:
        """Let prompts run ahead."""
        self._finding_least, self.least = None, least
        logger.info(
            "runahead: a chain of %d, for prompts of %d tokens or more that are not cached",
            len(self.ranks) + 1,
            least,
        )

    def _paced(self) -> tuple[PrefillCosts, ...]:
        """What chunks cost each rank, by what they have cost lately."""
        ranks = [rank.welcome.costs.times(rank.pace) for rank in self.ranks]
        return (*ranks, self.last.costs.times(self.last.pace))

    def learn(self) -> None:
        """Its ranks' paces are known better."""
        if self.costs is not None:
            self.costs = msgspec.structs.replace(self.costs, ranks=self._paced())

    def origin(self, rank: Member) -> Sender:
        """The link from the engine to a rank, of a chain that is formed."""
        sender: Sender = self._ends.get(rank.name)
        return sender

    def plan(self, prompt: Prompt) -> Planning[Plan]:
        """Where to cut it, of a chain that is formed."""
        assert self.costs is not None
        return self.last.planner.plan(self.costs, prompt)

    def renew(self) -> None:
        """Its links are not what they were; new ones are quickly made."""
        self.renew_at = self.renew_at or time.perf_counter()

    def close(self) -> None:
        """No prompt runs ahead over it any more."""
        self.costs = self.receiver = self.least = None
        self._forming = False
        if self._finding_least is not None:
            self._finding_least.cancel()
            self._finding_least = None
        self._ends.close()

    def join(self, timeout: float) -> None:
        """Wait until its links are closed, for so many seconds each at most."""
        self._ends.join(timeout)
