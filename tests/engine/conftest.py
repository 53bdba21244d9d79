"""transformers' own model in float32 as the judge of greedy tokens.

Every output is checked in one pass of the reference over prompt + output: each token must be the
reference's best one, given the tokens before it. By induction that is what its own greedy decoding
gives.

Near ties. Two float32 programs that add in different orders differ in the last bits of a logit.
A token other than the reference's best is accepted if the reference's logit of it is within
TIE of the best; comparison goes on with the token that was chosen. Such ties must be rare:
at most one in MOST_TIES tokens of a run.

Segments reach it as an explicit mask, made here from their definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from headstart.engine.segments import Span

TIE = 1e-3
MOST_TIES = 500


def explicit_mask(spans: Iterable[Span], num_tokens: int) -> torch.Tensor:
    """Which keys each row sees, bool ``[1, 1, num_tokens, num_tokens]``: those up to itself, and
    all of its own segment."""
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    for start, end in spans:
        mask[start:end, start:end] = True
    return mask[None, None]


class Reference:
    """transformers' model in float32: logits of token sequences, each computed once."""

    def __init__(self, folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()
        self.known: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.compared = self.ties = 0

    def logits(self, tokens: list[int], spans: Sequence[Span] = ()) -> torch.Tensor:
        mask = explicit_mask(spans, len(tokens)) if spans else None
        with torch.inference_mode():
            result: torch.Tensor = self.model(
                input_ids=torch.tensor([tokens]), attention_mask=mask
            ).logits[0]
        return result

    def check(
        self,
        prompts: list[list[int]],
        outputs: list[list[int]],
        new: int | None = None,
        spans: list[list[Span]] | None = None,
    ) -> None:
        """Each output is the greedy continuation of its prompt, and ``new`` tokens long.

        ``spans``: the segments of each prompt; none if left out.
        """
        ties = 0
        each = spans or [[] for _ in prompts]
        for prompt, output, segments in zip(prompts, outputs, each, strict=True):
            assert output
            assert new is None or len(output) == new
            key = (*prompt, -1, *output, *segments)
            if key not in self.known:
                logits = self.logits(prompt + output, segments)[len(prompt) - 1 : -1]
                chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
                self.known[key] = (logits.max(dim=-1).values - chosen, logits.argmax(dim=-1))
            short, best = self.known[key]
            different = best != torch.tensor(output)
            worst = float(short.max())
            assert worst <= TIE, f"{worst} below the best at {int(short.argmax())} of {prompt}"
            ties += int(different.sum())
        compared = sum(len(output) for output in outputs)
        self.compared += compared
        self.ties += ties
        assert ties * MOST_TIES <= compared, f"{ties} near ties"


@pytest.fixture(scope="session")
def references() -> Callable[[Path], Reference]:
    loaded: dict[Path, Reference] = {}

    def get(folder: Path) -> Reference:
        if folder not in loaded:
            loaded[folder] = Reference(folder)
        return loaded[folder]

    return get
