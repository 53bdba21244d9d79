"""Engine: token ids in, token ids out. ``step()`` is the verbs of the whole design.

schedule -> plan shared prefixes -> build_batch -> run -> fill masks -> sample -> commit

Where steps overlap, the last verb is a step late: a step is scheduled and launched while the one
before is computed, and then the tokens of that one are waited for and committed.

    host      launch 1 │ launch 2, commit 1 │ launch 3, commit 2 │ ...          one call of step()
    device    ... step 1 ......... step 2 ............. step 3 ......           each
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future, wait
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from torch import Tensor

from headstart import __version__
from headstart.engine.batch import Batch, InFlight, Read, SharedRange, build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.costs.attention import load_costs
from headstart.engine.costs.forecast import Forecast, forecast
from headstart.engine.costs.model import keep_table, step_table
from headstart.engine.costs.record import StepRecord
from headstart.engine.costs.steps import StepCosts
from headstart.engine.errors import ConfigError, RequestError
from headstart.engine.explain import Explainer
from headstart.engine.kv.history import History, Namespace
from headstart.engine.kv.pages_ahead import PagesAhead
from headstart.engine.kv.pool import PagePool
from headstart.engine.kv.tree import RadixCache
from headstart.engine.models.config import declared_pooling
from headstart.engine.models.decoder import Decoder
from headstart.engine.models.loading import load_model
from headstart.engine.models.reading import Pooled, PromptScores, Reading
from headstart.engine.models.runner import warm_up
from headstart.engine.process.cores import usable_cores
from headstart.engine.process.groups import check_gpus
from headstart.engine.process.messages import (
    AdapterInfo,
    Explanation,
    ModelInfo,
    Output,
    QueueAhead,
    RelayStats,
    RunaheadStats,
    Stats,
    Times,
    TokenLogprobs,
)
from headstart.engine.progress import PromptProgress
from headstart.engine.ranges.guard import RelayGuard
from headstart.engine.ranges.segments import Segments, Span
from headstart.engine.ranges.shared import MODES, Relay, RelayPlan
from headstart.engine.runahead.chain import Chain
from headstart.engine.sampling.device import DeviceSampler
from headstart.engine.sampling.grammar import RUN_SECONDS, Grammar, Grammars, Masks
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.engine.sampling.sampler import Sampled, Sampler, Sampling
from headstart.engine.schedule.scheduler import (
    NOTHING,
    NewToken,
    Scheduler,
    SchedulerOutput,
)
from headstart.engine.schedule.turns import OLDEST_EVERY, Pace
from headstart.engine.sequence import (
    Adapter,
    FinishReason,
    ScheduledSequence,
    Sequence,
    Status,
)
from headstart.engine.timeline import Timeline
from headstart.engine.work import LongChunk, Work

logger = logging.getLogger(__name__)

LEAST_TILE = 32
"""Rows of a tile of a long chunk, at least."""

WAIT_SECONDS = 0.002
"""How long a step without anything to compute waits for KV of other processes."""

ASYNC_MODES = ("auto", "on", "off")
"""auto: where the backend computes beside the host."""

POLICIES = ("fcfs", "priority")
"""By arrival, or by the priority of requests and then by arrival."""


class Launched(NamedTuple):
    """A step that is being computed. ``begun``, ``computed``: moments of ``time.monotonic``. Where
    a device computes beside the host, the latter is None: it is when the tokens are there."""

    scheduled: SchedulerOutput
    sampling: Sampling
    begun: float
    computed: float | None
    failed: dict[Sequence, str]  # whose grammars cannot be followed any further, and why
    books: list[Callable[[], None]]  # each waits for what was read of a prompt, and books it

    @property
    def sequences(self) -> list[Sequence]:
        """Those that get a token."""
        return [entry.seq for entry in self.scheduled.scheduled if entry.samples]

    def tokens(self, sampled: Items[Sampled]) -> list[int | FinishReason | None]:
        """Theirs, for ``Scheduler.commit``."""
        return [
            FinishReason.GRAMMAR if token_id is not None and seq in self.failed else token_id
            for seq, (token_id, _) in zip(self.sequences, sampled, strict=True)
        ]


class Round(NamedTuple):
    """What a step leaves to do beside it, until the next one begins.

    beside:          whose work goes on, for so many seconds each
    tokens_left:     of the budget of a step, where steps are no time
    idle:            nothing is in the step itself
    prompt_seconds:  that its chunks of prompts take, as predicted
    seconds:         that it took
    """

    beside: Items[tuple[Sequence, float]]
    tokens_left: int
    idle: bool
    prompt_seconds: float
    seconds: float


class Engine:
    """One model with its scheduler and KV pool. Not thread-safe: one thread calls it.

    Raises HeadstartError subclasses, each one line, when the model or a setting cannot work.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.relay not in MODES:
            raise ConfigError(f"--relay must be {', '.join(MODES)}; got {config.relay}")
        if config.scheduling_policy not in POLICIES:
            raise ConfigError(
                f"--scheduling-policy must be {', '.join(POLICIES)}; got {config.scheduling_policy}"
            )
        if config.async_scheduling not in ASYNC_MODES:
            raise ConfigError(
                f"--async-scheduling must be {', '.join(ASYNC_MODES)}; got "
                f"{config.async_scheduling}"
            )
        if config.async_scheduling == "on" and config.tensor_parallel > 1:
            raise ConfigError("--async-scheduling on and --tensor-parallel cannot be combined")
        loaded = load_model(config)
        model, backend, folder = loaded.config, loaded.backend, loaded.folder
        max_model_len, shape = loaded.max_model_len, loaded.runner.decoder.shape
        num_pages = loaded.runner.num_pages
        self._policy = config.scheduling_policy
        self._runner = loaded.runner
        self._page_size = backend.page_size
        self._page_bytes = backend.kv_bytes_per_page(shape, model.num_layers)
        self._pool = PagePool(num_pages, backend.page_size)
        history = History()
        self._cache = RadixCache(self._pool, history.evicted)
        self.runahead: Chain | None = None
        self._relay = Relay(
            config.relay if config.prefix_caching else "off",
            backend.page_size,
            backend.range_step,
            lambda: load_costs(backend, shape, config.machine_folder),
        )
        # Before anything is kept in the pages that this writes to.
        costs: StepCosts | None = None
        if config.step_time > 0:
            table = step_table(loaded, config.machine_folder, self._relay.costs)
            costs = StepCosts(table, self._relay.costs, model.num_layers)
        # A device computes beside the host: how long its steps take is not seen here.
        paced = costs is not None and not backend.asynchronous
        self._keep_table = partial(keep_table, loaded, config.machine_folder)
        self._step_time = config.step_time
        self._record, self._paced = StepRecord(costs, follows=paced), paced
        self._scheduler = Scheduler(
            self._pool,
            self._cache,
            max_batched_tokens=loaded.max_batched_tokens,
            max_running=loaded.max_running,
            max_model_len=max_model_len,
            eos_token_ids=model.eos_token_ids,
            prefix_caching=config.prefix_caching,
            runs_ahead=self._runs_ahead,
            pace=Pace(config.step_time, costs, model.num_layers) if costs and paced else None,
            history=history,
        )
        self._explainer = Explainer(
            self._scheduler, history, backend.page_size, prefix_caching=config.prefix_caching
        )
        self._guard = RelayGuard(self._relay, self._runner, loaded.weights, config.relay_check)
        self._relayed = RelayStats()
        self._folder = folder
        # The tokens of a step in flight are known to rank 0's device alone.
        alone = config.tensor_parallel == 1
        overlaps = {"auto": backend.asynchronous and alone, "on": True, "off": False}
        self._overlaps = overlaps[config.async_scheduling]
        self._sampler: Sampler | DeviceSampler = (
            DeviceSampler(model.vocab_size, model.eos_token_ids)
            if self._overlaps or backend.asynchronous
            else Sampler(model.vocab_size, model.eos_token_ids, backend)
        )
        threads = loaded.threads * max(config.tensor_parallel, config.runahead)
        self._grammars = Grammars(
            folder,
            model.vocab_size,
            model.eos_token_ids,
            # A device's pass is only launched by the time the masks are filled.
            spare_core=not backend.asynchronous and threads < usable_cores(),
        )
        self._compiling: dict[int, tuple[Sequence, Future[Grammar]]] = {}
        self._refused: list[tuple[int, RequestError]] = []
        self._progress = PromptProgress()
        self._in_flight: Launched | None = None  # only where steps overlap
        logger.info("steps overlap: %s", "yes" if self._overlaps else "no")
        self._pages_ahead = PagesAhead(self._runner, self._pool, self._page_bytes)
        self._beside: dict[Sequence, Work] = {}
        self._round = Round((), 0, True, 0.0, 0.0)
        self._max_batched_tokens = loaded.max_batched_tokens
        self._adapters = loaded.adapters(config.max_adapters)
        self._causal = model.causal
        self._steps = 0
        self._step_seconds = 0.0
        self._forced_tokens = 0
        self.model = ModelInfo(
            max_model_len=max_model_len,
            trained_context=model.max_position_embeddings,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            page_size=backend.page_size,
            num_pages=num_pages,
            max_running=loaded.max_running,
            threads=loaded.threads,
            processes=config.tensor_parallel,
            kv_bytes=num_pages * self._page_bytes * config.tensor_parallel,
            eos_token_ids=list(model.eos_token_ids),
            backend=loaded.device,
            weights=loaded.weights,
            weights_reason=loaded.weights_reason,
            version=__version__,
            segment_mask=model.segment_mask,
            pooling=declared_pooling(folder),
            no_text=_no_text(loaded.runner.decoder),
            adapters=[self.load_adapter(*entry) for entry in config.adapters.items()],
        )

        # Last, since it is to be closed.
        if config.runahead > 1 or config.runahead_hosts:
            if backend.free_memory() is not None:  # a device's own
                check_gpus(f"--runahead {config.runahead}", config.runahead)
            self.runahead = Chain(config, loaded, self._pool)

    def _runs_ahead(self, seq: Sequence, start: int, num_ahead: int) -> bool:
        if self.runahead is None or seq.reading is not None or not seq.generates:
            return False
        return self.runahead.wants(seq, start, num_ahead)

    def warm_up(self) -> None:
        """Have ready what the first requests would wait for: weights, kernels, RelayAttention."""
        warm_up(self._runner)
        self._check_relay()
        self.model = msgspec.structs.replace(self.model, relay=self._relay.mode)

    def _check_relay(self) -> None:
        if self._relay.mode == "off":
            return
        self._guard.at_start(self._folder)
        if self._relay.mode == "off":
            return
        pays = self._relay.break_even(2048)
        logger.info(
            "relay: %s; 2048 shared tokens are read once %s",
            self._relay.mode,
            f"from {pays} sequences on" if pays else "at no batch size, by predicted time",
        )

    def forecast(self, *, prefix: int, batch: int, suffix: int, measure: bool) -> Forecast:
        """Predicted times of a decoding step, relay and plain; only while nothing runs."""
        return forecast(
            self._runner, self._relay, prefix=prefix, batch=batch, suffix=suffix, measure=measure
        )

    def prepare_memory(self) -> bool:
        """Make the next slice of untouched KV memory ready; False if enough of it is."""
        return self._pages_ahead.prepare()

    @property
    def decoder(self) -> Decoder:
        """The model, for measurements."""
        return self._runner.decoder

    @property
    def step_costs(self) -> StepCosts | None:
        """What is known of the seconds of steps, for measurements; None where nothing is."""
        return self._record.costs

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None or bool(self._compiling)

    def add(
        self,
        request_id: int,
        token_ids: array[int],
        params: SamplingParams | PoolingParams,
        *,
        salt: bytes = b"",
        segments: Iterable[Span] = (),
        adapter: str | None = None,
        priority: int = 0,
        owner: bytes = b"",
    ) -> None:
        """Queue a request. Raises RequestError if it can never run. One whose grammar proves to be
        wrong or too much, or that can't run for its length, after that is among ``take_refused``.

        ``salt``: KV is shared only among requests of equal salt. ``segments``: spans of the prompt
        whose tokens see each other whole. ``adapter``: the name of a loaded one. ``priority``:
        lower ones come first; 0 unless the scheduling policy says so. ``owner``: only who has the
        same, and the same salt, may be told of this prompt.
        """
        if priority and self._policy != "priority":
            raise RequestError(
                f"priority is {priority}, and this server goes by arrival "
                "(--scheduling-policy fcfs)",
                "priority",
            )
        reading: Reading | None = None
        whole = [] if self._causal else [(0, len(token_ids))]
        if isinstance(params, PoolingParams):
            reading = Pooled(params.pooling, len(token_ids))
            params = SamplingParams(max_tokens=0)
        elif self.model.no_text is not None:
            raise RequestError(f"the model does not generate text: {self.model.no_text}", "model")
        elif params.prompt_logprobs is not None:
            reading = PromptScores(token_ids, params.prompt_logprobs)
        params.validate(self.model.vocab_size)
        self._check_there_is_a_choice(params)
        self._check_vocabulary(token_ids)
        chosen = None if adapter is None else self._adapters.get(adapter)
        mask = Segments.of(whole or segments, len(token_ids))
        seq = Sequence(
            request_id,
            token_ids,
            len(token_ids),
            params,
            namespace=_namespace(salt, mask, chosen),
            segments=mask,
            adapter=chosen,
            reading=reading,
            priority=priority,
            timeline=Timeline(self._ahead()),
            owner=owner,
        )
        if params.grammar is None:
            self._scheduler.add(seq)
        else:
            self._compiling[request_id] = seq, self._grammars.compile(params.grammar)
        if params.prompt_progress:
            self._progress.add(seq)
        if params.cache_explain:
            self._explainer.add(seq)

    def _ahead(self) -> QueueAhead:
        """What a request that comes now finds here."""
        scheduler = self._scheduler
        return QueueAhead(
            scheduler.num_running,
            scheduler.num_waiting + len(self._compiling),
            scheduler.num_prompt_tokens_left,
        )

    def take_refused(self) -> list[tuple[int, RequestError]]:
        """Ids of requests that turned out to be wrong since the last call, and what is."""
        refused, self._refused = self._refused, []
        for request_id, _ in refused:
            self._forget([request_id])
        return refused

    def _forget(self, request_ids: list[int]) -> None:
        """They want to be told nothing any more."""
        self._progress.forget(request_ids)
        self._explainer.forget(request_ids)

    def _add_compiled(self) -> None:
        """Queue the requests whose grammars are compiled; wait a little if there is nothing else
        to do."""
        if not self._scheduler.has_work and self._in_flight is None:
            wait([future for _, future in self._compiling.values()], WAIT_SECONDS)
        for request_id, (seq, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[request_id]
            try:
                seq.constraint = future.result().begin()
                if seq.timeline is not None:
                    seq.timeline.compiled()
                self._scheduler.add(seq)
            except RequestError as error:
                self._refused.append((request_id, error))

    def _check_there_is_a_choice(self, params: SamplingParams) -> None:
        if not params.min_tokens or params.allowed_token_ids is None:
            return
        eos = self.model.eos_token_ids
        if all(params.is_end(token_id, eos) for token_id in params.allowed_token_ids):
            raise RequestError(
                "allowed_token_ids has only tokens that end the answer, which min_tokens forbids",
                "allowed_token_ids",
            )

    def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the LoRA adapter in folder ``path``, for requests that ask for ``name``.

        Raises RequestError if the name is taken or there are too many, ModelError naming what is
        wrong with the adapter.
        """
        return self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for it; those that run keep it. Raises RequestError."""
        self._adapters.unload(name)

    def abort(self, request_ids: list[int]) -> None:
        """End these requests and free what they hold; unknown ids are ignored."""
        self._scheduler.abort(request_ids)
        self._forget(request_ids)
        for request_id in request_ids:
            self._compiling.pop(request_id, None)
        # Now, not with the next step: there may be none, while the ranks go on.
        self._drop_ended()

    def step(self) -> list[Output]:
        """Compute one step for whatever the scheduler chose; new tokens of all sequences.

        Where steps overlap, they are those of the step before.
        """
        begin = time.perf_counter()
        self.attend_chain()
        # What is computed beside a step comes behind it: its tokens are sent by now.
        beside = bool(self._beside)
        outputs = self._compute_beside() if beside else []
        begun = time.perf_counter()
        last = self._round
        if beside or last.prompt_seconds:  # else no prompt had any of the time
            worked = last.prompt_seconds + (begun - begin if beside else 0.0)
            self._record.add_round(worked, last.seconds + begun - begin)
        if self._compiling:
            self._add_compiled()
        in_flight = self._in_flight
        scheduled = self._scheduler.schedule(
            in_flight.scheduled if in_flight else NOTHING, begun - begin
        )
        self._explainer.look()
        if scheduled.long_chunk is not None:
            rows = self._tile_rows(scheduled.long_chunk)
            chunk = LongChunk(scheduled.long_chunk, self._runner, self._page_size, tile_rows=rows)
            self._beside[chunk.seq] = chunk
        if self.runahead is not None:
            self._beside |= {seq: self.runahead.start(seq) for seq in scheduled.ahead}
        launched = self._launch(scheduled) if scheduled.scheduled else None
        if self._overlaps:
            self._in_flight, launched = launched, in_flight
        outputs += self._commit(launched) if launched else []
        outputs += self._progress.outputs(self._beside)
        self._round = Round(
            scheduled.beside,
            max(self._max_batched_tokens - scheduled.num_prefilled, 0),
            not scheduled.scheduled,
            self._record.prompt_seconds(scheduled.scheduled),
            time.perf_counter() - begun,
        )
        self._steps += 1
        self._step_seconds += time.perf_counter() - begin
        return outputs

    def attend_chain(self) -> None:
        """Keep up with the prefill ranks, if there are any: now and then while nothing runs."""
        if self.runahead is not None:
            self.runahead.poll()

    def rank_descriptors(self) -> list[int]:
        """Readable while nothing runs if a process it computes with has ended."""
        return self._runner.followers.descriptors()

    def check_ranks(self) -> None:
        """Raises RankError if one has ended."""
        self._runner.followers.check()

    def close(self) -> None:
        """End the processes it has started."""
        self._runner.followers.close()
        if self._record.costs is not None and self._record.learned:
            self._keep_table(self._record.costs.table)
        if self.runahead is not None:
            self.runahead.close()

    def _launch(self, scheduled: SchedulerOutput) -> Launched:
        """Start computing a step, and the choice of its tokens."""
        begun = time.monotonic()
        masks = self._start_filling(scheduled)
        relay = self._relay.plan(scheduled.scheduled)
        batch = self._batch(scheduled, relay.ranges if relay else ())
        before = self._runner.decoder.attention_seconds
        began = time.perf_counter()
        logits = self._runner.run(batch)
        seconds = time.perf_counter() - began
        self._record.add(scheduled.scheduled, relay.seconds if relay else None, seconds)
        if relay is not None:
            self._count(relay, self._runner.decoder.attention_seconds - before)
            if self._guard.is_due(relay):
                batch = self._batch(scheduled)
                logits = self._guard.check(batch, logits)
        return self._sample(scheduled, logits, batch.reads, masks, begun)

    def _batch(self, scheduled: SchedulerOutput, shared: Items[SharedRange] = ()) -> Batch:
        before = self._in_flight
        tokens = InFlight(before.sequences, before.sampling.token_ids) if before else None
        return build_batch(scheduled.scheduled, self._page_size, shared, tokens)

    def _start_filling(self, scheduled: SchedulerOutput) -> Callable[[], Masks | None]:
        """Fill the masks of those that get a token, while the forward pass is computed."""
        sampling = [entry.seq.constraint for entry in scheduled.scheduled if entry.samples]
        return self._grammars.start_filling(sampling)

    def _sample(
        self,
        scheduled: SchedulerOutput,
        logits: Tensor,
        reads: Items[Read],
        masks: Callable[[], Masks | None],
        begun: float,
    ) -> Launched:
        computed = None if self._runner.backend.asynchronous else time.monotonic()
        entries = [entry for entry in scheduled.scheduled if entry.samples]
        books = [read.reader.fetch() for read in reads]
        filled = masks()
        sampling = self._sampler.launch(logits, entries, filled)
        failed = {} if filled is None else filled.failed
        failures = {entries[row].seq: why for row, why in failed.items()}
        return Launched(scheduled, sampling, begun, computed, failures, books)

    def _commit(self, launched: Launched) -> list[Output]:
        """Wait for the tokens of a step, and book it."""
        sampled = launched.sampling.result()
        computed = launched.computed or time.monotonic()
        for entry in launched.scheduled.scheduled:
            if entry.seq.timeline is not None:
                _note_chunk(entry.seq, launched.begun, computed, entry.num_tokens)
        for book in launched.books:
            book()
        new = self._scheduler.commit(launched.scheduled, launched.tokens(sampled))
        for seq, why in launched.failed.items():
            if seq.finish_reason is FinishReason.GRAMMAR:  # else aborted, or its KV is broken
                logger.warning("request %d ends, its grammar cannot be followed: %s", seq.id, why)
                error = RequestError(f"the answer's grammar cannot be followed any further: {why}")
                self._refused.append((seq.id, error))
        new = [token for token in new if token.seq.finish_reason is not FinishReason.GRAMMAR]
        until = time.perf_counter() + RUN_SECONDS
        forced = {token.seq: self._advance(token, until) for token in new if token.seq.constraint}
        logprobs = {
            seq: s.logprobs
            for seq, s in zip(launched.sequences, sampled, strict=True)
            if s.logprobs
        }
        explained = {token.seq: self._explainer.take(token.seq) for token in new}
        return [
            _output(
                token,
                forced.get(token.seq, ()),
                logprobs.get(token.seq),
                explained[token.seq],
            )
            for token in new
        ]

    def _advance(self, token: NewToken, until: float) -> Items[int]:
        """Go on in a sequence's grammar; the tokens behind ``token`` that it leaves no choice of,
        if there is time, ``until``, to look for them.

        Their log-probabilities are not known. On a device of its own a step of single tokens is a
        recorded one (models/decode_graphs.py), which a run of them would not be.
        """
        seq, constraint = token.seq, token.seq.constraint
        if constraint is None or token.token_id is None or token.finished:
            return ()
        constraint.advance(token.token_id)
        sampled = seq.params.logprobs is not None or self._runner.backend.asynchronous
        if sampled or time.perf_counter() > until:
            return ()
        token_ids = constraint.forced()
        if constraint.complete:
            token_ids.append(self.model.eos_token_ids[0])
        taken = self._scheduler.extend(seq, token_ids)
        self._forced_tokens += len(taken)
        return taken

    def _compute_beside(self) -> list[Output]:
        """Go on with what is computed beside the steps, for as long as the last one said, or for
        as much work as it left; commit what is done."""
        self._drop_ended()
        outputs = []
        last, works = self._round, list(self._beside.values())
        until, seconds = time.perf_counter(), dict(last.beside)
        tokens = last.tokens_left // max(len(works), 1)
        for work in works:
            begun = time.monotonic()
            if self._paced:
                until += seconds.get(work.seq, 0.0)  # and what others did not need
                logits = work.advance_until(until)
            else:
                logits = work.advance(work.pieces(tokens))
            if logits is None:
                _note_chunk(work.seq, begun, time.monotonic(), 0)
            else:
                del self._beside[work.seq]
                alone = SchedulerOutput([work.entry], 0)
                self._record.add(alone.scheduled, None, work.seconds)
                masks = self._start_filling(alone)
                outputs += self._commit(self._sample(alone, logits, work.reads, masks, begun))
                work.finish()
        if last.idle and self.runahead and all(work.waits for work in works):
            self.runahead.wait(WAIT_SECONDS)
        return outputs

    def _tile_rows(self, entry: ScheduledSequence) -> int:
        """So many rows that a layer of them takes half a step at most, if steps are a time."""
        rows = self._runner.backend.tile_rows
        while self._paced and rows > LEAST_TILE:
            seconds = self._record.prefill.seconds(entry.end - rows, rows)
            if seconds / self._runner.decoder.config.num_layers <= self._step_time / 2:
                break
            rows //= 2
        return rows

    def _drop_ended(self) -> None:
        """Cancel what was aborted, and let the steps compute what does not run ahead any more."""
        for seq, work in list(self._beside.items()):
            running = seq.status is Status.RUNNING
            if not running or work.failed is not None:
                del self._beside[seq]
                work.cancel()
                if running:
                    self._scheduler.fall_back(seq)

    def _count(self, plan: RelayPlan, seconds: float) -> None:
        total, layers = self._relayed, self._runner.decoder.config.num_layers
        self._relayed = msgspec.structs.replace(
            total,
            steps=total.steps + (len(plan.ranges) > 0),
            ranges=total.ranges + len(plan.ranges),
            seconds=total.seconds + seconds,
            predicted_seconds=total.predicted_seconds + layers * plan.seconds,
            predicted_plain_seconds=total.predicted_plain_seconds + layers * plan.plain_seconds,
            bytes_read=total.bytes_read + plan.pages_read * self._page_bytes,
            bytes_distinct=total.bytes_distinct + plan.pages_distinct * self._page_bytes,
        )

    @property
    def stats(self) -> Stats:
        scheduler, pool = self._scheduler, self._pool
        return Stats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + len(self._compiling),
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=self._cache.num_evictable_pages,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generation_tokens=scheduler.generation_tokens,
            forced_tokens=self._forced_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            step_seconds=self._step_seconds,
            prefill=self._record.prefill,
            backlog=self._record.backlog(scheduler.backlog(), 1 / OLDEST_EVERY),
            relay=msgspec.structs.replace(
                self._relayed,
                enabled=self._relay.mode != "off",
                refused=self._guard.refused,
                checks=self._guard.checks,
                largest_difference=self._guard.largest_difference,
            ),
            runahead=RunaheadStats() if self.runahead is None else self.runahead.stats,
        )

    def check(self) -> None:
        """Prove the books: pages, references, locks. Raises if they do not balance."""
        self._scheduler.check(() if self.runahead is None else self.runahead.pages_lent())

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[list[int]]:
        """The output tokens of each prompt, computed together; for tests and measurements."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        outputs: dict[int, list[int]] = {}
        for index, (prompt, wanted) in enumerate(zip(prompts, each, strict=True)):
            outputs[index] = []
            self.add(index, array("i", prompt), wanted)
        while self.has_work:
            for output in self.step():
                outputs[output.id].extend(output.token_ids)
            for _, error in self.take_refused():
                raise error
        return [outputs[index] for index in range(len(prompts))]

    def _check_vocabulary(self, token_ids: array[int]) -> None:
        # A copy: while there is a view of it, the array cannot grow.
        ids, size = np.array(token_ids), self.model.vocab_size
        wrong = np.flatnonzero((ids < 0) | (ids >= size))
        if len(wrong):
            raise RequestError(
                f"token id {ids[wrong[0]]} is not in the vocabulary of {size}", "prompt"
            )


def _no_text(decoder: Decoder) -> str | None:
    """Why the model cannot write text; None where it can."""
    if not decoder.config.causal:
        return "its tokens see the whole prompt (is_causal is false in its config)"
    if decoder.head is None:
        return "its checkpoint has no language-model head (lm_head.weight)"
    return None


def _namespace(salt: bytes, segments: Segments, adapter: Adapter | None) -> bytes:
    """The cache key's part that is not tokens."""
    digest = b"" if adapter is None else adapter.digest
    return Namespace(salt, digest, bool(segments)).key


