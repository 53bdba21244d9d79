# ruff: noqa: SIM905  (lists of words are easier to read as one string)
"""2,000 made-up texts that tokenizers disagree about: digits, spaces, line ends, scripts, emoji.

The same ones every time. Whoever keeps tokens of them keeps ``digest(texts())`` too.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable

COUNT = 2000

WORDS = (
    "the of List Answer HELLO iPhone camelCase snake_case x y I we they can't I'm don't it's "
    "she'll WE'RE YOU'VE I'D 'tis O'Neil rock'n'roll John's JOHN'S 'quoted' ’s it’s don’t 'sup "
    "naïve café Ünïcödé straße ŒUVRE façade Łódź İstanbul ﬁne eﬀort Αθήνα ΕΛΛΆΔΑ ψυχή Привет "
    "МИР приВЕТ Ёлка ґанок שלום עִבְרִית مرحبا العَرَبِيَّة فارسی हिन्दी नमस्ते বাংলা தமிழ் ไทย "
    "สวัสดีครับ ភាសាខ្មែរ 漢字 你好，世界！ 中文。 かな カタカナ ー東京は日本の 한국어 안녕하세요 "
    "ㄱㄴㄷ ქართული Հայերեն አማርኛ ᏣᎳᎩ 𝔘𝔫𝔦 e\u0301te\u0301 n\u0303 Z\u0351\u036b\u0343"
).split()
NUMBERS = (
    "0 7 10 42 007 365 999 1000 1234 12345 123456 1234567 1234567890 3.14159 1,000,000 1.000,50 "
    "-5 +49 1e-9 0x1F4 1999-12-31 23:59:59 v1.2.3 192.168.0.1 50% $9.99 €20 £5 #1 1st 2nd 3x3 "
    "a1b2c3 H2O ½ ¾ x² 10⁻³ Ⅷ ٣٤٥ १२३ ৪৫৬ １２３ 〇一二三 ①②③"
).split()
SPACES = [
    *(" ", "  ", "   ", "    ", " " * 7, " " * 8, " " * 15, " " * 16, " " * 33, "\t", "\t\t"),
    *(" \t", "\t ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", " \n", "\n ", "\n  ", "  \n"),
    *("\n\t", "\n    ", " \n \n ", "\u00a0", "\u00a0 ", "\u3000", "\u2009", "\u2028", "\x85", "\v"),
    *("\f", "\u200b", "\u200d", "\ufeff", ""),
]
MARKS = (
    ". , ! ? ; : ... -- — – _ ( ) [ ] { } < > << >> / // \\ | || & && * ** + ++ = == === != := -> "
    "=> ~ ` `` ``` ^ @ # $ % ' '' \" \"\" « » „ “ ” … ¿ ¡ · • ° § © ® ™ ← → ≈ ≤ ∑ √ ∞ 。 、 ！ ？ "
    "「 」 （ ） ： ； ، ؟ । ॥ ।। ۔ ๆ"
).split()
EMOJI = "😀 🦊 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵🇰🇷 ❤️ ☀ ✅ 1️⃣ 🧑🏿‍🚀 🤷🏼‍♀️".split()
CONTROL = [chr(code) for code in (*range(9), *range(14, 32), 127, 0x80, 0x9F)]
RARE = "\u00ad \u2060 \u202e \ufffd \ufffe \ue000 \U000f0000 \U0002f800 \u0378 \U00020000".split()
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|im_start|>user <|im_end <|im_start <repo_name> "
    "<file_sep> <issue_start> <jupyter_code> <empty_output> <s> </s> <unk> <0x0A> <|eot_id|> "
    "|im_end|> [INST] <think> ▁ ▁▁a Ġ Ċ"
).split()
CODE = [
    "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2}\n",
    'for (int i = 0; i < 10; ++i) {\n\tprintf("%d\\n", i);\n}\n',
    "if __name__ == '__main__':\n        main()\n\n\n",
    '{"name": "Ada", "born": 1815, "tags": []}',
    "SELECT COUNT(*) FROM t WHERE a>=10;",
    '<div class="x">&amp;</div>',
    "https://example.com/a?b=1&c=%20#d",
    "\\frac{1}{2} $x_{i}^{2}$",
    "- [ ] item\n  1. one\n  2. two\n",
    "| a | b |\n|---|---|\n| 1 | 22 |",
    "\t\tself.x  =  [0]*3  # note",
    "user@mail.example 'it''s' I'LL",
]


def texts() -> list[str]:
    """COUNT texts, none of them twice."""
    rng = random.Random(20)
    kinds: list[Callable[[], str]] = [
        *(lambda: rng.choice(WORDS),) * 5,
        *(lambda: rng.choice(NUMBERS),) * 3,
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        *(lambda: rng.choice(MARKS),) * 2,
        lambda: rng.choice(EMOJI),
        lambda: rng.choice(CONTROL),
        lambda: rng.choice(RARE),
        lambda: rng.choice(SPECIAL),
        lambda: rng.choice(CODE)[: rng.randrange(4, 40)],
        lambda: rng.choice("aeЯ漢'0\n ") * rng.randrange(2, 9),
    ]
    found = dict.fromkeys(["", " ", "\n", "\n\n", "List:\n\n1. a", *CODE])
    while len(found) < COUNT:
        parts = [rng.choice(kinds)() for _ in range(rng.randrange(1, 6))]
        # Half of the joints are single spaces, as in most texts.
        joints = [rng.choice((" ", rng.choice(SPACES))) for _ in parts]
        text = "".join(part + joint for part, joint in zip(parts, joints, strict=True))
        found[rng.choice((text, text.rstrip(" "), rng.choice(SPACES) + text))] = None
    return list(found)


def digest(value: object) -> str:
    """Short name of texts or of their tokens."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
