"""Engine outputs to text: joins a stream, its detokenizer and the stop strings.

    Output(token_ids) -> Detokenizer -> StopStrings -> Delta(text, finish_reason)

A stop string ends the text before it. Text that could be the beginning of one is held back, so
how the text is cut into tokens never changes the result.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headstart.engine.process.messages import Output, TokenLogprobs
from headstart.server.text.answer import Part
from headstart.server.text.detokenizer import Detokenizer
from headstart.server.text.tokenizer import Tokenizer


class StopStrings:
    """Cuts a growing text at the stop string that is complete first (the longest, of those that
    end at the same place)."""

    __slots__ = ("_held", "_include", "_stops", "found", "hit")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """``include``: the stop string itself still belongs to the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.hit = False
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain now. Once ``hit``, nothing more comes."""
        if not self._stops or not text:
            return text
        text = self._held + text
        found = self._find(text)
        if found is None:
            cut = self._hold_from(text)
            self._held = text[cut:]
            return text[:cut]
        self._held = ""
        end, start = found
        self.hit, self.found = True, text[start:end]
        return text[: end if self._include else start]

    def end(self, stop: str) -> str:
        """A stop string has come that is no text, being a special token: the text that is left."""
        self.hit, self.found = True, stop
        return self.flush() + (stop if self._include else "")

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, int] | None:
        """Where the first complete stop string ends, and where it starts."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return best

    def _hold_from(self, text: str) -> int:
        """Where the longest end of ``text`` starts that a stop string may begin with."""
        hold = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), hold)
            while start >= 0:
                if stop.startswith(text[start:]):
                    hold = start
                    break
                start = text.find(stop[0], start + 1, hold)
        return hold


@dataclass(slots=True)
class Delta:
    """What one engine output adds to an answer. ``logprobs`` beside ``offsets``, the characters
    of the answer before each of those tokens; both None when not asked for. ``parts``: those of the
    text that are certain; None when it is text and nothing else. ``token_ids``: those generated,
    whether their text is already there or not."""

    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None
    offsets: list[int] | None = None
    token_ids: Sequence[int] = ()
    parts: list[Part] | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text.

    stops: strings that end it. stop_token_ids: tokens asked for that do. include_stop: what ends
    it, string or token, is text as well. min_tokens: the text of so many tokens holds no stop
    string. skip_special_tokens: they are no text, but for those ``shown``, by id.
    """

    stops: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    shown: Mapping[int, str] = field(default_factory=dict)


class TextAssembler:
    """The text of one answer, output by output. ``num_tokens`` counts every token generated."""

    __slots__ = (
        "_detokenizer",
        "_given",
        "_length",
        "_logprobs",
        "_offsets",
        "_options",
        "_special_stops",
        "_stop_token",
        "_stops",
        "_waiting",
        "cached_tokens",
        "num_tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: TextOptions = TextOptions(),
        *,
        context: Sequence[int] = (),
        logprobs: bool = False,
    ) -> None:
        self._options = options
        self._detokenizer = Detokenizer(
            tokenizer.backend,
            context,
            skip_special_tokens=options.skip_special_tokens,
            shown=options.shown,
        )
        self._stops = StopStrings(options.stops, options.include_stop)
        self._special_stops = _special_stops(tokenizer, options)
        self._logprobs = logprobs
        self._length = 0  # characters detokenised, stop string included
        self._given = 0  # characters given out
        self._waiting: list[TokenLogprobs] = []
        self._offsets: list[int] = []
        self.num_tokens = 0
        self.cached_tokens = 0
        self._stop_token: int | None = None

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string, or the one of ``stop_token_ids``, that ended it; None for an end of
        another kind, as the model's own."""
        return self._stops.found if self._stops.hit else self._stop_token

    def push(self, output: Output) -> Delta:
        """The delta of one output. ``finish_reason`` "stop" for a stop string too: the stream has
        to be aborted then, and nothing may be pushed any more."""
        token_ids, options = output.token_ids, self._options
        unstoppable = options.min_tokens - self.num_tokens
        self.num_tokens += len(token_ids)
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        reason = output.finish_reason
        # The token that ended it is not text.
        shown = len(token_ids) - (reason == "stop" and not options.include_stop)
        if reason == "stop" and token_ids and token_ids[-1] in options.stop_token_ids:
            self._stop_token = token_ids[-1]
        stops = self._stops
        text = ""
        for i in range(shown):
            if self._logprobs and output.logprobs is not None:
                self._waiting.append(output.logprobs[i])
                self._offsets.append(self._length)
            if i >= unstoppable and (special := self._special_stops.get(token_ids[i])):
                text += stops.push(self._detokenizer.flush())
                text += "" if stops.hit else stops.end(special)
            else:
                piece = self._detokenizer.push(token_ids[i])
                self._length += len(piece)
                text += piece if i < unstoppable else stops.push(piece)
            if stops.hit:
                self.num_tokens -= len(token_ids) - i - 1
                return self._delta(text, "stop", token_ids[: i + 1])
        if reason is not None:
            text += stops.push(self._detokenizer.flush())
            if not stops.hit:
                text += stops.flush()
            else:
                reason = "stop"
        return self._delta(text, reason, token_ids)

    def _delta(self, text: str, reason: str | None, token_ids: Sequence[int]) -> Delta:
        if not self._logprobs:
            return Delta(text, reason, token_ids=token_ids)
        self._given += len(text)
        # Log-probabilities come with the text they belong to; tokens of a stop string have none.
        count = bisect_left(self._offsets, self._given)
        if reason is not None and not self._stops.hit:
            count = len(self._offsets)
        logprobs, offsets = self._waiting[:count], self._offsets[:count]
        del self._waiting[:count], self._offsets[:count]
        return Delta(text, reason, logprobs, offsets, token_ids)


def _special_stops(tokenizer: Tokenizer, options: TextOptions) -> dict[int, str]:
    """Stop strings that are special tokens which the text leaves out, by id."""
    if not options.skip_special_tokens:
        return {}
    found = tokenizer.added_tokens(tokenizer.special_among(options.stops))
    return {token_id: text for text, token_id in found.items() if token_id not in options.shown}
