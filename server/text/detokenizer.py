"""Token ids to text, one at a time: what is given out never has to be taken back.

The bytes of one character may come in several tokens; they are held until the character is whole,
or shown as U+FFFD when it turns out that it never will be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# No character needs this many tokens: of what is still not valid text by then, all but the last
# character is shown as it is. The decoder looks at everything it holds with each token.
MAX_HELD_TOKENS = 16
# Decoders look a little way back (leading spaces, runs of byte tokens).
CONTEXT_TOKENS = 4


class Detokenizer:
    """Text of one sequence. ``context``: ids before the first one, which are not shown again.
    ``shown``: special tokens that are text even where they are skipped, by id.

    The pieces joined are ``tokenizer.decode(ids)`` for byte-level tokenizers. Tokenizers with
    byte fallback decode a run of bytes as a whole; there a bad byte shows as U+FFFD by itself.
    """

    __slots__ = ("_held", "_seen", "_shown", "_skip_special", "_stream", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown if shown and skip_special_tokens else {}
        self._skip_special = skip_special_tokens
        self._seen = list(context[-CONTEXT_TOKENS:])
        self._held: list[int] = []
        self._stream = self._new_stream()

    def _new_stream(self) -> DecodeStream:
        # DecodeStream would show a context again that ends within a character.
        if self._decode(self._seen).endswith("\ufffd"):
            self._seen = []
        return DecodeStream(ids=list(self._seen), skip_special_tokens=self._skip_special)

    def push(self, token_id: int) -> str:
        """The text that is certain now; may be empty."""
        if token_id in self._shown:
            return self.flush() + self._shown[token_id]
        held = self._held
        held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # DecodeStream raises a bare Exception when the text so far would have to change.
            return self._give_up()
        if text is None:
            return self._release() if len(held) > MAX_HELD_TOKENS else ""
        self._seen = held
        self._held = []
        return text

    def flush(self) -> str:
        """What is held, as it is: bytes that are no character become U+FFFD."""
        if not self._held:
            return ""
        before = self._decode(self._seen)
        text = self._decode(self._seen + self._held)
        if not text.startswith(before):
            return self._give_up()
        self._restart()
        return text[len(before) :]

    def _release(self) -> str:
        """Give out what is held but for the last character, which may still become whole."""
        before = self._decode(self._seen)
        text = self._decode(self._seen + self._held)
        for kept in range(1, len(self._held)):
            head = self._decode(self._seen + self._held[:-kept])
            tail = self._decode(self._held[-kept:])
            if tail == "\ufffd" and head + tail == text and head.startswith(before):
                tokens, self._held = self._held[-kept:], self._held[:-kept]
                self._restart()
                return head[len(before) :] + "".join(map(self.push, tokens))
        return self.flush()

    def _give_up(self) -> str:
        """Decode what is held without what came before."""
        text = self._decode(self._held)
        self._restart()
        return text

    def _restart(self) -> None:
        self._seen = (self._seen + self._held)[-CONTEXT_TOKENS:]
        self._held = []
        self._stream = self._new_stream()

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
