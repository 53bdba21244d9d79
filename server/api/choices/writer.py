"""ChoiceFormat: what answers with ``choices`` have in common, those of chats and of completions.

    data: {head,"choices":[{"index":0,"delta":{"content":"text"},"logprobs":null, ...}]}
          prefix                      field        text          plain tail

Everything but the text is encoded once per request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from headstart.server.api.choices.shown import Shown, TokenIdNames, TokenNames
from headstart.server.http.reply import DONE, NO_MORE, Choice, Format, Progress, Usage
from headstart.server.text.tokenizer import Tokenizer

encode = msgspec.json.encode


class ChoiceFormat(Format):
    """``kind`` begins ids; ``event_object`` is the type of events. ``field`` is what stands before
    the text in a choice of an event, ``closes`` what ends that field."""

    kind: ClassVar[str]
    event_object: ClassVar[str]
    field: ClassVar[bytes]
    closes: ClassVar[bytes] = b""

    def __init__(
        self, model: str, tokenizer: Tokenizer, shown: Shown, *, prompt_logprobs: int | None
    ) -> None:
        """``prompt_logprobs``: how many of the likeliest tokens are shown, if any."""
        self._head = {
            "id": shown.answer_id(self.kind),
            "object": self.event_object,
            "created": int(time.time()),
            "model": model,
        }
        self._prefix = b"data: " + encode(self._head)[:-1]
        self._tokenizer = tokenizer
        self._names: TokenNames = TokenIdNames() if shown.tokens_as_ids else tokenizer
        self._prompt_logprobs = prompt_logprobs
        self._shown = shown
        self.every_token = shown.token_ids
        self._no_end = self.closes + b',"logprobs":null,"finish_reason":null'
        tail = (b'}],"usage":null}' if shown.usage else b"}]}") + b"\n\n"
        self._plain_tail = self._no_end + tail
        self._choice_prefix: dict[int, bytes] = {}

    @property
    def answer_id(self) -> str:
        return str(self._head["id"])

    def _start(self, choice: Choice) -> bytes:
        """An event up to the text of a choice."""
        prefix = self._choice_prefix.get(choice.index)
        if prefix is None:
            prefix = self._prefix + b',"choices":[{"index":%d,' % choice.index + self.field
            self._choice_prefix[choice.index] = prefix
        return prefix

    def progress(self, progress: Progress) -> bytes:
        shown = b',"choices":[],"prompt_progress":' + encode(progress)
        return self._prefix + shown + (b',"usage":null' if self._shown.usage else b"") + b"}\n\n"

    def ending(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        if not (self._shown.usage or more):
            return DONE
        counts = {"usage": usage.json()} if self._shown.usage else {}
        last = encode({"choices": [], **counts, **more})
        return self._prefix + b"," + last[1:] + b"\n\n" + DONE
