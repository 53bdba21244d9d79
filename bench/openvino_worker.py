"""OpenVINO GenAI in a process of its own; needs only `openvino-genai`, not headstart.

    python openvino_worker.py MODEL.gguf '{"cache_gb": 4, ...}'

Prints {"ready": true, "version": ..., "load_s": ...}, then answers one JSON line per line on stdin:
    {"count": messages}                               -> {"prompt_tokens": n}
    {"burst": [messages, ...], "output_tokens": n}    -> {"samples": [...], "kv_usage": percent}
and ends when stdin closes. While it waits for a line it computes nothing.

A sample is {"prompt_tokens", "output_tokens", "sent", "times"}: `times` are the ends of the steps
that produced its tokens, in seconds from the same clock as `sent`. Prompts are tokenised before
the clock starts, and no text is produced, in this engine's favour.
"""

import json
import sys
import time
from typing import Any

import openvino_genai


class Engine:
    """A continuous-batching pipeline driven step by step."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = settings["cache_gb"]
        scheduler.max_num_batched_tokens = settings["max_batched_tokens"]
        scheduler.dynamic_split_fuse = settings["split_fuse"]
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = True
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler_config=scheduler, device="CPU", properties=settings["properties"]
        )
        self.tokenizer = self.pipeline.get_tokenizer()
        self.next_id = 0

    def encode(self, messages: list[dict[str, str]]) -> Any:
        """Token ids [1, n] of the conversation, by the model's own chat template."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).input_ids

    def burst(
        self, conversations: list[list[dict[str, str]]], output_tokens: int
    ) -> dict[str, Any]:
        """Add all requests, step until all are done."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        prompts = [self.encode(messages) for messages in conversations]
        handles = []
        samples = []
        for ids in prompts:
            handles.append(self.pipeline.add_request(self.next_id, ids, config))
            self.next_id += 1
            samples.append(
                {
                    "prompt_tokens": ids.shape[1],
                    "output_tokens": 0,
                    "sent": time.perf_counter(),
                    "times": [],
                }
            )
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter()
            for handle, sample in zip(handles, samples, strict=True):
                while handle.can_read():
                    new = sum(len(out.generated_ids) for out in handle.read().values())
                    sample["output_tokens"] += new
                    sample["times"] += [now] * new
        return {"samples": samples, "kv_usage": self.pipeline.get_metrics().max_cache_usage}


def main(model: str, settings: str) -> None:
    """Answer lines of stdin until it closes."""
    start = time.perf_counter()
    engine = Engine(model, json.loads(settings))

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    load = time.perf_counter() - start
    answer({"ready": True, "version": openvino_genai.__version__, "load_s": round(load, 2)})
    for line in sys.stdin:
        request = json.loads(line)
        if "count" in request:
            answer({"prompt_tokens": engine.encode(request["count"]).shape[1]})
        else:
            answer(engine.burst(request["burst"], request["output_tokens"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
