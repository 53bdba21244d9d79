"""What the server process and the engine process say to each other (msgspec over ZeroMQ).

server -> engine   Add, Abort, LoadAdapter, UnloadAdapter, Shutdown
engine -> server   Ready (once), Step (one per engine step, for all sequences), Rejected,
                   AdapterLoaded, AdapterUnloaded; Alive, when there was nothing else for a while
"""

from typing import Literal

import msgspec

from headstart.engine.costs.backlog import Backlog
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.sampling.params import Pooling, PoolingParams, SamplingParams


class Add(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Start a request. ``token_ids``: the prompt as little-endian int32. ``id`` is the client's.

    ``salt``: KV is shared only among requests of equal salt. ``segments``: see ranges/segments.py.
    ``adapter``: the name of a loaded one, or None for the model itself. ``priority``: lower ones
    come first. ``owner``: whom an explanation may tell of this prompt, beside equal salt.
    """

    id: int
    token_ids: bytes
    params: SamplingParams | PoolingParams
    salt: bytes = b""
    segments: list[tuple[int, int]] = []
    adapter: str | None = None
    priority: int = 0
    owner: bytes = b""


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Stop these requests and free what they hold. Unknown ids are ignored."""

    ids: list[int]


class LoadAdapter(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Load the LoRA adapter in folder ``path`` of the engine's machine, and call it ``name``."""

    id: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Take no more requests for the adapter; those that run keep it to their end."""

    id: int
    name: str


class Shutdown(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """End the engine process; running requests are dropped."""


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probability of one sampled token and of the most likely ones, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class ScoredToken(TokenLogprobs, array_like=True, frozen=True):
    """The same of a token of a prompt. ``rank``: its place by likelihood; the likeliest has 1."""

    rank: int


class QueueAhead(msgspec.Struct, array_like=True, frozen=True):
    """What the engine had when a request came. ``tokens``: of prompts, still to be computed."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0


class Times(msgspec.Struct, array_like=True, frozen=True):
    """Moments of a request in the engine, by ``time.monotonic`` (see engine/timeline.py).

    arrived    it came, between two steps
    ready      its grammar was compiled, if it has one
    scheduled  it was first scheduled
    computed   the last of its prompt was
    made       its first output was made

    ``seconds``: in which ``num_tokens`` of its prompt were computed, in ``num_chunks`` chunks;
    ``chunks``: from when to when the first of these were.
    """

    arrived: float
    ready: float
    scheduled: float
    computed: float
    made: float
    seconds: float
    num_chunks: int = 0
    num_tokens: int = 0
    chunks: list[tuple[float, float]] = []
    ahead: QueueAhead = QueueAhead()

    @property
    def queue(self) -> float:
        """Seconds until it was first scheduled, those of its grammar apart."""
        return self.scheduled - self.ready

    @property
    def prefill(self) -> float:
        """Seconds from then to its first output."""
        return self.made - self.scheduled


Cause = Literal[
    "prefix_caching_off",
    "reads_prompt",
    "last_token",
    "below_page",
    "evicted",
    "not_computed",
    "being_computed",
    "other_adapter",
    "other_segment_mask",
    "segment_changed",
    "differs",
    "new",
    "never_seen",
]
"""Why tokens of a prompt did not come from the cache; engine/explain.py says what each means."""


class Missed(msgspec.Struct, array_like=True, frozen=True):
    """Tokens ``[start, end)`` did not come from the cache. ``seconds_ago``: when their pages were
    evicted, or the earlier prompt ended, if that is known. ``by``: what for; or what the earlier
    prompt was under, or how it ended."""

    start: int
    end: int
    cause: Cause
    seconds_ago: float | None = None
    by: str | None = None


class Difference(msgspec.Struct, array_like=True, frozen=True):
    """Where a prompt leaves the earlier one that it shares most with: at ``token``, its first token
    that the other one does not have.

    ``earlier``: tokens of that one from position ``start`` on, some before the place and some after
    it. ``seconds_ago``: when it ended; None: it has not. ``removed``: this prompt goes on as that
    one does so many tokens later; ``inserted``: that one goes on as this one does.
    """

    token: int
    start: int
    earlier: list[int]
    seconds_ago: float | None = None
    removed: int | None = None
    inserted: int | None = None


class Explanation(msgspec.Struct, array_like=True, frozen=True):
    """What the cache had of a prompt, and why no more.

    ``missed``: in order, all tokens that did not come from the cache. ``meanwhile``: tokens that
    did, and were being computed for another request when this one came. ``preemptions``: how often
    the prompt lost its pages before its first token.
    """

    page_size: int
    missed: list[Missed]
    difference: Difference | None = None
    meanwhile: int = 0
    preemptions: int = 0


class Output(msgspec.Struct, array_like=True, frozen=True):
    """New tokens of one request. ``finish_reason`` is set on the last one.

    ``cached_tokens`` counts prompt tokens whose KV came from the cache. ``prompt_logprobs`` come
    with the first one: of all tokens of the prompt but the first. ``pooled``: the prompt's vector,
    little-endian float32, beside no token. ``times`` come with the first one, too. ``computed``:
    tokens of the prompt whose KV is there by now, beside nothing else, for requests that asked.
    ``explanation`` comes with the first one, for requests that asked.
    """

    id: int
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[ScoredToken] | None = None
    pooled: bytes | None = None
    times: Times | None = None
    computed: int | None = None
    explanation: Explanation | None = None


class RelayStats(msgspec.Struct, array_like=True, frozen=True):
    """What RelayAttention did. Seconds and bytes are of the steps in which prefixes were shared by
    several sequences, whether it paid to read them once or not.
    """

    enabled: bool = False
    refused: bool = False  # its logits were not those of plain attention
    steps: int = 0  # that read a prefix once for several sequences
    ranges: int = 0
    seconds: float = 0.0  # inside attention
    predicted_seconds: float = 0.0
    predicted_plain_seconds: float = 0.0  # had nothing been read once
    bytes_read: int = 0  # of keys and values
    bytes_distinct: int = 0  # had every page been read once
    checks: int = 0
    largest_difference: float = 0.0  # of a logit in a check, relative to the largest logit


class RunaheadStats(msgspec.Struct, array_like=True, frozen=True):
    """What KV-Runahead did. ``ranks``: of the whole chain with the engine; 1: there is none."""

    ranks: int = 1
    ranks_live: int = 1
    prompts: int = 0  # that ran ahead to their first token
    failed: int = 0  # that began to, and were computed by the engine alone
    left_out: int = 0  # how often a rank was
    tokens: int = 0  # of the prompts that ran ahead, computed by any rank
    seconds: float = 0.0  # of those prompts, to the first token
    predicted_seconds: float = 0.0
    idle_seconds: float = 0.0  # in which the engine waited for their KV
    bytes_sent: int = 0  # of keys and values, from rank to rank


class Stats(msgspec.Struct, array_like=True, frozen=True):
    """The engine's counters after a step. Totals count from the start of the engine process."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0  # held by sequences or by the radix cache
    pages_cached: int = 0  # held by the radix cache alone: free on demand
    prompt_tokens: int = 0  # total, cached ones included
    cached_tokens: int = 0  # total, prompt tokens found in the radix cache
    generation_tokens: int = 0
    forced_tokens: int = 0  # of these: not chosen, since a grammar left no choice
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0  # total time inside steps
    prefill: PrefillCosts = PrefillCosts(0.0, 0.0, 0.0)  # of a prompt, alone; all 0: not known
    backlog: Backlog = Backlog()
    relay: RelayStats = RelayStats()
    runahead: RunaheadStats = RunaheadStats()


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded LoRA adapter. ``targets``: the matrices it changes, as q_proj.

    ``num_bytes``: of its file. ``segment_mask``: what its config declares, a name in
    segments.MASKS, or None.
    """

    name: str
    path: str
    rank: int
    targets: list[str]
    num_bytes: int
    segment_mask: str | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the server needs to know of the model the engine has loaded.

    ``pooling``: how its sentence-transformers settings, if it has any, say that vectors are made.
    ``weights_reason``: why their format was chosen; empty where it was asked for.
    ``threads``: of the kernels, in each of ``processes``. ``kv_bytes``: of the pages of all of
    them. ``relay``: RelayAttention's mode, once it has been checked.
    ``trained_context``: tokens that the model itself is made for; 0 where it does not matter.
    ``no_text``: why it answers with vectors alone, in words; None where it writes text, too.
    """

    max_model_len: int
    vocab_size: int
    hidden_size: int
    page_size: int
    num_pages: int
    eos_token_ids: list[int]
    backend: str
    weights: str
    version: str
    weights_reason: str = ""
    trained_context: int = 0
    max_running: int = 64  # sequences computed in one step
    threads: int = 1
    processes: int = 1
    kv_bytes: int = 0
    relay: str = "off"
    segment_mask: str | None = None  # what its config declares
    pooling: Pooling | None = None
    no_text: str | None = None
    adapters: list[AdapterInfo] = []  # loaded at start-up


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine has loaded its model and takes requests."""

    model: ModelInfo


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine could not start; ``message`` is one line for the user."""

    message: str


class Step(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Everything one engine step produced. ``heard``: the id of the last Add before ``stats``."""

    outputs: list[Output]
    stats: Stats
    heard: int = 0


class Alive(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Nothing happened, and the engine goes on."""


BEATS = 4
"""Signs of life that are missed before the engine's process is taken for dead."""


class AdapterLoaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answers LoadAdapter."""

    id: int
    adapter: AdapterInfo


class AdapterUnloaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answers UnloadAdapter."""

    id: int


class Rejected(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request, or an adapter, that the engine could not accept, with the reason."""

    id: int
    message: str
    param: str | None = None


ToEngine = Add | Abort | LoadAdapter | UnloadAdapter | Shutdown
ToServer = Ready | Failed | Step | Alive | Rejected | AdapterLoaded | AdapterUnloaded
