"""Tokens beside llama.cpp's: `python -m headstart.bench.tokens`.

2,000 made-up texts (token_texts.py) are tokenised by llama.cpp, in an environment of its own
(`make peers` creates it), and by the tokenizer headstart makes of the same GGUF file: the default
model's, and vocabularies made here, one file for each name that `tokenizer.ggml.pre` may have and
two with SentencePiece's scores.

A line for each file on stdout. Exit status: 0, 1 if a text becomes other tokens, 2 for wrong
arguments. With --write, llama.cpp's answers are written to a file that tests compare with.
"""

import argparse
import json
import sys
import tempfile
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError
from headstart.bench.line_process import LineProcess
from headstart.bench.server_process import default_gguf
from headstart.bench.token_texts import digest, texts
from headstart.bench.token_vocabularies import byte_pairs, sentence_pieces
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.gguf_tokenizer import write_tokenizer
from headstart.engine.models.files.pre_tokenizers import PRE_TOKENIZERS
from headstart.engine.models.formats.quality import TEXTS

WORKER = Path(__file__).with_name("llama_worker.py")
TIMEOUT = 300.0
Tokens = list[list[int]]
APPROXIMATED = {
    *("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "granite-embed-multi-97m"),
}
"""Names where llama.cpp cuts at combining marks and not before capitals beyond ASCII; the models'
own patterns, which pre_tokenizers.py has, do it the other way round."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--python",
        type=Path,
        default=Path(".venv-peers/bin/python"),
        help="interpreter that has llama-cpp-python (default %(default)s)",
    )
    command.add_argument("--gguf", type=Path, help="a GGUF file instead of the default model's")
    command.add_argument("--write", type=Path, metavar="FILE", help="keep llama.cpp's answers")
    return command


def ours(path: Path, wanted: list[str], *, special: bool = True) -> Tokens:
    """Tokens by the tokenizer that a pull makes of the GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(GGUFFile(path), Path(folder))
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = not special
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(wanted)]


def comparable(name: str, wanted: list[str]) -> list[str]:
    """Texts that llama.cpp cuts as the model's own pattern does: for some names not those with
    marks or capitals beyond ASCII."""
    if name not in APPROXIMATED:
        return wanted
    kinds = {"Mn", "Mc", "Me", "Lu", "Lt"}
    return [
        text
        for text in wanted
        if not any(ord(char) > 127 and unicodedata.category(char) in kinds for char in text)
    ]


class Comparison:
    """Asks llama.cpp, counts what differs, and keeps its answers."""

    def __init__(self, worker: LineProcess) -> None:
        self.worker = worker
        self.differ = 0

    def tokens(self, name: str, path: Path, wanted: list[str], *, special: bool = True) -> Tokens:
        """llama.cpp's tokens; a line says how many texts have the same ones here."""
        request = {"model": str(path), "texts": wanted, "special": special}
        theirs: Tokens = self.worker.ask(request)["tokens"]
        found = ours(path, wanted, special=special)
        wrong = [i for i, tokens in enumerate(theirs) if found[i] != tokens]
        print(f"{name}: {len(wanted) - len(wrong)} of {len(wanted)} texts equal", flush=True)
        for i in wrong[:3]:
            print(f"  {wanted[i]!r}\n    llama.cpp {theirs[i]}\n    headstart {found[i]}")
        self.differ += len(wrong)
        return theirs


def compare(worker: LineProcess, gguf: Path) -> tuple[dict[str, Any], int]:
    """llama.cpp's answers, and how many texts differ."""
    version = worker.receive()["version"]
    comparison, wanted = Comparison(worker), texts()
    english = (TEXTS / "calibration.txt").read_text(encoding="utf-8").splitlines()
    pairs, pieces = byte_pairs([*wanted, *english]), sentence_pieces([*wanted, *english])
    kept: dict[str, Any] = {"source": f"llama-cpp-python {version}", "texts": digest(wanted)}
    kept["default model"] = comparison.tokens("default model", gguf, wanted)
    plain = comparison.tokens("default model, special tokens as text", gguf, wanted, special=False)
    kept["default model, special tokens as text"] = digest(plain)
    kept["byte pairs"], kept["pieces"] = asdict(pairs), asdict(pieces)
    kept["names"], kept["prefixes"] = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        for name in PRE_TOKENIZERS:
            pairs.write(path, name)
            tokens = comparison.tokens(name, path, comparable(name, wanted))
            kept["names"][name] = digest(tokens)
        for prefix in (True, False):
            pieces.write(path, add_space_prefix=prefix)
            tokens = comparison.tokens(f"SentencePiece, space first: {prefix}", path, wanted)
            kept["prefixes"][str(prefix)] = digest(tokens)
    return kept, comparison.differ


def run(args: argparse.Namespace) -> int:
    """How many texts differ."""
    if not args.python.exists():
        raise BenchError(f"{args.python}: no such file; `make peers` creates it")
    with LineProcess("llama.cpp", [str(args.python), str(WORKER)], TIMEOUT) as worker:
        kept, differ = compare(worker, args.gguf or default_gguf())
    if args.write:
        args.write.write_text(json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n")
    return differ


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
