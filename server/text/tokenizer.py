"""Tokenizer: text to ids and back, from the ``tokenizer.json`` of a model folder.

Reads ``tokenizer_config.json`` for the names of special tokens, and the chat templates from
``chat_template.jinja`` and ``additional_chat_templates`` or from there. Uses the ``tokenizers``
library; never imports torch.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from headstart.engine.errors import ModelError, RequestError

TOOL_TEMPLATE = "tool_use"
"""What transformers calls the chat template for chats with tools, where a model has several."""

Place = tuple[int, int]
"""First character, and the one after the last."""

MAX_IDS = 1 << 20
"""Of one text: more than a context holds. All are made under the GIL, whatever the thread."""

MAX_PLACED = 1 << 17
"""Of one text whose tokens' places are wanted, which take more."""

PIECE = 256 * 1024
"""Characters that are searched at once, since that is under the GIL, too."""

# Where placeholders for special tokens in user text are taken from: two planes of code points
# that Unicode leaves to private use.
_PRIVATE_USE = (0xF0000, 0x10FFFE)
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")


class Tokenizer:
    """What one model's text is made of.

    ``special_tokens``: names as chat templates know them (``bos_token``, ...) to their text.
    ``tool_template``: the chat template for chats with tools, where that is another one.
    ``backend`` is the ``tokenizers.Tokenizer``, for incremental decoding.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self.tool_template = tool_template
        backend.no_truncation()
        backend.no_padding()
        _keep_spaces_in_places(backend)
        control = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._control_ids = control
        self._added_ids = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._longest_control = len(longest_first[0]) if control else 0
        self._plain: tokenizers.Tokenizer | None = None
        self._byte_of = _byte_level_alphabet() if _is_byte_level(backend) else None
        self._longest = self._longest_token()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read a model folder; raises ModelError naming the file that is missing or broken."""
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            reason = str(error).splitlines()[0]
            raise ModelError(f"cannot read the tokenizer {path}: {reason}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = {
            name: token if isinstance(token, str) else token["content"]
            for name, token in config.items()
            if name.endswith("_token")
            and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
        }
        templates = _chat_templates(folder, config)
        return cls(
            backend,
            special_tokens=special,
            chat_template=templates.get("default"),
            tool_template=templates.get(TOOL_TEMPLATE),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of ``text``; special tokens written in it become those tokens."""
        # Computes no offsets, and lets go of the GIL.
        encoding = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return _ids(encoding[0])

    def fewest_tokens(self, num_chars: int) -> int:
        """At least so many tokens come of a text of that length; 0 where it may lose characters."""
        return 0 if self._longest is None else num_chars // self._longest

    def _longest_token(self) -> int | None:
        """Characters that a token may stand for; None where it may be any number."""
        added = self.backend.get_added_tokens_decoder().values()
        eats_spaces = any(token.lstrip or token.rstrip for token in added)
        if self._byte_of is None or self.backend.normalizer is not None or eats_spaces:
            return None
        return max(map(len, self.backend.get_vocab()), default=1)

    def encode_placed(self, text: str) -> tuple[list[int], list[Place | None]]:
        """Ids of ``text`` with the tokenizer's own special tokens, and where each comes from.

        Tokens that are parts of one character have the same place; those the tokenizer adds have
        none.
        """
        [encoding] = self.backend.encode_batch([text], add_special_tokens=True)
        _check_count(encoding, MAX_PLACED)
        sources = zip(encoding.sequence_ids, encoding.offsets, strict=True)
        return encoding.ids, [None if source is None else place for source, place in sources]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.backend.decode(token_ids, skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens as they are written; no text for ids without a token."""
        return self.backend.decode(token_ids, skip_special_tokens=False)

    def entries(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary has for each id, as ``\u0120fox``; "" for ids without a token."""
        return [self.backend.id_to_token(token_id) or "" for token_id in token_ids]

    def added_tokens(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of ``texts`` that are tokens of their own beside the vocabulary's, special or not,
        and their ids."""
        return {text: self._added_ids[text] for text in texts if text in self._added_ids}

    def special_among(self, texts: Iterable[str]) -> list[str]:
        """Those of ``texts`` that are special tokens, which are left out of answers."""
        return [text for text in texts if text in self._control_ids]

    def placeholders(self, texts: Sequence[str]) -> dict[str, str]:
        """Private characters, in none of ``texts``, for the special tokens written in them.

        Put them into user text before a template is rendered, and give them to
        ``encode_rendered``: special tokens then come from the template alone.
        """
        found = sorted({match[0] for text in texts for match in self._find_control(text)})
        if not found:
            return {}
        return dict(zip(found, private_characters(texts, len(found)), strict=True))

    def hide_control(self, text: str, placeholders: dict[str, str]) -> str:
        """``text`` with placeholders where special tokens were written."""
        parts, start = [], 0
        for match in self._find_control(text):
            parts += [text[start : match.start()], placeholders[match[0]]]
            start = match.end()
        return "".join([*parts, text[start:]])

    def show_control(self, text: str, placeholders: dict[str, str]) -> str:
        """``text`` with special tokens where their placeholders are."""
        return _restored(text, placeholders)

    def encode_rendered(self, text: str, placeholders: dict[str, str]) -> list[int]:
        """Ids of a rendered template; placeholders are encoded as the plain text they stand for."""
        if not placeholders:
            return self.encode(text, add_special_tokens=False)
        plain = self._plain_backend()
        token_ids: list[int] = []
        for _, piece, control in self._pieces(text):
            token_ids += _encode_plain(plain, _restored(piece, placeholders))
            if control is not None:
                token_ids.append(self._control_ids[control])
        return token_ids

    def encode_cut(
        self, text: str, placeholders: dict[str, str], cuts: Sequence[int]
    ) -> tuple[list[int], list[int | None]]:
        """The same ids, and for each cut, a place in ``text``, how many tokens are before it.

        A token with nothing but space on one side of a cut is on the other side; None for a cut
        within any other token.
        """
        token_ids = self.encode_rendered(text, placeholders)
        places = self._beside_control(text, token_ids)
        rest = sorted(cut for cut in cuts if cut not in places)
        if rest:
            self._add_places(places, text, placeholders, token_ids, rest)
        return token_ids, [places.get(cut) for cut in cuts]

    def _beside_control(self, text: str, token_ids: list[int]) -> dict[int, int]:
        """Places in ``text`` before and after special tokens, and how many tokens are before."""
        places = {0: 0, len(text): len(token_ids)}
        special = set(self._control_ids.values())
        at = [i for i, token_id in enumerate(token_ids) if token_id in special]
        found = list(self._find_control(text))
        if [self._control_ids[match[0]] for match in found] == [token_ids[i] for i in at]:
            for match, i in zip(found, at, strict=True):
                places[match.start()], places[match.end()] = i, i + 1
        return places

    def _add_places(
        self,
        places: dict[int, int],
        text: str,
        placeholders: dict[str, str],
        token_ids: list[int],
        cuts: list[int],
    ) -> None:
        """Add ``cuts``, in order, that are between two tokens of what is between special tokens."""
        back = _back(placeholders)
        encoder = self._plain_backend() if placeholders else self.backend
        pieces = self._pieces(text) if placeholders else [(0, text, None)]
        for start, piece, _ in pieces:
            inner = cuts[bisect_left(cuts, start) : bisect_left(cuts, start + len(piece))]
            if not inner or start not in places:
                continue
            plain = piece.translate(back) if back else piece
            encoding = encoder.encode(plain, add_special_tokens=False)
            _check_count(encoding, MAX_PLACED)
            ids, spans, first = encoding.ids, encoding.offsets, places[start]
            if ids != token_ids[first : first + len(ids)]:
                continue
            starts = [span[0] for span in spans]
            at, done = 0, start
            for cut in inner:
                at += len(text[done:cut].translate(back))
                done = cut
                i = bisect_left(starts, at)
                across = spans[i - 1] if i and spans[i - 1][1] > at else (at, at)
                if not plain[across[0] : at].strip():
                    places[cut] = first + i - (across[1] > at)
                elif not plain[at : across[1]].strip():
                    places[cut] = first + i

    def _find_control(self, text: str) -> Iterator[re.Match[str]]:
        return _find(self._control, text, self._longest_control)

    def _pieces(self, text: str) -> Iterator[tuple[int, str, str | None]]:
        """Where a piece of ``text`` without special tokens begins, the piece, and the special
        token that ends it."""
        # Special tokens cut the text before anything else happens to it, so what is between
        # them can be encoded by itself.
        start = 0
        for match in self._find_control(text):
            yield start, text[start : match.start()], match[0]
            start = match.end()
        yield start, text[start:], None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; those of its name for a special token."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token in self._control_ids:
            return token.encode()
        if self._byte_of is not None:
            try:
                return bytes(map(self._byte_of.__getitem__, token))
            except KeyError:  # an added token is written as it is
                return token.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A second tokenizer, blind to special tokens; made when first needed."""
        if self._plain is None:
            plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain


def _find(pattern: re.Pattern[str], text: str, longest: int) -> Iterator[re.Match[str]]:
    """``pattern.finditer(text)`` in pieces; matches have at most ``longest`` characters."""
    start = 0
    while start < len(text):
        end = start + PIECE
        for match in pattern.finditer(text, start, end + longest):
            if match.start() >= end:
                break
            yield match
            start = match.end()
        start = max(start, end)


def _restored(text: str, placeholders: dict[str, str]) -> str:
    for token, char in placeholders.items():
        text = text.replace(char, token)
    return text


def _back(placeholders: dict[str, str]) -> dict[int, str]:
    return str.maketrans({char: token for token, char in placeholders.items()})


def private_characters(texts: Iterable[str], count: int) -> list[str]:
    """Private-use characters that are in none of ``texts``; RequestError if there are too few."""
    used = {
        match[0]
        for text in texts
        if not text.isascii()  # which is known at once
        for match in _find(_PRIVATE, text, 1)
    }
    free = (char for code in range(*_PRIVATE_USE) if (char := chr(code)) not in used)
    found = list(islice(free, count))
    if len(found) < count:
        raise RequestError("the messages use too many private-use characters", "messages")
    return found


def _keep_spaces_in_places(backend: tokenizers.Tokenizer) -> None:
    """Have the place of a token hold the space before a word, which many are told to leave out."""
    processor = backend.post_processor
    if processor is None:
        return
    settings = json.loads(processor.__getstate__())
    for part in (settings, *settings.get("processors", ())):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    processor.__setstate__(json.dumps(settings).encode())
    backend.post_processor = processor


def _encode_plain(plain: tokenizers.Tokenizer, text: str) -> list[int]:
    encoding = plain.encode_batch_fast([text], add_special_tokens=False)
    return _ids(encoding[0])


def _ids(encoding: tokenizers.Encoding) -> list[int]:
    _check_count(encoding, MAX_IDS)
    return encoding.ids


def _check_count(encoding: tokenizers.Encoding, most: int) -> None:
    """Raise RequestError before the ids are made."""
    if len(encoding) > most:
        raise RequestError(f"the text has {len(encoding)} tokens; at most {most} are looked at")


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte, as GPT-2 wrote bytes in its vocabulary: printable ones as themselves,
    the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return value


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name; the one and only is "default". Files come before the config."""
    given = config.get("chat_template")
    listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
    found: dict[str, Any] = {
        str(entry.get("name")): entry.get("template") for entry in listed if isinstance(entry, dict)
    }
    for name, path in (
        ("default", folder / "chat_template.jinja"),
        (TOOL_TEMPLATE, folder / "additional_chat_templates" / f"{TOOL_TEMPLATE}.jinja"),
    ):
        try:
            found[name] = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    templates = {name: text for name, text in found.items() if text is not None}
    if not all(isinstance(text, str) for text in templates.values()):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template is not a text")
    return templates
