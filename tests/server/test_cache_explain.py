"""cache_explain: each cause is made over HTTP, and asked for."""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import save_file

import headstart
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.process.messages import (
    AdapterInfo,
    Cause,
    Difference,
    Explanation,
    Missed,
    Output,
    Stats,
)
from headstart.server.http.app import create_app
from headstart.server.http.keys import Keys
from headstart.server.settings import ServerSettings
from headstart.server.text.cache_explain import OPENERS, Explained, Named, describe
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

PAGE = 32
TEMPLATE = """\
{%- if style %}{{- '<|im_start|>system\nStyle: ' + style + '<|im_end|>\n' }}{%- endif %}
{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}{{- '\n\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}\n{%- endfor %}
{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content and not forget %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}
{{- message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if forget %}{{- '<think>\n' }}{%- endif %}{%- endif %}"""

SYSTEM = (
    "You are the assistant of a small library. Answer in one short sentence, name the shelf, and "
    "never make up a title that is not in the list. "
)
LONG = "Where is the book about the history of the lighthouse on the northern coast? "


@dataclass
class InProcess:
    """An engine without a process: who waits for a token has it step."""

    engine: Engine
    ready: bool = True
    restarts: int = 0
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)
    outputs: dict[int, deque[Output]] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.engine.model

    async def start(self) -> None:
        self.adapters = {adapter.name: adapter for adapter in self.engine.model.adapters}

    async def stop(self) -> None:
        pass

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        raise NotImplementedError

    async def unload_adapter(self, name: str) -> None:
        raise NotImplementedError

    def add(self, token_ids: Any, params: Any, **where: Any) -> Any:
        request_id = len(self.outputs)
        self.outputs[request_id] = deque()
        self.engine.add(request_id, array("i", token_ids), params, **where)
        return _Stream(self, request_id)

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs[output.id].append(output)


@dataclass
class _Stream:
    client: InProcess
    id: int
    reported: bool = True

    async def __aiter__(self) -> AsyncIterator[Output]:
        found = self.client.outputs[self.id]
        while True:
            while not found:
                self.client.step()
                await asyncio.sleep(0)
            output = found.popleft()
            yield output
            if output.finish_reason is not None:
                return

    def abort(self) -> None:
        self.client.engine.abort([self.id])


