"""The answers and events of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from headstart.server.api.choices.logprobs import chat_logprobs, prompt_logprobs
from headstart.server.api.choices.shown import Shown
from headstart.server.api.choices.writer import ChoiceFormat
from headstart.server.api.openai_chat.parts import message_of, shown_delta
from headstart.server.http.reply import Choice, Usage
from headstart.server.text.answer import Part, Reasoning, Text
from headstart.server.text.assembler import Delta
from headstart.server.text.tokenizer import Tokenizer

encode = msgspec.json.encode


class ChatFormat(ChoiceFormat):
    """``reasoning``: thoughts are shown."""

    kind = "chatcmpl"
    event_object = "chat.completion.chunk"
    field = b'"delta":'
    closes = b"}"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        shown: Shown,
        *,
        logprobs: bool,
        prompt_logprobs: int | None,
        reasoning: bool,
    ) -> None:
        super().__init__(model, tokenizer, shown, prompt_logprobs=prompt_logprobs)
        self._logprobs = logprobs
        self._reasoning = reasoning

    def opening(self, choice: Choice) -> bytes:
        start = self._start(choice) + b'{"role":"assistant","content":' + encode(choice.echoed)
        if self._shown.plain:
            return start + self._plain_tail
        ids = b""
        if self._shown.token_ids:
            ids = b',"prompt_token_ids":' + encode(list(choice.prompt_token_ids))
        return start + self._no_end + self._shown.tail_of(choice, ids)

    def event(self, choice: Choice, delta: Delta) -> bytes:
        start = self._start(choice)
        if delta.parts is not None:
            return b"".join(self._part_events(choice, delta, delta.parts))
        if delta.finish_reason is None and not self._logprobs and self._shown.plain:
            return start + b'{"content":' + encode(delta.text) + self._plain_tail
        shown = {"content": delta.text} if delta.text else {}
        return self._event(choice, shown, delta, delta.finish_reason)

    def _part_events(self, choice: Choice, delta: Delta, parts: Sequence[Part]) -> Iterator[bytes]:
        """An event for each part; log-probabilities and token ids come with the first, the end with
        the last."""
        shown = [found for part in self._visible(parts) if (found := shown_delta(part))]
        reason = delta.finish_reason
        if not shown and (reason is not None or delta.logprobs or self.every_token):
            shown = [{}]
        for i, part in enumerate(shown):
            end = reason if i == len(shown) - 1 else None
            yield self._event(choice, part, delta if i == 0 else None, end)

    def _event(
        self, choice: Choice, shown: dict[str, Any], delta: Delta | None, reason: str | None
    ) -> bytes:
        """``delta``: whose log-probabilities and token ids are shown; None for none."""
        tokens = delta.logprobs if delta is not None else None
        logprobs = chat_logprobs(self._names, tokens or ()) if self._logprobs else None
        return b"".join(
            (
                self._start(choice),
                encode(shown),
                b',"logprobs":',
                encode(logprobs),
                b',"finish_reason":',
                choice.end(reason),
                self._shown.ids_of(delta.token_ids if delta is not None else ()),
                self._shown.tail_of(choice),
            )
        )

    def _visible(self, parts: Sequence[Part]) -> Sequence[Part]:
        if self._reasoning:
            return parts
        return [part for part in parts if not isinstance(part, Reasoning)]

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answers = [
            {
                "index": choice.index,
                "message": message_of(
                    [Text(choice.text)]
                    if choice.parser is None
                    else [Text(choice.echoed), *self._visible(choice.parts)]
                ),
                "logprobs": (
                    chat_logprobs(self._names, choice.logprobs) if self._logprobs else None
                ),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.assembler.stop_reason,
                **({"token_ids": choice.token_ids} if self._shown.token_ids else {}),
            }
            for choice in choices
        ]
        head = self._head | {"object": "chat.completion"}
        if self._shown.token_ids:
            head["prompt_token_ids"] = list(choices[0].prompt_token_ids)
        answer = head | {"choices": answers, "usage": usage.json()}
        if self._prompt_logprobs is not None:
            scores, count = choices[0].scores, self._prompt_logprobs
            answer["prompt_logprobs"] = prompt_logprobs(self._tokenizer, scores, count)
        return encode(answer)
