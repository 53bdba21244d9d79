"""Small vocabularies, and GGUF files with nothing else, for comparing tokens with llama.cpp's.

Their merges cross all borders that a pre-tokenizer may draw, so that every border drawn elsewhere
gives other tokens.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from headstart.engine.models.files.gguf_tokenizer import CONTROL, UNKNOWN, USER_DEFINED

NORMAL, BYTE = 1, 6
SIZE = 1300
SPECIAL = {"<s>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED, "   ": USER_DEFINED}
SPACES = (*range(1, 15), 16)
"""Lengths of the runs of spaces that Llama 2 and Mistral have, all with one score."""


@dataclass(frozen=True)
class Vocabulary:
    """As a GGUF file has it: byte pairs if there are ``merges``, else SentencePiece's scores."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]

    def write(self, path: Path, pre: str | None = None, add_space_prefix: bool = True) -> None:
        """A GGUF file of architecture llama that holds only this."""
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2" if self.merges else "llama")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(add_space_prefix)
        writer.add_bos_token_id(self.tokens.index("<s>"))
        writer.add_eos_token_id(self.tokens.index("<|im_end|>"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def byte_pairs(texts: list[str]) -> Vocabulary:
    """BPE trained on texts that are not cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    types = [NORMAL] * len(tokens) + [*SPECIAL.values()]
    return Vocabulary([*tokens, *SPECIAL], types, merges, [])


def sentence_pieces(texts: list[str]) -> Vocabulary:
    """SentencePiece's BPE with bytes to fall back on."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        control_symbols=["<|im_end|>"],
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(pieces.vocab_size())

    def kind(i: int) -> int:
        if pieces.is_unknown(i):
            return UNKNOWN
        if pieces.is_control(i):
            return CONTROL
        if pieces.is_byte(i):
            return BYTE
        return USER_DEFINED if pieces.id_to_piece(i) in SPECIAL else NORMAL

    tokens, types = [pieces.id_to_piece(i) for i in ids], [kind(i) for i in ids]
    scores = [float(pieces.get_score(i)) for i in ids]
    for run in ("▁" * length for length in SPACES):
        if run not in tokens:
            tokens, types, scores = [*tokens, run], [*types, NORMAL], [*scores, 0.0]
        scores[tokens.index(run)] = -1e9
    return Vocabulary(tokens, types, [], scores)
