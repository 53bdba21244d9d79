"""A GGUF file's tokenizer as tokenizer.json, tokenizer_config.json and the chat template.

    warnings = write_tokenizer(GGUFFile(path), folder)

Text becomes the tokens it becomes in llama.cpp (llama_tokenize with parse_special; a test compares
them): byte pairs ("gpt2"), cut first as ``tokenizer.ggml.pre`` says, or SentencePiece's pairs by
score ("llama"). transformers' own reading of GGUF files knows no ``pre``.

Nothing in the file is trusted: what is missing, of another type, length or range than it must be is
a ModelError of one line that names the key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from headstart.engine.errors import ModelError
from headstart.engine.models.files.gguf import END_TOKENS
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.pre_tokenizers import DEFAULT, PRE_TOKENIZERS, PreTokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Of ``tokenizer.ggml.token_type``: those found in text before anything else is done to it."""
CONTROL_TEXTS = frozenset(END_TOKENS) | {
    *("<turn|>", "<eos>", "<|return|>", "<|flush|>", "<|call|>", "<|calls|>")
}
"""Tokens that llama.cpp takes for control tokens whatever the file says they are."""
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Special tokens: in GGUF's keys, and in tokenizer_config.json."""
TEMPLATES = (
    ("chat_template", "chat_template.jinja"),
    ("chat_template.tool_use", "additional_chat_templates/tool_use.jinja"),
)
"""Chat templates in GGUF's keys, and where transformers keeps them; the second is for chats with
tools."""
MAX_ADDED = 1 << 16
"""More tokens of those types than any vocabulary has; each is compared with all the others."""
MAX_PIECE = 512
"""Characters of the longest SentencePiece token; its pairs are found by trying every cut."""


def write_tokenizer(file: GGUFFile, target: Path) -> list[str]:
    """Write the files into the folder ``target``; returns warnings, one line each.

    Raises ModelError naming the metadata key that is missing, wrong or not supported.
    """
    reader = _Reader(file)
    tokenizer = reader.tokenizer()
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{NAMES[name]: reader.tokens[i] for name, i in reader.ids.items()},
    }
    for path, template in reader.chat_templates().items():
        (target / path).parent.mkdir(exist_ok=True)
        (target / path).write_text(template, encoding="utf-8")
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return reader.warnings