def _output(
    token: NewToken,
    forced: Items[int],
    logprobs: TokenLogprobs | None,
    explanation: Explanation | None,
) -> Output:
    """``forced``: tokens that came behind it, without being chosen."""
    seq, pooled = token.seq, None
    scores = seq.reading.scores() if isinstance(seq.reading, PromptScores) else None
    if isinstance(seq.reading, Pooled) and seq.finish_reason is FinishReason.STOP:
        pooled = seq.reading.vector
    token_ids = [] if token.token_id is None else [token.token_id, *forced]
    return Output(
        seq.id,
        token_ids,
        _reason(seq.finish_reason),
        seq.num_cached_tokens,
        [logprobs] if logprobs else None,
        scores,
        pooled,
        _times(seq) if seq.num_output_tokens == len(token_ids) else None,
        explanation=explanation,
    )


def _times(seq: Sequence) -> Times | None:
    """Until now, where its first output is made; nothing more is noted of it."""
    timeline, seq.timeline = seq.timeline, None
    if timeline is None or seq.scheduled is None:
        return None
    return timeline.times(seq.scheduled)


def _note_chunk(seq: Sequence, begun: float, computed: float, num_tokens: int) -> None:
    if seq.timeline is not None and seq.scheduled is not None:
        seq.timeline.chunk(begun, computed, num_tokens, seq.scheduled)


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
