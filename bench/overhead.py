"""What a step costs beside the model: scheduler, relay, batch building, sampling, transport.

    python -m headstart.bench.overhead [--sequences 64] [--vocabulary 49152]

No model runs: logits are made once, as large as the real ones, and the real scheduler, page pool,
radix cache, batch builder, sampler and messages (encoded, sent over ZeroMQ, received, decoded and
handed to their streams) do what they do for sequences that decode. The sequences are of four
tenants below one system prompt, so RelayAttention plans nested prefixes. Medians over the steps.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from array import array
from collections import defaultdict

import msgspec
import torch
import zmq

from headstart.engine.batch import build_batch
from headstart.engine.costs.attention import load_costs
from headstart.engine.kv.pool import PagePool
from headstart.engine.kv.tree import RadixCache
from headstart.engine.process.client import Stream
from headstart.engine.process.messages import Output, Stats, Step, ToServer
from headstart.engine.ranges.shared import Relay
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampler
from headstart.engine.schedule.scheduler import Scheduler
from headstart.engine.sequence import Sequence
from headstart.kernels.backend import AttentionShape
from headstart.kernels.devices import load_backend

PROMPT, STEPS = 1748, 200
SYSTEM, TENANT, TENANTS = 1024, 512, 4


async def measure(sequences: int, vocabulary: int, temperature: float) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    backend = load_backend("cpu", isa="auto", weights="int8", threads=2)
    pool = PagePool(sequences * (PROMPT + STEPS + 64) // 32 + sequences, 32)
    scheduler = Scheduler(
        pool,
        RadixCache(pool),
        max_batched_tokens=1 << 20,
        max_running=sequences,
        max_model_len=1 << 20,
        eos_token_ids=(),
    )
    sampler = Sampler(vocabulary, backend=backend)
    logits = torch.randn(sequences, vocabulary)
    context = zmq.Context()
    sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    sender.bind("inproc://step")
    receiver.connect("inproc://step")
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToServer)
    params = SamplingParams(max_tokens=STEPS + 10, temperature=temperature, seed=1)
    generator = torch.Generator().manual_seed(1)
    streams = {}

    def some(count: int) -> list[int]:
        ids: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return ids

    system, tenants = some(SYSTEM), [some(TENANT) for _ in range(TENANTS)]
    for i in range(sequences):
        ids = system + tenants[i % TENANTS] + some(PROMPT - SYSTEM - TENANT)
        scheduler.add(Sequence(i, array("i", ids), PROMPT, params))
        streams[i] = Stream(None, i)  # type: ignore[arg-type]

    times: dict[str, list[float]] = defaultdict(list)
    shape = AttentionShape(9, 3, 64)
    relay = Relay("on", backend.page_size, backend.range_step, lambda: load_costs(backend, shape))
    _ = relay.costs
    for _ in range(STEPS):
        marks = [time.perf_counter()]
        scheduled = scheduler.schedule()
        marks.append(time.perf_counter())
        plan = relay.plan(scheduled.scheduled)
        marks.append(time.perf_counter())
        batch = build_batch(scheduled.scheduled, 32, plan.ranges if plan else ())
        backend.plan_attention(batch.num_rows, batch.kv_ranges, shape)
        marks.append(time.perf_counter())
        sampling = [entry.seq for entry in scheduled.scheduled if entry.samples]
        sampled = sampler.sample(logits[: len(sampling)], sampling)
        marks.append(time.perf_counter())
        new = scheduler.commit(scheduled, [s.token_id for s in sampled])
        marks.append(time.perf_counter())
        outputs = [Output(t.seq.id, [t.token_id or 0], None, 0) for t in new]
        sender.send(encoder.encode(Step(outputs, Stats())))
        message = decoder.decode(receiver.recv())
        assert isinstance(message, Step)
        for output in message.outputs:
            streams[output.id].push(output)
        marks.append(time.perf_counter())
        if scheduled.num_tokens == sequences:  # else a prompt is computed
            names = ("schedule", "relay", "batch and plan", "sample", "commit", "transport")
            for name, begin, end in zip(names, marks, marks[1:], strict=False):
                times[name].append((end - begin) * 1e3)
    sender.close(0)
    receiver.close(0)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headstart.bench.overhead")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=49152)
    args = parser.parse_args()
    print(
        f"{args.sequences} sequences, {PROMPT} tokens each, vocabulary {args.vocabulary}, "
        f"{SYSTEM} shared by all and {TENANT} by a quarter\n"
    )
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        parts = asyncio.run(measure(args.sequences, args.vocabulary, temperature))
        text = ", ".join(f"{part} {value:.3f}" for part, value in parts.items())
        print(f"{name}: {sum(parts.values()):.2f} ms a step ({text})")


if __name__ == "__main__":
    main()
