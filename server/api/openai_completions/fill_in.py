"""Text between a prompt and a suffix, for models that were trained to fill it in.

Such a vocabulary has tokens of its own for that (Efficient Training of Language Models to Fill in
the Middle, arXiv 2207.14255). In which order the parts come is the model family's.
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.server.text.tokenizer import Tokenizer

PREFIX, SUFFIX = "prefix", "suffix"
"""Places of the two texts in a layout."""

LAYOUTS = (
    ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", PREFIX, "<fim-suffix>", SUFFIX, "<fim-middle>"),  # SantaCoder
    ("<|code_prefix|>", PREFIX, "<|code_suffix|>", SUFFIX, "<|code_middle|>"),  # GLM
    ("<｜fim▁begin｜>", PREFIX, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>"),  # DeepSeek
    ("▁<PRE>", PREFIX, "▁<SUF>", SUFFIX, "▁<MID>"),  # Code Llama
    ("[SUFFIX]", SUFFIX, "[PREFIX]", PREFIX),  # Codestral
)


def layout_of(tokenizer: Tokenizer) -> Sequence[str] | None:
    """How this model's parts are laid out; None when it fills nothing in."""
    for layout in LAYOUTS:
        marks = [part for part in layout if part not in (PREFIX, SUFFIX)]
        if len(tokenizer.added_tokens(marks)) == len(marks):
            return layout
    return None


def filled_in(
    tokenizer: Tokenizer,
    layout: Sequence[str],
    prompt: str | Sequence[int],
    suffix: str,
    *,
    add_special_tokens: bool,
) -> list[int]:
    """The ids that a model goes on from with what is between ``prompt`` and ``suffix``."""
    marks = tokenizer.added_tokens(layout)
    ids = tokenizer.encode("", add_special_tokens=True)[:1] if add_special_tokens else []
    for part in layout:
        if part in marks:
            ids.append(marks[part])
        elif part == SUFFIX:
            ids += tokenizer.encode(suffix, add_special_tokens=False)
        elif isinstance(prompt, str):
            ids += tokenizer.encode(prompt, add_special_tokens=False)
        else:
            ids += prompt
    return ids
