"""The requests of a soak test, each with the checks its answer has to pass.

Probe        a greedy prompt whose answer was recorded while nothing else ran
Traffic      one method for each kind of request; a wrong answer raises WrongAnswer
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from headstart.bench.prompts import PromptSource

PROBE_WORDS = 600
PROBE_TOKENS = 48
SHARED_PREFIXES = (300, 700, 1500)
"""Words of the system prompts that many requests begin with."""

Json = dict[str, Any]


class WrongAnswer(Exception):
    """The server broke its contract; the message says how."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongAnswer(message)


@dataclass(slots=True)
class Answer:
    """What came back, streamed or whole, in one form."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: Json | None = None
    logprobs: int = 0

    def add(self, event: Json) -> None:
        """Take in a chunk or a whole body; raises WrongAnswer for an error event."""
        require("error" not in event, f"an error within the answer: {event.get('error')}")
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            require(index not in self.reasons, "a choice went on after its finish_reason")
            if choice["finish_reason"]:
                self.reasons[index] = choice["finish_reason"]
            if choice.get("logprobs"):
                self.logprobs += len(choice["logprobs"]["tokens"])


@dataclass(frozen=True, slots=True)
class Probe:
    """``text`` is the whole answer to ``prompt``."""

    prompt: str
    text: str


BAD_REQUESTS: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b'{"model": ', 400),
    (b'{"model": "%s", "prompt": "\xff"}', 400),
    (b'{"model": "%s", "prompt": "\\ud800"}', 400),
    (b'{"model": "%s", "prompt": "a", "n": 100000}', 400),
    (b'{"model": "%s", "prompt": "a", "temperature": -1}', 400),
    (b'{"model": "%s", "prompt": "a", "max_tokens": -7}', 400),
    (b'{"model": "%s", "prompt": "a", "use_beam_search": true}', 400),
    (b'{"model": "%s", "prompt": [-5]}', 400),
    (b'{"model": "%s", "prompt": "' + b"many words " * 40_000 + b'"}', 400),
    (b'{"model": "no-such-model", "prompt": "a"}', 404),
    (b" " * 10_000_000, 413),
)


class Traffic:
    """Sends requests to one server. Not a load generator: it checks everything it gets."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, source: PromptSource
    ) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._model = model
        self._source = source
        self._fresh = 0
        self.probes: list[Probe] = []
        self.tokens = 0
        self.kinds: dict[str, tuple[int, Callable[[random.Random], Awaitable[None]]]] = {
            "probe": (4, self.probe),
            "shared prefix": (4, self.shared_prefix),
            "fresh prefix": (2, self.fresh_prefix),
            "choices": (2, self.choices),
            "stop string": (2, self.stop_string),
            "logprobs": (1, self.log_probabilities),
            "hang-up": (3, self.hang_up),
            "abort": (2, self.abort),
            "bad request": (3, self.bad_request),
        }

    async def record(self, count: int) -> None:
        """Make ``count`` probes; nothing else may run."""
        for i in range(count):
            prompt = self._source.text(f"probe/{i}", PROBE_WORDS)
            answer = await self._ask(self._greedy(prompt), PROBE_TOKENS)
            self.probes.append(Probe(prompt, answer.texts[0]))

    async def probe(self, draw: random.Random) -> None:
        """A greedy answer is the recorded one."""
        probe = draw.choice(self.probes)
        answer = await self._ask(self._greedy(probe.prompt) | _maybe_stream(draw), PROBE_TOKENS)
        require(
            answer.texts[0] == probe.text,
            f"greedy answer {answer.texts[0]!r}, recorded {probe.text!r}",
        )

    async def shared_prefix(self, draw: random.Random) -> None:
        words = draw.choice(SHARED_PREFIXES)
        prompt = f"{self._source.text(f'shared/{words}', words)} {self._new_text(draw, 40)}"
        await self._sampled(draw, prompt)

    async def fresh_prefix(self, draw: random.Random) -> None:
        await self._sampled(draw, self._new_text(draw, draw.choice((5, 50, 500, 2000))))

    async def _sampled(self, draw: random.Random, prompt: str) -> None:
        wanted = draw.choice((1, 2, 8, 32, 100))
        fields = {"temperature": draw.choice((0, 0.7, 1.5)), "top_p": draw.choice((None, 0.9))}
        if draw.random() < 0.3:
            fields |= {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
        await self._ask(self._body(prompt, wanted) | fields | _maybe_stream(draw), wanted)

    async def choices(self, draw: random.Random) -> None:
        n, wanted = draw.randint(2, 5), draw.choice((4, 16, 40))
        body = self._body(self._new_text(draw, 30), wanted) | {"n": n, "seed": draw.randint(0, 99)}
        await self._ask(body | _maybe_stream(draw), wanted, n)

    async def stop_string(self, draw: random.Random) -> None:
        """The answer ends right before a piece of the recorded text."""
        probe = draw.choice(self.probes)
        start = draw.randrange(len(probe.text) // 2)
        stop = probe.text[start : start + draw.randint(1, 12)]
        body = self._greedy(probe.prompt) | {"stop": [stop]} | _maybe_stream(draw)
        answer = await self._post(body)
        require(
            answer.reasons == {0: "stop"}, f"finish reasons {answer.reasons} with a stop string"
        )
        expected = probe.text[: probe.text.index(stop)]
        require(answer.texts[0] == expected, f"{answer.texts[0]!r}, stop {stop!r}: {expected!r}")

    async def log_probabilities(self, draw: random.Random) -> None:
        wanted = draw.choice((1, 20))
        body = self._body(self._new_text(draw, 20), wanted) | {"logprobs": 3} | _maybe_stream(draw)
        answer = await self._ask(body, wanted)
        require(answer.logprobs == wanted, f"{answer.logprobs} log-probabilities for {wanted}")

    async def hang_up(self, draw: random.Random) -> None:
        """Close the connection after some events."""
        body = self._body(self._new_text(draw, draw.choice((10, 1000))), 1000) | {"stream": True}
        events = draw.choice((0, 1, 5, 50))
        async with self._session.post(self._url, json=body) as response:
            require(response.status == 200, f"status {response.status}")
            async for _ in response.content:
                events -= 1
                if events <= 0:
                    break
            response.close()

    async def abort(self, draw: random.Random) -> None:
        """Go away before the answer, often within the prompt."""
        body = self._body(self._new_text(draw, draw.choice((10, 2000))), 1000)
        request = asyncio.create_task(self._post(body | {"n": draw.choice((1, 3))}))
        await asyncio.sleep(draw.random() * 0.5)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    async def bad_request(self, draw: random.Random) -> None:
        """A 4xx with a message."""
        content, status = draw.choice(BAD_REQUESTS)
        data = content.replace(b"%s", self._model.encode())
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(self._url, data=data, headers=headers) as response:
                body = await response.read()
        except aiohttp.ClientOSError:
            # A server may close the connection on a body it will not read.
            require(status == 413, "the connection was closed on a bad request")
            return
        require(response.status == status, f"{response.status} for {data[:60]!r}, not {status}")
        require(bool(json.loads(body)["error"]["message"]), "an error without a message")

    def _new_text(self, draw: random.Random, words: int) -> str:
        self._fresh += 1
        return self._source.text(f"fresh/{self._fresh}", max(1, words + draw.randint(-3, 3)))

    def _body(self, prompt: str, max_tokens: int) -> Json:
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens}
        return body | {"ignore_eos": True}

    def _greedy(self, prompt: str) -> Json:
        return self._body(prompt, PROBE_TOKENS) | {"temperature": 0}

    async def _ask(self, body: Json, wanted: int, n: int = 1) -> Answer:
        """Send, and check what holds for every complete answer of ``wanted`` tokens a choice."""
        answer = await self._post(body)
        require(
            answer.reasons == dict.fromkeys(range(n), "length"),
            f"finish reasons {answer.reasons} of {n} choices",
        )
        usage = answer.usage
        require(usage is not None, "no usage")
        assert usage is not None
        require(
            usage["completion_tokens"] == n * wanted,
            f"{usage['completion_tokens']} tokens, asked for {n} times {wanted}",
        )
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        require(0 <= cached < usage["prompt_tokens"], f"cached_tokens {cached} in {usage}")
        self.tokens += usage["completion_tokens"]
        return answer

    async def _post(self, body: Json) -> Answer:
        answer = Answer()
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise WrongAnswer(f"status {response.status}: {(await response.text())[:200]}")
            if not body.get("stream"):
                answer.add(await response.json())
                return answer
            last = b""
            async for line in response.content:
                if line.startswith(b"data: "):
                    require(last != b"[DONE]", "an event after [DONE]")
                    last = line.removeprefix(b"data: ").strip()
                    if last != b"[DONE]":
                        answer.add(json.loads(last))
            require(last == b"[DONE]", f"the stream ended with {last[:80]!r}")
        return answer


def _maybe_stream(draw: random.Random) -> Json:
    if draw.random() < 0.5:
        return {}
    return {"stream": True, "stream_options": {"include_usage": True}}
