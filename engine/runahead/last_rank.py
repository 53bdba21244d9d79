"""LastRank: the engine as the last rank of its chain: what it has, and what others read of it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path

import msgspec

from headstart.engine.config import EngineConfig
from headstart.engine.costs.model import step_table
from headstart.engine.kv.pool import PagePool
from headstart.engine.models.loading import LoadedModel
from headstart.engine.runahead.cuts import CutTable
from headstart.engine.runahead.links import Pool, Sender
from headstart.engine.runahead.measure import about_prefill, identity
from headstart.engine.runahead.part import Part
from headstart.engine.runahead.planner import Planner
from headstart.engine.runahead.rank import RankConfig
from headstart.engine.sequence import Sequence


class LastRank:
    """``pool`` counts the references to its pages. ``costs``: of chunks, as measured when nothing
    was kept in them yet; ``pace``: seconds that they take for each of those, see Member."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, pool: PagePool) -> None:
        self.config = config
        self.loaded = loaded
        self.page_size = loaded.backend.page_size
        self.memory = Pool.of(loaded.runner)
        self.shares = self.memory.memory is not None  # as in a Welcome
        self.gpu = self.memory.gpu
        self.identity = identity(loaded)
        self.costs = step_table(loaded, config.machine_folder).prefill
        self.pace = 1.0
        links = {"transport": config.runahead_transport, "hosts": list(config.runahead_hosts)}
        self._about = about_prefill(loaded, self.identity) | links  # what searched cuts depend on
        table = CutTable.load(config.machine_folder, self._about)
        always = config.runahead_min is not None
        self.planner = Planner(config.runahead_cuts, always, self.page_size, self.costs, table)
        self._pool = pool
        self._lent: list[Part] = []

    def neighbour(self, address: str, secret: str, gpu: int) -> RankConfig:
        """Of a rank on this machine: as the engine, with a share of its KV memory."""
        loaded, config = self.loaded, self.config
        sequence = -(-loaded.max_model_len // self.page_size)
        pages = max(loaded.runner.num_pages // (2 * (config.runahead - 1)), sequence)
        engine = msgspec.structs.replace(
            config,
            weights=loaded.weights,
            # A GPU of its own has memory of its own.
            kv_memory=config.kv_memory if self.gpu else pages * self.memory.page_bytes,
            max_model_len=loaded.max_model_len,
            threads=loaded.threads,
            adapters={},
            runahead=1,
            runahead_hosts=[],
            runahead_secret=None,
        )
        transport = config.runahead_transport
        return RankConfig(
            engine=engine, listen=address, secret=secret, transport=transport, gpu=gpu
        )

    def tuned(self, bounds: Items[int]) -> Path | None:
        """Keep these cuts as the best of their length; the folder they are kept in."""
        table = self.planner.table = self.planner.table.with_cuts(bounds)
        table.save(self.config.machine_folder, self._about)
        return self.config.machine_folder

    def lend(self, job: int, seq: Sequence, sender: Sender, start: int, end: int) -> Part:
        """Have KV of tokens ``[start, end)`` sent, whose pages stay as they are until nobody reads
        them any more."""
        part = Part(job, seq, self.loaded.runner)
        part.send(sender, start, end)
        self._pool.retain(part.sent)
        self._lent.append(part)
        return part

    def take_back(self) -> None:
        """Free the pages that nobody reads any more."""
        for part in [part for part in self._lent if part.released]:
            self._lent.remove(part)
            self._pool.release(part.sent)

    @property
    def pages_lent(self) -> list[int]:
        """To which it holds a reference, once for each."""
        return [page for part in self._lent for page in part.sent]