@dataclass
class Served:
    """An app over an engine, and what its clients ask."""

    app: FastAPI
    http: httpx.AsyncClient

    @property
    def engine(self) -> InProcess:
        engine: InProcess = self.app.state.runtime.engine
        return engine

    async def post(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.http.post(path, json={"model": "tiny"} | body, headers=headers)

    async def chat(self, *messages: Any, key: str = "", **fields: Any) -> dict[str, Any]:
        """The answer to a chat; texts are a system message, and then user's and assistant's."""
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        chat = [
            message if isinstance(message, dict) else {"role": role, "content": message}
            for role, message in zip(roles, messages, strict=False)
        ]
        body = {"messages": chat, "max_tokens": 2, "temperature": 0, "ignore_eos": True} | fields
        answer = await self.post("/v1/chat/completions", body, key)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def why(self, *messages: Any, **fields: Any) -> dict[str, Any]:
        answer = await self.chat(*messages, cache_explain=True, **fields)
        found: dict[str, Any] = answer["cache_explain"]
        details = answer["usage"]["prompt_tokens_details"]
        assert found["cached_tokens"] == details["cached_tokens"]
        assert found["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        check(found)
        return found


def check(found: dict[str, Any]) -> None:
    """What holds for every explanation."""
    missed = sum(span["tokens"] for span in found["missed"])
    assert missed == found["prompt_tokens"] - found["cached_tokens"]
    assert all(span["to"] - span["from"] == span["tokens"] > 0 for span in found["missed"])
    assert all(span["why"] for span in found["missed"])
    assert found["page_size"] == PAGE
    assert found["summary"]
    if (difference := found["difference"]) is not None:
        assert 0 <= difference["token"] < found["prompt_tokens"]
        assert difference["here"] != difference["earlier"]
        for name in ("shared", "here", "earlier"):
            assert len(difference[name]) <= 60


def span(found: dict[str, Any], cause: str) -> dict[str, Any]:
    [only] = [span for span in found["missed"] if span["cause"] == cause]
    result: dict[str, Any] = only
    return result


New = Callable[..., Served]


@pytest.fixture
def serve(tiny_model: Callable[..., Path]) -> Iterator[New]:
    apps: list[FastAPI] = []

    def new(*, settings: ServerSettings | None = None, **given: Any) -> Served:
        folder = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=2048)
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.chat_template = TEMPLATE
        config = {"weights": "f32", "threads": 1, "kv_memory": 4 << 20} | given
        engine = InProcess(Engine(EngineConfig(model_path=str(folder), **config)))
        engine.adapters = {adapter.name: adapter for adapter in engine.engine.model.adapters}
        app = create_app(
            engine, tokenizer, model_names=["tiny"], settings=settings or ServerSettings()
        )
        apps.append(app)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        return Served(app, httpx.AsyncClient(transport=transport, base_url="http://test"))

    yield new
    for app in apps:
        app.state.runtime.threads.shutdown(wait=False)


@pytest.fixture
def served(serve: New) -> Served:
    return serve()


# ------------------------------------------------------------------------------- the causes


async def test_who_does_not_ask_is_told_nothing(served: Served) -> None:
    assert "cache_explain" not in await served.chat(SYSTEM, "hi")
    assert "cache_explain" not in await served.chat(SYSTEM, "hi", cache_explain=False)


async def test_never_seen(served: Served) -> None:
    found = await served.why(SYSTEM, "hi")
    assert found["cause"] == "never_seen"
    assert found["cached_tokens"] == 0
    assert found["difference"] is None


async def test_another_prompt_altogether_is_never_seen(served: Served) -> None:
    await served.chat("Everything in this one is about something else, and so it is.", LONG * 2)
    found = await served.why(SYSTEM, "hi")
    assert found["cause"] == "never_seen"
    # The nearest one is told all the same.
    assert found["difference"]["message"] == 0


async def test_fully_cached(served: Served) -> None:
    await served.chat(SYSTEM, LONG)
    found = await served.why(SYSTEM, LONG)
    assert found["cause"] == "fully_cached"
    assert {span["cause"] for span in found["missed"]} <= {"below_page", "last_token"}
    assert found["cached_tokens"] > 0


async def test_sampling_does_not_matter(served: Served) -> None:
    await served.chat(SYSTEM, LONG)
    found = await served.why(
        SYSTEM, LONG, temperature=1.3, top_p=0.5, seed=7, max_tokens=5, stop=["never"], n=2
    )
    assert found["cause"] == "fully_cached"


async def test_a_prompt_below_a_page(served: Served) -> None:
    await served.chat("Hi", "ok")
    found = await served.why("Hi", "ok")
    assert found["cause"] == "below_page"
    assert f"whole pages of {PAGE} tokens" in span(found, "below_page")["why"]


async def test_the_last_token_is_always_computed(served: Served) -> None:
    ids = {"prompt": [5 + i for i in range(2 * PAGE)], "max_tokens": 1}
    await served.post("/v1/completions", ids)
    answer = await served.post("/v1/completions", ids | {"cache_explain": True})
    found = answer.json()["cache_explain"]
    check(found)
    assert span(found, "last_token")["from"] == PAGE
    assert "its page with it" in span(found, "last_token")["why"]


async def test_text_of_a_message_has_changed(served: Served) -> None:
    await served.chat(SYSTEM, LONG + "Is it red?")
    found = await served.why(SYSTEM, LONG + "Is it blue?")
    difference = found["difference"]
    assert (difference["message"], difference["role"]) == (1, "user")
    assert difference["shared"].endswith("coast? Is it ")
    assert difference["here"].startswith("blue?")
    assert difference["earlier"].startswith("red?")
    assert difference["earlier_ended_seconds_ago"] >= 0
    assert span(found, "text_changed")["why"].startswith("the text in message 1 (user)")


async def test_a_small_change_within_the_first_page(served: Served) -> None:
    await served.chat("Be kind. " + SYSTEM, "hi")
    found = await served.why("Be good. " + SYSTEM, "hi")
    assert found["difference"]["token"] < PAGE
    assert found["cause"] == "text_changed"


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("2026-12-01", "2026-12-02"),
        ("1 December 2026", "2 December 2026"),
        ("Monday, November 30, 2026", "Tuesday, December 1, 2026"),
        ("Dec 9, 2026 at 9:30 AM", "Dec 10, 2026 at 9:30 AM"),
        ("14:50:59", "14:51:03"),
        ("2026-12-01T14:50:59Z", "2026-12-01T14:51:03Z"),
        ("1795957948", "1795957960"),
        ("31.12.2026", "1.1.2027"),
    ],
)
async def test_a_date_in_the_system_prompt(served: Served, then: str, now: str) -> None:
    await served.chat(f"{SYSTEM}It is {then} now. {SYSTEM}", "hi")
    found = await served.why(f"{SYSTEM}It is {now} now. {SYSTEM}", "hi")
    assert found["cause"] == "template_drift"
    assert f"from {then!r} to {now!r}" in found["summary"]
    assert "in message 0 (system)" in found["summary"]
    assert found["difference"]["role"] == "system"


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("25 shelves", "28 shelves"),
        ("10.0.0.12", "10.0.0.13"),
        ("v1.2.30", "v1.2.31"),
        ("0301234567", "0301234568"),
        ("a Sunny day", "a Sundry day"),
        ("deadbeefdeadbeef", "deadbeefcafebeef"),
    ],
)
async def test_a_number_is_no_date(served: Served, then: str, now: str) -> None:
    await served.chat(f"{SYSTEM}There is {then}, they say. {SYSTEM}", "hi")
    found = await served.why(f"{SYSTEM}There is {now}, they say. {SYSTEM}", "hi")
    assert found["cause"] == "text_changed"


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("3f2b8c1e-9a47-4d0e-8b16-0c5d7e9f1a2b", "3f2b8c1e-0a47-4d0e-8b16-0c5d7e9f1a2c"),
        ("9f86d081884c7d659a2f", "9f86d081884c7d659a30"),
    ],
)
async def test_an_identifier_in_the_system_prompt(served: Served, then: str, now: str) -> None:
    await served.chat(f"{SYSTEM}Session {then}. {SYSTEM}", "hi")
    found = await served.why(f"{SYSTEM}Session {now}. {SYSTEM}", "hi")
    assert found["cause"] == "template_drift"
    assert f"an identifier in message 0 (system) has changed, from {then!r}" in found["summary"]