class _Reader:
    """What the keys ``tokenizer.ggml.*`` of one file say, checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.warnings: list[str] = []
        self.model = self.value("model", str, "")
        if self.model not in ("gpt2", "llama"):
            self.fail("model", f"is {self.model!r:.40}; supported are 'gpt2' and 'llama'")
        self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(self.strings("tokens"))]
        self.vocabulary = {text: i for i, text in enumerate(self.tokens)}
        if len(self.vocabulary) < len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.vocabulary[t] != i)
            self.fail("tokens", f"has {twice!r:.40} twice")
        embedding = file.tensors.get("token_embd.weight")
        if embedding is not None and len(self.tokens) > embedding.shape[0]:
            self.fail("tokens", f"are {len(self.tokens)}, token_embd.weight has fewer rows")
        # Where a SentencePiece file names none, llama.cpp takes the first three.
        first = {"unknown": 0, "bos": 1, "eos": 2} if self.model == "llama" else {}
        self.ids: dict[str, int] = {}
        for name in NAMES:
            token_id = self.token_id(name, first.get(name))
            if token_id is not None:
                self.ids[name] = token_id

    def tokenizer(self) -> Tokenizer:
        """The whole tokenizer, with special tokens and what is put around a text."""
        if self.model == "llama":
            tokenizer, add_bos = self.sentencepiece(), True
        else:
            pre = self.pre_tokenizer()
            tokenizer, add_bos = self.byte_pairs(pre), pre.add_bos
        types = self.numbers("token_type", np.integer)
        control, defined = [], []
        for i, text in enumerate(self.tokens):
            kind = None if types is None else types[i]
            if kind in (UNKNOWN, CONTROL) or text in CONTROL_TEXTS:
                control.append(AddedToken(text, special=True, normalized=False))
            elif kind == USER_DEFINED:
                defined.append(AddedToken(text, special=False, normalized=False))
        if len(control) + len(defined) > MAX_ADDED:
            self.fail("token_type", f"names more than {MAX_ADDED} special tokens")
        tokenizer.add_special_tokens(control)
        tokenizer.add_tokens(defined)
        bos = self.ids.get("bos") if self.value("add_bos_token", bool, add_bos) else None
        eos = self.ids.get("eos") if self.value("add_eos_token", bool, False) else None
        if bos is not None or eos is not None:
            tokenizer.post_processor = _around(tokenizer, bos, eos)
        return tokenizer

    def pre_tokenizer(self) -> PreTokenizer:
        name = self.value("pre", str, None)
        found = PRE_TOKENIZERS.get(name or "")
        if found is not None:
            return found
        what = "is missing" if name is None else f"{name!r:.40} is not known"
        self.warnings.append(
            f"tokenizer.ggml.pre {what}: text is cut into words by llama.cpp's default pattern, "
            "and may become other tokens than the model was trained on"
        )
        return DEFAULT

    def byte_pairs(self, pre: PreTokenizer) -> Tokenizer:
        """BPE over bytes written in GPT-2's alphabet."""
        merges: dict[tuple[str, str], None] = {}  # the first of two equal ones counts
        for i, merge in enumerate(self.strings("merges")):
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or not {left, right, left + right} <= self.vocabulary.keys():
                self.fail("merges", f"has {merge!r:.40}, at {i}, which does not join two tokens")
            merges[left, right] = None
        tokenizer = Tokenizer(
            models.BPE(vocab=self.vocabulary, merges=[*merges], ignore_merges=pre.ignore_merges)
        )
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        steps = [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        absent = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in self.vocabulary]
        if absent:
            # Bytes without a token have none in the text, and nothing is joined across them.
            characters = "".join(rf"\x{{{ord(c):x}}}" for c in sorted(absent))
            steps.append(pre_tokenizers.Split(Regex(f"[{characters}]"), "removed"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def sentencepiece(self) -> Tokenizer:
        """Pairs whose token has the best score are joined first; bytes stand for what is left."""
        scores = self.numbers("scores", np.number)
        if scores is None:
            self.fail("scores", "is missing")
        if not np.isfinite(scores).all():
            self.fail("scores", "holds numbers that are not finite")
        pairs: list[tuple[float, int, int, str, str]] = []
        for text, token_id in self.vocabulary.items():
            if len(text) > MAX_PIECE:
                self.fail("tokens", f"has one of {len(text)} characters")
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in self.vocabulary and right in self.vocabulary:
                    pairs.append((-float(scores[token_id]), -cut, -len(right), left, right))
        # Of equal scores the leftmost counts: runs of spaces grow from their left.
        merges = [(left, right) for *_, left, right in sorted(pairs)]
        unknown = self.ids.get("unknown")
        tokenizer = Tokenizer(
            models.BPE(
                vocab=self.vocabulary,
                merges=merges,
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        spaces = normalizers.Replace(" ", "▁")
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.normalizer = spaces
        if self.value("add_space_prefix", bool, True):
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(steps)
        return tokenizer

    def chat_templates(self) -> dict[str, str]:
        """By the file it goes to."""
        found = {path: self.value(key, str, None, prefix="tokenizer.") for key, path in TEMPLATES}
        return {path: template for path, template in found.items() if template is not None}

    # --- keys

    def fail(self, key: str, what: str, *, prefix: str = "tokenizer.ggml.") -> NoReturn:
        raise ModelError(f"{self.file.path}: {prefix}{key} {what}")

    def value(self, key: str, kind: type, default: Any, *, prefix: str = "tokenizer.ggml.") -> Any:
        value = self.file.metadata.get(prefix + key, default)
        if value is not default and type(value) is not kind:
            self.fail(key, f"must be {_KINDS[kind]}, got {_shown(value)}", prefix=prefix)
        return value

    def strings(self, key: str) -> list[str]:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            self.fail(key, "is missing")
        if not isinstance(value, list):
            self.fail(key, f"must be an array of strings, got {_shown(value)}")
        return value

    def numbers(self, key: str, kind: type) -> npt.NDArray[Any] | None:
        """One number for each token."""
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, kind):
            what = "integers" if kind is np.integer else "numbers"
            self.fail(key, f"must be an array of {what}")
        if len(value) != len(self.tokens):
            self.fail(key, f"has {len(value)} entries for {len(self.tokens)} tokens")
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        value: int | None = self.value(f"{name}_token_id", int, default)
        if value is None or 0 <= value < len(self.tokens):
            return value
        self.warnings.append(
            f"tokenizer.ggml.{name}_token_id is {value}, there are {len(self.tokens)} tokens: "
            "there is no such special token"
        )
        return None


_KINDS = {str: "a string", int: "an integer", bool: "true or false"}


def _shown(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, str | int | float) else "an array"


def _around(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> Any:
    """Puts the tokens given before and after a text."""
    before, after = ([] if i is None else [i] for i in (bos, eos))
    return processors.TemplateProcessing(
        single=[*(f"token{i}" for i in before), "$A", *(f"token{i}" for i in after)],
        special_tokens=[
            {"id": f"token{i}", "ids": [i], "tokens": [tokenizer.id_to_token(i)]}
            for i in {*before, *after}
        ],
    )
