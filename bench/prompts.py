"""Prompts of a wanted length: random common English words, the same for the same seed.

Every word in words.txt is one token in the usual byte-pair vocabularies, with and without a space
before it, so the tokens of a prompt are `overhead + words` and two short requests calibrate any
length (see Calibration). Prompts with different labels share nothing but the chat template's
header, so one never warms the prefix cache of another.
"""

import random
from dataclasses import dataclass
from functools import cache
from importlib import resources

Messages = list[dict[str, str]]

USER_WORDS = 24


@cache
def words() -> tuple[str, ...]:
    """The bundled word list, without duplicates."""
    return tuple(resources.files(__package__).joinpath("words.txt").read_text("utf-8").split())


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Conversations of one system turn and one user turn; equal labels give equal text."""

    seed: int

    def text(self, label: str, count: int) -> str:
        """`count` random words; labels name independent streams of the seed."""
        draw = random.Random(f"{self.seed}/{label}")
        return " ".join(draw.choices(words(), k=count))

    def conversation(self, system: str, system_words: int, user: str) -> Messages:
        """A system turn of `system_words` words and a user turn of 24, named by their labels."""
        return [
            {"role": "system", "content": self.text(f"system/{system}", system_words)},
            {"role": "user", "content": self.text(f"user/{user}", USER_WORDS)},
        ]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How many tokens a conversation has: `overhead + per_word * system words`."""

    overhead: float
    per_word: float

    SHORT = 32
    LONG = 160

    @classmethod
    def from_counts(cls, short: int, long: int) -> "Calibration":
        """From the prompt tokens of conversations with SHORT and LONG system words."""
        if not 0 < short < long:
            raise ValueError(
                f"a longer prompt must have more tokens: {cls.SHORT} system words gave {short}, "
                f"{cls.LONG} gave {long}"
            )
        per_word = (long - short) / (cls.LONG - cls.SHORT)
        return cls(overhead=short - per_word * cls.SHORT, per_word=per_word)

    def prompt_tokens(self, system_tokens: int) -> int:
        """Tokens of a prompt whose system turn alone has `system_tokens`."""
        return round(self.overhead + system_tokens)

    def system_words(self, prompt_tokens: int) -> int:
        """System words for a prompt of about `prompt_tokens` (exact when a word is a token)."""
        count = round((prompt_tokens - self.overhead) / self.per_word)
        if count < 1:
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens is too short: the chat template and the user "
                f"turn alone take {self.overhead:.0f}"
            )
        return count