async def test_the_oldest_turns_are_dropped(served: Served) -> None:
    turns = ["And the one on tides?", "It is on shelf nine.", "Which shelf was that again?"]
    await served.chat(SYSTEM, LONG, "It is on shelf four.", *turns)
    found = await served.why(SYSTEM, *turns)
    assert found["cause"] == "text_removed"
    assert "as when the oldest turns are dropped" in found["summary"]
    assert found["difference"]["message"] == 1


async def test_text_is_put_in(served: Served) -> None:
    await served.chat(SYSTEM, LONG * 2)
    found = await served.why(SYSTEM, "Shelf nine has books on tides and birds. " + LONG * 2)
    assert found["cause"] == "text_inserted"
    assert "tokens are put in, in message 1 (user)" in found["summary"]


def tool(name: str) -> dict[str, Any]:
    function = {"name": name, "description": f"It can {name}.", "parameters": {"type": "object"}}
    return {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["find", "lend"], ["find", "return"]),
        (["find", "lend"], ["lend", "find"]),
        (["find", "lend"], ["find"]),
        (["find"], ["find", "lend"]),
        ([], ["find"]),
        (["find"], []),
    ],
)
async def test_tools_have_changed(served: Served, then: list[str], now: list[str]) -> None:
    await served.chat(SYSTEM, LONG, tools=[tool(name) for name in then] or None)
    found = await served.why(SYSTEM, LONG, tools=[tool(name) for name in now] or None)
    assert found["cause"] == "tools_changed"
    assert found["difference"]["message"] is None


