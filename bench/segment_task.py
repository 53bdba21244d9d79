"""Questions whose answer depends on what comes after the word it is, inside one user turn.

    Came: Mary June Ben Jack Dan
    Left: Jack June Dan Mary
    Who stayed?                             -> Ben

Whether Ben is the answer is decided by the second line. Under a causal mask the first is read
before it: no token there can know whether its name comes again, and whoever stayed has to be found
by the few tokens after both lists. Under a segment mask each name can look for itself below.

Every name is the answer equally often, wherever it stands in the first line.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NAMES = (
    "Tom", "Ann", "Bob", "Sam", "Max", "Dan", "Ben", "Kim", "Lee", "Jim", "Tim", "Ray", "Mary",
    "John", "Paul", "Mark", "Luke", "Anna", "Rose", "Jack", "Alex", "Nick", "Carl", "Fred", "Greg",
    "Neil", "Phil", "Will", "Jane", "Jean", "June",
)  # fmt: skip
"""Each is one token of the default model, with and without a space before it."""

CAME = 24
CHANCE = 1 / CAME
INSTRUCTION = "Answer with a name."

Split = Literal["train", "held-out"]


@dataclass(frozen=True, slots=True)
class Question:
    """``left``: all who ``came`` but the ``answer``, in another order."""

    came: tuple[str, ...]
    left: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        return f"Came: {' '.join(self.came)}\nLeft: {' '.join(self.left)}\nWho stayed?"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat to answer."""
        return [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": self.text},
        ]

    @property
    def split(self) -> Split:
        """By its first line alone, so that none is both trained on and held out, at any seed."""
        return "held-out" if zlib.crc32(" ".join(self.came).encode()) % 8 == 0 else "train"


def questions(split: Split, seed: int) -> Iterator[Question]:
    """An endless stream of questions of one split; equal seeds give equal streams."""
    # Seeded with text, every character counts.
    draw = random.Random(f"{split} {seed}")
    while True:
        came = draw.sample(NAMES, CAME)
        answer, *left = draw.sample(came, CAME)
        question = Question(tuple(came), tuple(left), answer)
        if question.split == split:
            yield question
