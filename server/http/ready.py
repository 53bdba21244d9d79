"""The summary that the log has when the model is ready: what runs, with what, and where."""

from __future__ import annotations

import contextlib

import psutil

from headstart.engine.process.messages import ModelInfo
from headstart.server.http.hosts import described
from headstart.server.http.keys import Keys
from headstart.server.http.runtime import Runtime


def summary(runtime: Runtime, model: ModelInfo, url: str, seconds: float) -> str:
    """A few aligned lines; ``seconds``: from the command to now."""
    tokens = model.num_pages * model.page_size
    reason = model.weights_reason
    several = f" in each of {model.processes} processes" if model.processes > 1 else ""
    rows = {
        "model": ", ".join((*runtime.model_names, *sorted(runtime.engine.adapters))),
        "weights": f"{model.weights}: {reason}" if reason else model.weights,
        "kernels": f"{model.backend}, {_count(model.threads, 'thread')}{several}",
        "KV cache": f"{tokens:,} tokens in {model.kv_bytes / 2**30:.2f} GiB",
        "memory": _resident(),
        "context": _context(model),
        "relay": model.relay,
        "answers": str(runtime.answers),
        "defaults": str(runtime.defaults),
        "keys": _keys(runtime.settings.keys),
    }
    hosts = runtime.settings.allowed_hosts
    if hosts is not None and not runtime.settings.keys.api:
        rows["asked as"] = described(hosts)
    rows["URL"] = url
    lines = [f"ready after {seconds:.1f} s"]
    lines += [f"  {name:<10}{value}" for name, value in rows.items()]
    return "\n".join(lines)


def _context(model: ModelInfo) -> str:
    tokens, of_model = model.max_model_len, model.trained_context
    return f"{tokens:,} tokens" + (f" of the model's {of_model:,}" if tokens < of_model else "")


def _resident() -> str:
    """What is in memory now, of this process and those it has started. Memory of the KV cache is
    taken as it is used; pages that several processes share are counted in each."""
    server = psutil.Process()
    engines = 0
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            engines += process.memory_info().rss
    own = server.memory_info().rss
    return f"{own / 2**30:.2f} GiB server, {engines / 2**30:.2f} GiB engine, resident now"


def _keys(keys: Keys) -> str:
    if not keys.api and not keys.admin:
        return "none: whoever reaches the URL may do everything"
    return f"{len(keys.api)} for the API, {len(keys.admin)} for admins"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