def thought(reasoning: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": "It is on shelf nine, at the window."}
    return message if reasoning is None else message | {"reasoning_content": reasoning}


async def test_the_client_drops_the_reasoning(served: Served) -> None:
    await served.chat(SYSTEM, LONG, thought("They want the shelf."), LONG)
    found = await served.why(SYSTEM, LONG, thought(None), LONG)
    assert found["cause"] == "reasoning_dropped"
    assert "the client did not send back" in found["summary"]
    assert found["difference"]["message"] == 2
    assert found["difference"]["earlier"].startswith("<think>")


async def test_the_template_drops_the_reasoning(served: Served) -> None:
    variables = {"chat_template_kwargs": {"forget": True}}
    await served.chat(SYSTEM, LONG, **variables)
    found = await served.why(SYSTEM, LONG, thought("They want the shelf."), LONG, **variables)
    assert found["cause"] == "reasoning_dropped"
    assert "the chat template leaves the thoughts of earlier turns out" in found["summary"]


async def test_what_the_template_writes_has_changed(served: Served) -> None:
    await served.chat(SYSTEM, LONG, chat_template_kwargs={"style": "terse"})
    found = await served.why(SYSTEM, LONG, chat_template_kwargs={"style": "wordy"})
    assert found["cause"] == "template_changed"
    assert found["difference"]["message"] is None
    assert found["difference"]["earlier"].startswith("terse")


async def test_a_conversation_goes_on(served: Served) -> None:
    answer = await served.chat(SYSTEM, LONG, max_tokens=8)
    said = answer["choices"][0]["message"]["content"]
    found = await served.why(SYSTEM, LONG, said, LONG + "And the second one?")
    assert found["cached_tokens"] >= answer["usage"]["prompt_tokens"] // PAGE * PAGE - PAGE


async def test_new_behind_a_prompt_that_is_cached(served: Served) -> None:
    ids = [5 + i for i in range(100)]
    first = {"prompt": ids, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    [made] = (await served.post("/v1/completions", first)).json()["choices"][0]["token_ids"]
    longer = {"prompt": [*ids, made, *range(9, 80)], "max_tokens": 1, "cache_explain": True}
    found = (await served.post("/v1/completions", longer)).json()["cache_explain"]
    check(found)
    assert found["cause"] == "new"


async def test_evicted(serve: New) -> None:
    served = serve(kv_memory=1 << 20)
    await served.chat(SYSTEM, LONG)
    for i in range(24):
        await served.chat(f"{i} {SYSTEM}", LONG * 3)
    found = await served.why(SYSTEM, LONG)
    assert found["cause"] == "evicted"
    assert span(found, "evicted")["seconds_ago"] >= 0
    assert "a prompt needed their pages" in found["summary"]


async def test_evicted_for_an_answer(serve: New) -> None:
    served = serve(kv_memory=1 << 20)
    await served.chat(SYSTEM, LONG)
    await served.chat("Hi", "ok", max_tokens=2000)
    found = await served.why(SYSTEM, LONG)
    assert "an answer that grew needed their pages" in span(found, "evicted")["why"]


async def test_another_salt_says_the_same_as_a_new_prompt(served: Served) -> None:
    await served.chat(SYSTEM, LONG, cache_salt="theirs")
    found = await served.why(SYSTEM, LONG, cache_salt="mine")
    assert found["cause"] == "not_seen_under_salt"
    assert found["difference"] is None
    fresh = await served.why(SYSTEM.upper(), LONG, cache_salt="new")
    assert [s["cause"] for s in fresh["missed"]] == [s["cause"] for s in found["missed"]]
    assert [s["why"] for s in fresh["missed"]] == [s["why"] for s in found["missed"]]


ONE, OTHER = "the-key-of-one-tenant", "the-key-of-another-tenant"


async def test_another_key_is_told_nothing(serve: New) -> None:
    served = serve(settings=ServerSettings(keys=Keys.of((ONE, OTHER))))
    await served.chat(SYSTEM, LONG + "My secret is four.", key=ONE)
    found = await served.why(SYSTEM, LONG + "What?", key=OTHER)
    assert found["cause"] == "not_seen_under_salt"
    assert found["difference"] is None
    assert (await served.why(SYSTEM, LONG + "What?", key=ONE))["difference"] is not None


async def test_a_shared_cache_shares_no_texts(serve: New) -> None:
    served = serve(settings=ServerSettings(keys=Keys.of((ONE, OTHER)), shared_cache=True))
    await served.chat(SYSTEM, LONG + "My secret is four.", key=ONE)
    found = await served.why(SYSTEM, LONG + "What?", key=OTHER)
    assert found["cached_tokens"] > 0
    assert found["difference"] is None
    assert "secret" not in json.dumps(found)


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter of the tiny model."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    ones = {"lora_A": np.ones((4, 64), np.float32), "lora_B": np.ones((64, 4), np.float32)}
    tensors = {f"{module}.{name}.weight": values for name, values in ones.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


async def test_another_adapter(serve: New, tmp_path: Path) -> None:
    served = serve(adapters={"poet": str(write_adapter(tmp_path))})
    await served.chat(SYSTEM, LONG, model="poet")
    found = await served.why(SYSTEM, LONG)
    assert found["cause"] == "other_adapter"
    assert "the adapter 'poet'" in found["summary"]
    await served.chat("Another. " + SYSTEM, LONG)
    found = await served.why("Another. " + SYSTEM, LONG, model="poet")
    assert "the model without an adapter" in found["summary"]


async def test_another_segment_mask(served: Served) -> None:
    await served.chat(SYSTEM, LONG)
    found = await served.why(SYSTEM, LONG, segment_mask="turns")
    assert found["cause"] == "other_segment_mask"
    assert "the segment mask causal" in found["summary"]


async def test_a_segment_that_has_changed(served: Served) -> None:
    await served.chat(SYSTEM, LONG + LONG + "Is it red?", segment_mask="turns")
    found = await served.why(SYSTEM, LONG + LONG + "Is it blue?", segment_mask="turns")
    assert found["cause"] == "segment_changed"
    assert "see each other whole" in found["summary"]


async def test_rows_that_are_read(served: Served) -> None:
    await served.chat(SYSTEM, LONG)
    found = await served.why(SYSTEM, LONG, prompt_logprobs=1)
    assert found["cause"] == "reads_prompt"
    body = {"prompt": LONG * 2, "echo": True, "logprobs": 1, "max_tokens": 1}
    answer = await served.post("/v1/completions", body | {"cache_explain": True})
    assert answer.json()["cache_explain"]["cause"] == "reads_prompt"


async def test_prefix_caching_off(serve: New) -> None:
    served = serve(prefix_caching=False)
    await served.chat(SYSTEM, LONG)
    found = await served.why(SYSTEM, LONG)
    assert found["cause"] == "prefix_caching_off"
    assert "--no-prefix-caching" in found["summary"]


async def test_an_earlier_request_was_aborted(serve: New) -> None:
    served = serve(max_batched_tokens=32)
    tokenizer = served.app.state.runtime.tokenizer
    ids = tokenizer.encode(LONG * 3, add_special_tokens=False)
    body = {"prompt": ids, "max_tokens": 2}
    task = asyncio.create_task(served.post("/v1/completions", body))
    while not served.engine.engine._scheduler.cached_tokens and served.engine.engine._steps < 2:
        await asyncio.sleep(0)
    served.engine.engine.abort([0])
    task.cancel()
    answer = await served.post("/v1/completions", body | {"cache_explain": True})
    found = answer.json()["cache_explain"]
    check(found)
    assert "was aborted before their KV was" in span(found, "not_computed")["why"]


async def test_waits_for_another_that_computes_it(serve: New) -> None:
    served = serve(max_batched_tokens=32)
    first = asyncio.create_task(served.chat(SYSTEM, LONG * 2))
    while not served.engine.engine._steps:
        await asyncio.sleep(0)
    found = await served.why(SYSTEM, LONG * 2)
    await first
    assert found["computed_meanwhile"] > 0
    assert "being computed for another request" in found["summary"]


async def test_an_earlier_one_still_waits(serve: New) -> None:
    served = serve(max_batched_tokens=32, scheduling_policy="priority")
    later = asyncio.create_task(served.chat(SYSTEM, LONG * 2, priority=9))
    while not served.engine.outputs:
        await asyncio.sleep(0)
    found = await served.why(SYSTEM, LONG, priority=1)
    await later
    assert {"being_computed", "below_page"} & {s["cause"] for s in found["missed"]}


# ------------------------------------------------------------------------------- the APIs


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def test_completions_have_no_messages(served: Served) -> None:
    body = {"prompt": LONG + "one", "max_tokens": 1}
    await served.post("/v1/completions", body)
    answer = await served.post(
        "/v1/completions", {"prompt": LONG + "two", "max_tokens": 1, "cache_explain": True}
    )
    found = answer.json()["cache_explain"]
    check(found)
    assert found["difference"]["message"] is None
    assert found["difference"]["here"] == "two"
    assert "in the prompt" in span(found, "text_changed")["why"]


async def test_several_prompts_are_refused(served: Served) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 1, "cache_explain": True}
    answer = await served.post("/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_explain"


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_streams_say_it_in_their_last_event(served: Served, path: str, usage: bool) -> None:
    body: dict[str, Any] = {"max_tokens": 2, "stream": True, "cache_explain": True}
    body |= (
        {"prompt": LONG}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": LONG}]}
    )
    if usage:
        body["stream_options"] = {"include_usage": True}
    answer = await served.post(path, body)
    assert answer.text.endswith("data: [DONE]\n\n")
    *others, last = events(answer)
    assert all("cache_explain" not in event for event in others)
    assert last["cache_explain"]["cause"] == "never_seen"
    assert last["choices"] == []
    assert ("usage" in last) is usage


async def test_responses(served: Served) -> None:
    body = {"instructions": SYSTEM, "input": LONG, "max_output_tokens": 2, "cache_explain": True}
    answer = (await served.post("/v1/responses", body)).json()
    assert answer["cache_explain"]["cause"] == "never_seen"
    stored = await served.http.get(f"/v1/responses/{answer['id']}")
    assert "cache_explain" not in stored.json()  # it is about the moment
    last = events(await served.post("/v1/responses", body | {"stream": True}))[-1]
    assert last["response"]["cache_explain"]["cause"] == "fully_cached"


async def test_anthropic_messages(served: Served) -> None:
    body = {
        "system": SYSTEM,
        "messages": [{"role": "user", "content": LONG}],
        "max_tokens": 2,
        "cache_explain": True,
    }
    answer = (await served.post("/v1/messages", body)).json()
    assert answer["cache_explain"]["cause"] == "never_seen"
    found = events(await served.post("/v1/messages", body | {"stream": True}))
    [last] = [event for event in found if event["type"] == "message_delta"]
    assert last["cache_explain"]["cause"] == "fully_cached"


async def test_it_can_be_turned_off(serve: New) -> None:
    served = serve(settings=ServerSettings(cache_explain=False))
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert (await served.post("/v1/chat/completions", body)).status_code == 200
    answer = await served.post("/v1/chat/completions", body | {"cache_explain": True})
    assert answer.status_code == 400
    assert "--no-cache-explain" in answer.json()["error"]["message"]


async def test_a_template_that_does_not_write_texts_as_they_are(served: Served) -> None:
    runtime = served.app.state.runtime
    tokenizer = Tokenizer(
        runtime.tokenizer.backend,
        chat_template="{% for message in messages %}{{ message.content | upper }}\n{% endfor %}",
    )
    runtime.chat_template = ChatTemplate(tokenizer)
    await served.chat(SYSTEM, LONG + "red")
    found = await served.why(SYSTEM, LONG + "blue")
    # A sign amid the text is written as it is, so the place of the middle is known, and no more.
    assert found["difference"]["here"].startswith("BLUE")


# ------------------------------------------------------------------------------- words


def test_each_cause_is_in_the_documents() -> None:
    root = Path(headstart.__file__).parent.joinpath("server").resolve().parent
    page = (root / "docs" / "cache-explain.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page.partition("## Causes")[2], re.MULTILINE))
    assert named == {*get_args(Cause), *get_args(Named)} - {"differs"}


def test_characters_that_are_cut_amid(tokenizer: Tokenizer) -> None:
    here, earlier = (tokenizer.encode(f"x é{c}", add_special_tokens=False) for c in "üö")
    at = next(i for i, (a, b) in enumerate(zip(here, earlier, strict=True)) if a != b)
    explanation = Explanation(
        PAGE, [Missed(0, len(here), "differs")], Difference(at, 0, earlier, 1.0)
    )
    found = describe(tokenizer, explanation, Explained(here))
    assert found["difference"]["here"] == "ü"
    assert found["difference"]["earlier"] == "ö"
    assert found["difference"]["shared"] == "x é"


def test_a_request_that_was_preempted(tokenizer: Tokenizer) -> None:
    missed = [Missed(0, 3, "below_page"), Missed(3, 4, "last_token")]
    for count, words in ((1, "lost its pages to others once"), (3, "3 times")):
        explanation = Explanation(PAGE, missed, preemptions=count)
        found = describe(tokenizer, explanation, Explained([1, 2, 3, 4]))
        assert found["preemptions"] == count
        assert words in found["summary"]


def test_thoughts_of_another_format(tokenizer: Tokenizer) -> None:
    """Which part amid the opening mark: both answers open a channel."""
    earlier, here = (
        tokenizer.encode(f"Hello there. <|channel|>{rest}", add_special_tokens=False)
        for rest in ("analysis<|message|>Hm.", "final<|message|>Hi.")
    )
    at = next(i for i, (a, b) in enumerate(zip(earlier, here, strict=False)) if a != b)
    explanation = Explanation(
        PAGE, [Missed(0, len(here), "differs")], Difference(at, 0, earlier, 1.0)
    )
    asked = Explained(here, openers=OPENERS)
    assert describe(tokenizer, explanation, asked)["cause"] == "reasoning_dropped"
    # And the other way round nothing is dropped.
    at = next(i for i, (a, b) in enumerate(zip(earlier, here, strict=False)) if a != b)
    explanation = Explanation(
        PAGE, [Missed(0, len(earlier), "differs")], Difference(at, 0, here, 1.0)
    )
    asked = Explained(earlier, openers=OPENERS)
    assert describe(tokenizer, explanation, asked)["cause"] != "reasoning_dropped"
