"""llama.cpp in a process of its own; needs only `llama-cpp-python`, not headstart.

    python llama_engine_worker.py MODEL.gguf '{"context": 24576, ...}'

Speaks as openvino_worker.py does. Prompts of a burst go through the library's own batches, as its
server does it: what a prompt shares with the last one stays in the cache, what all prompts of a
burst share is computed once and its cells are given to every sequence. As with the other worker,
prompts are tokenised before the clock starts and no text is produced, in this engine's favour.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)
SEQUENCES = 64


class Engine:
    """A context that sequences share, driven batch by batch."""

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = settings["context"], SEQUENCES
        params.n_batch, params.n_ubatch = settings["batch"], settings["ubatch"]
        threads = settings["threads"] or len(os.sched_getaffinity(0))
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # or no two sequences share a cell
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.most = settings["batch"]
        self.batch = llama_cpp.llama_batch_init(self.most, 0, 1)
        self.cached: list[int] = []  # what sequence 0 holds

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation, by the model's own chat template."""
        kept = [(m["role"].encode(), m["content"].encode()) for m in messages]
        chat = (llama_cpp.llama_chat_message * len(kept))(*kept)
        template = llama_cpp.llama_model_chat_template(self.model, None)
        room = 2 * sum(len(content) for _, content in kept) + 4096
        text = ctypes.create_string_buffer(room)
        size = llama_cpp.llama_chat_apply_template(template, chat, len(kept), True, text, room)
        ids = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, text.raw[:size], size, ids, size, False, True
        )
        return list(ids[:count])

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether logits are wanted), in batches."""
        for start in range(0, len(rows), self.most):
            part = rows[start : start + self.most]
            for i, (token, position, sequence, wanted) in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, position
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
                self.batch.logits[i] = wanted
            self.batch.n_tokens = len(part)
            status = llama_cpp.llama_decode(self.context, self.batch)
            if status:
                raise SystemExit(f"llama_decode: status {status}, {len(part)} rows")
            for i, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    logits = llama_cpp.llama_get_logits_ith(self.context, i)
                    self.best[sequence] = int(
                        np.ctypeslib.as_array(logits, shape=(self.words,)).argmax()
                    )
                    self.times[sequence].append(time.perf_counter())

    def burst(
        self, conversations: list[list[dict[str, str]]], output_tokens: int
    ) -> dict[str, Any]:
        """All requests at once, until each has its tokens."""
        prompts = [self.encode(messages) for messages in conversations]
        self.best = [0] * len(prompts)
        self.times: list[list[float]] = [[] for _ in prompts]
        sent = time.perf_counter()
        last = min(len(prompt) for prompt in prompts) - 1
        shared = min([common(prompts[0], prompt) for prompt in prompts[1:]] + [last])
        kept = min(common(self.cached, prompts[0]), len(prompts[0]) - 1)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, kept, -1)
        if len(prompts) > 1:
            self.decode([(prompts[0][at], at, 0, False) for at in range(kept, shared)])
        for i in range(1, len(prompts)):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, i, 0, shared)
        rows = []
        for i, prompt in enumerate(prompts):
            first = max(kept, shared) if i == 0 and len(prompts) > 1 else kept if i == 0 else shared
            end = len(prompt) - 1
            rows += [(prompt[at], at, i, at == end) for at in range(first, len(prompt))]
        self.decode(rows)
        for step in range(1, output_tokens):
            self.decode(
                [
                    (self.best[i], len(prompt) + step - 1, i, True)
                    for i, prompt in enumerate(prompts)
                ]
            )
        for i in range(1, len(prompts)):
            llama_cpp.llama_memory_seq_rm(self.memory, i, -1, -1)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, len(prompts[0]), -1)
        self.cached = prompts[0]
        samples = [
            {
                "prompt_tokens": len(prompt),
                "output_tokens": len(times),
                "cached_tokens": min(kept, shared) if len(prompts) > 1 else kept,
                "sent": sent,
                "times": times,
            }
            for prompt, times in zip(prompts, self.times, strict=True)
        ]
        return {"samples": samples}


def common(left: list[int], right: list[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def main(model: str, settings: str) -> None:
    """Answer lines of stdin until it closes."""
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    start = time.perf_counter()
    engine = Engine(model, json.loads(settings))

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    load = time.perf_counter() - start
    answer({"ready": True, "version": llama_cpp.__version__, "load_s": round(load, 2)})
    for line in sys.stdin:
        request = json.loads(line)
        if "count" in request:
            answer({"prompt_tokens": len(engine.encode(request["count"]))})
        else:
            answer(engine.burst(request["burst"], request["output_tokens"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
