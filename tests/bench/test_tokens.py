"""bench.tokens: its texts are of every kind, and what it cannot do is one line."""

import subprocess
import sys
import unicodedata

from headstart.bench.token_texts import COUNT, texts
from headstart.bench.tokens import comparable


def test_texts_of_every_kind() -> None:
    wanted = texts()
    assert len(wanted) == len(set(wanted)) == COUNT == 2000
    assert wanted == texts()
    whole = "\n".join(wanted)
    names = {unicodedata.name(char, "").split(" ")[0] for char in whole}
    assert names > {"LATIN", "GREEK", "CYRILLIC", "CJK", "HIRAGANA", "HANGUL"}
    assert names > {"ARABIC", "HEBREW", "DEVANAGARI", "THAI"}
    for part in (
        "'s",
        "'RE",
        "\r\n",
        "\t\t",
        "      ",
        "\u200d",
        "🏽",
        "\x04",
        "<|im_end|>",
        "def ",
    ):
        assert any(part in text for text in wanted), part
    assert sum(any(char.isdigit() for char in text) for text in wanted) > COUNT / 4


def test_texts_that_llama_cpp_cuts_otherwise_are_left_out() -> None:
    wanted = ["ab AB 12 é 漢字", "É", "e\u0301", "नमस्ते"]
    assert comparable("qwen2", wanted) == wanted
    assert comparable("tekken", wanted) == wanted[:1]


def test_without_llama_cpp() -> None:
    command = [sys.executable, "-m", "headstart.bench.tokens", "--python", "/no/python"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: /no/python: no such file; `make peers` creates it\n"
