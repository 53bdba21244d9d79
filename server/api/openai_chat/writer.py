"""The answers and events of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from headstart.server.api.choices.logprobs import chat_logprobs, prompt_logprobs
from headstart.server.api.choices.shown import Shown
from headstart.server.api.choices.writer import ChoiceFormat
from headstart.server.api.openai_chat.parts import Deltas, message_of
from headstart.server.http.reply import NO_MORE, Choice, Usage
from headstart.server.text.answer import Part, Reasoning, Text
from headstart.server.text.assembler import Delta
from headstart.server.text.tokenizer import Tokenizer

encode = msgspec.json.encode


class ChatFormat(ChoiceFormat):
    """``reasoning``: thoughts are shown. ``custom``: tools that take a text."""

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
        custom: Collection[str] = (),
    ) -> None:
        super().__init__(model, tokenizer, shown, prompt_logprobs=prompt_logprobs)
        self._logprobs = logprobs
        self._reasoning = reasoning
        self._custom = custom
        self._deltas: dict[int, Deltas] = {}  # by the index of their choice

    def opening(self, choice: Choice) -> bytes:
        start = self._start(choice) + b'{"role":"assistant","content":' + encode(choice.echoed)
        if self._shown.plain:
            return start + self._plain_tail
        ids = b""
        if self._shown.token_ids:
            ids = b',"prompt_token_ids":' + encode(list(choice.prompt_token_ids))
        return start + self._no_end + self._shown.tail_of(choice, ids)

    def event(self, choice: Choice, delta: Delta) -> bytes:
        """The end has an event of its own, with an empty delta."""
        if delta.parts is not None:
            deltas = self._deltas_of(choice, delta.parts, last=delta.finish_reason is not None)
        else:
            if delta.finish_reason is None and not self._logprobs and self._shown.plain:
                return self._start(choice) + b'{"content":' + encode(delta.text) + self._plain_tail
            deltas = [{"content": delta.text}] if delta.text else []
        reason = delta.finish_reason
        events = [
            self._event(choice, shown, None if i else delta, None) for i, shown in enumerate(deltas)
        ]
        if reason is not None:
            events.append(self._event(choice, {}, None if deltas else delta, reason))
        elif not deltas and (delta.parts is None or delta.logprobs or self.every_token):
            events.append(self._event(choice, {}, delta, None))
        return b"".join(events)

    def _deltas_of(
        self, choice: Choice, parts: Sequence[Part], *, last: bool
    ) -> list[dict[str, Any]]:
        deltas = self._deltas.setdefault(choice.index, Deltas(self._custom))
        shown = [found for part in self._visible(parts) if (found := deltas.of(part))]
        return [*shown, *deltas.cut()] if last else shown

    def _event(
        self, choice: Choice, shown: dict[str, Any], delta: Delta | None, reason: str | None
    ) -> bytes:
        """``delta``: whose log-probabilities and token ids come with it; None for none."""
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

    def body(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        answers = [
            {
                "index": choice.index,
                "message": message_of(
                    [Text(choice.text)]
                    if choice.parser is None
                    else [Text(choice.echoed), *self._visible(choice.parts)],
                    self._custom,
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
        return encode({**answer, **more})
