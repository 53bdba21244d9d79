"""What the two processes take: memory, CPU while idle."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

MB = 1e6
LIMIT = 1000 * MB
"""Of the two processes, beside weights and KV."""

WEIGHT_BYTES = {"f32": 4, "bf16": 2, "int8": 1}
PARAMETERS = 135e6
EMBEDDING = 57 * MB
"""bf16, beside int8 weights."""


def test_memory_and_idle_cpu(start_server, smollm2, text, token_bytes, default_setup):
    server = start_server(str(smollm2), "--kv-memory", "400MiB")
    processes = [psutil.Process(server.process.pid), server.engine]
    weights = WEIGHT_BYTES[default_setup.settings.weights] * PARAMETERS + EMBEDDING
    fresh = [process.memory_info().rss for process in processes]
    assert sum(fresh) - weights < LIMIT, [f"{size / MB:.0f} MB" for size in fresh]

    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "/site-packages/torch/" not in maps
    assert "libtorch" not in maps

    prompt = text(2000, 1)
    with server.client() as client:
        for _ in range(2):
            answer = client.completions.create(model=smollm2.name, prompt=prompt, max_tokens=40)
    touched = (answer.usage.total_tokens + 40 + 64) * token_bytes
    used = sum(process.memory_info().rss for process in processes)
    assert used - touched - weights < LIMIT, f"{used / MB:.0f} MB, {touched / MB:.0f} MB of it KV"

    server.wait_idle()
    # An engine without work has KV memory ready for what comes, and then does nothing.
    for process in processes:
        for _ in range(60):
            before = cpu_seconds(process)
            time.sleep(1)
            if cpu_seconds(process) - before < 0.015:  # times come in hundredths of a second
                break
        else:
            raise AssertionError(f"{process.cmdline()} goes on computing")


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
