"""The standard workloads, and how one of them is run against a target.

Every prompt is a system turn of random words shared by all requests of the workload and a user
turn of 24 words that no other request has. *cold*: the system turn is new in every repetition.
*warm*: a request with the same system turn has just been answered. Nothing at all is shared where
every request has a system turn of its own (`shared=False`).
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.bench.prompts import Calibration, Messages, PromptSource
from headstart.bench.samples import Burst, Target


@dataclass(frozen=True, slots=True)
class Workload:
    """`streams` requests at once, `output_tokens` from each; `headline` is what it is there for.

    `shared`: all requests of a repetition have one system turn. Without it nothing can be warm.
    """

    name: str
    headline: str
    streams: int
    prompt_tokens: int
    output_tokens: int
    warm: bool
    repetitions: int
    shared: bool = True

    def __post_init__(self) -> None:
        if self.warm and not self.shared:
            raise ValueError(f"{self.name}: a system turn that nobody shares cannot be warm")


COLD, WARM = False, True

WORKLOADS: tuple[Workload, ...] = (
    Workload("cold-1748", "ttft_ms_median", 1, 1748, 1, COLD, 5),
    Workload("cold-6048", "ttft_ms_median", 1, 6048, 1, COLD, 3),
    Workload("warm-1748", "ttft_ms_median", 1, 1748, 1, WARM, 9),
    Workload("stream1-248", "tpot_ms_median", 1, 248, 128, WARM, 3),
    Workload("stream1-1748", "tpot_ms_median", 1, 1748, 128, WARM, 3),
    Workload("streams16-248", "output_tokens_per_s", 16, 248, 128, WARM, 3),
    Workload("streams16-1748", "output_tokens_per_s", 16, 1748, 128, WARM, 3),
    Workload("arrive16-1748", "ttft_ms_median", 16, 1748, 16, WARM, 3),
    Workload("streams32-6048", "output_tokens_per_s", 32, 6048, 128, WARM, 2),
)


def by_name(name: str) -> Workload:
    """The standard workload of this name; ValueError lists them all."""
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    raise ValueError(
        f"unknown workload {name!r}; there are: {', '.join(w.name for w in WORKLOADS)}"
    )


async def calibrate(target: Target, prompts: PromptSource) -> Calibration:
    """Learn the target's tokens per word from two short conversations of their own."""

    def conversation(count: int) -> Messages:
        return prompts.conversation(f"calibrate/{count}", count, "calibrate")

    return Calibration.from_counts(
        await target.count(conversation(Calibration.SHORT)),
        await target.count(conversation(Calibration.LONG)),
    )


async def run_once(
    target: Target,
    workload: Workload,
    repetition: int,
    prompts: PromptSource,
    calibration: Calibration,
) -> Burst:
    """One repetition: warm the system turn if the workload says so, then send every stream."""
    size = calibration.system_words(workload.prompt_tokens)
    system = (
        f"shared/{workload.prompt_tokens}" if workload.warm else f"{workload.name}/{repetition}"
    )
    if workload.warm:
        user = f"{workload.name}/{repetition}/warm-up"
        warm_up = await target.burst([prompts.conversation(system, size, user)], 1)
        if not warm_up.good:
            return warm_up
    return await target.burst(
        [
            prompts.conversation(
                system if workload.shared else f"{system}/{stream}",
                size,
                f"{workload.name}/{repetition}/{stream}",
            )
            for stream in range(workload.streams)
        ],
        workload.output_tokens,
    )


async def run_workload(
    target: Target,
    workload: Workload,
    prompts: PromptSource,
    calibration: Calibration,
    time_limit: float,
) -> list[Burst]:
    """All repetitions, at least one; none is started `time_limit` seconds after the first."""
    start = time.monotonic()
    bursts: list[Burst] = []
    for repetition in range(workload.repetitions):
        bursts.append(await run_once(target, workload, repetition, prompts, calibration))
        if time.monotonic() - start > time_limit or not bursts[-1].good:
            break
    return bursts


async def alternate(
    targets: Sequence[Target],
    workload: Workload,
    prompts: PromptSource,
    calibration: Calibration,
    time_limit: float,
    pause: float = 0.0,
) -> list[list[Burst]]:
    """Repetitions of one workload, each on every target in turn (A B B A); bursts per target.

    Every other repetition goes the other way round, so that being first favours nobody.
    `pause`: seconds before each burst, in which the target that just ran can finish what it does
    when it is idle.
    """
    start = time.monotonic()
    bursts: list[list[Burst]] = [[] for _ in targets]
    for repetition in range(workload.repetitions):
        pairs = list(zip(targets, bursts, strict=True))
        for target, mine in reversed(pairs) if repetition % 2 else pairs:
            await asyncio.sleep(pause)
            mine.append(await run_once(target, workload, repetition, prompts, calibration))
        if time.monotonic() - start > time_limit:
            break
    return bursts


def check(workload: Workload, bursts: list[Burst]) -> list[str]:
    """What makes the figures differ from what the workload's name promises, in words."""
    good = [sample for burst in bursts for sample in burst.good]
    notes = []
    off = [s.prompt_tokens for s in good if abs(s.prompt_tokens - workload.prompt_tokens) > 8]
    if off:
        notes.append(
            f"prompts of {min(off)} to {max(off)} tokens instead of {workload.prompt_tokens}"
        )
    short = [s.output_tokens for s in good if s.output_tokens != workload.output_tokens]
    if short:
        notes.append(
            f"{len(short)} answers not of {workload.output_tokens} tokens (shortest {min(short)}): "
            "the server ends early in spite of ignore_eos"
        )
    cached = [s.cached_tokens for s in good if s.cached_tokens is not None]
    if cached and not workload.warm and max(cached) > workload.prompt_tokens // 10:
        notes.append(f"not cold: {max(cached)} tokens came from the cache; use another --seed")
    if cached and workload.warm and min(cached) < workload.prompt_tokens // 2:
        notes.append(f"not warm: only {min(cached)} tokens came from the cache")
    if len(bursts) < workload.repetitions:
        notes.append(f"{len(bursts)} of {workload.repetitions} repetitions")
    return notes
