"""Placement: which process of several this one is, as torchrun tells it through the environment.

    RANK WORLD_SIZE MASTER_ADDR MASTER_PORT      (and TORCHELASTIC_USE_AGENT_STORE, torchrun's own)

The last rank serves; the others are its prefill ranks, and listen on MASTER_PORT + 1 + RANK of the
address by which MASTER_ADDR reaches them. They tell the last one through the store on
MASTER_ADDR:MASTER_PORT, which torchrun hosts, or rank 0 where ranks were started by hand. Nothing
that is secret goes there.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from headstart.engine.errors import ConfigError

logger = logging.getLogger(__name__)

MEETING_SECONDS = 600.0
"""How long the other ranks may take to load the model."""


@dataclass(frozen=True, slots=True)
class Placement:
    """``address``: where this rank listens; of the last one, nothing."""

    rank: int
    world_size: int
    address: str
    _store: Any

    @classmethod
    def from_environment(cls) -> Placement:
        """Raises ConfigError where a variable is missing or wrong, or the store cannot be met."""
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "--runahead env needs RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the "
                f"environment, as torchrun sets them: {error} is missing or no number"
            ) from error
        if not 0 <= rank < world or world < 2:
            raise ConfigError(f"RANK {rank} of WORLD_SIZE {world}: there is no chain of these")
        from headstart.engine.process.groups import meeting, own_address

        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = meeting(host, port, hosts, timedelta(seconds=MEETING_SECONDS))
            own = own_address(host)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"no store on {host} port {port}: {error}") from error
        return cls(rank, world, f"{own}:{port + 1 + rank}", store)

    @property
    def serves(self) -> bool:
        """Whether this is the rank that answers requests."""
        return self.rank == self.world_size - 1

    def publish(self) -> None:
        """Tell the last rank where this one listens."""
        try:
            self._store.set(f"headstart/{self.rank}", self.address)
        except RuntimeError as error:  # back after the store went: the address is the same
            logger.warning("the store cannot be reached any more (%s)", error)

    def others(self) -> list[str]:
        """Where the other ranks listen, in order. Raises ConfigError if they do not tell."""
        keys = [f"headstart/{rank}" for rank in range(self.world_size - 1)]
        try:
            self._store.wait(keys)
            return [self._store.get(key).decode() for key in keys]
        except RuntimeError as error:
            raise ConfigError(f"the other ranks did not say where they are: {error}") from error
