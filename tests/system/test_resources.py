"""What the two processes take: time to start, memory, CPU while idle."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

GB = 1e9


def test_start_memory_and_idle_cpu(start_server, smollm2, text):
    server = start_server(str(smollm2), ready=False)
    seconds = server.wait_ready()
    print(f"ready {seconds:.2f} s after the start")
    assert seconds < 10  # 5 on a machine that does nothing else

    processes = [psutil.Process(server.process.pid), server.engine]
    names = ("server", "engine")
    fresh = [process.memory_info().rss for process in processes]
    print(
        "resident when ready:", {n: f"{b / GB:.3f} GB" for n, b in zip(names, fresh, strict=True)}
    )
    assert sum(fresh) < 1.2 * GB

    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "/site-packages/torch/" not in maps
    assert "libtorch" not in maps

    prompt = text(2000, 1)
    with server.client() as client:
        for _ in range(2):
            answer = client.completions.create(model=smollm2.name, prompt=prompt, max_tokens=40)
    tokens = answer.usage.total_tokens + 40 + 64
    touched = tokens * 30 * 3 * 64 * 2 * 2
    used = sum(process.memory_info().rss for process in processes)
    print(f"resident after 2 requests: {used / GB:.3f} GB, {touched / GB:.3f} GB of them KV")
    assert used - touched < 1.2 * GB

    server.wait_idle()
    time.sleep(2)  # what an idle engine does first: have KV memory ready for what comes
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(3)
    for name, process, start in zip(names, processes, before, strict=True):
        share = (sum(process.cpu_times()[:2]) - start) / 3
        print(f"idle {name}: {100 * share:.2f}% of a core")
        assert share < 0.011  # times come in hundredths of a second
