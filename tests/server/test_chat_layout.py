"""Where messages and tools are in a rendered chat, in templates that models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from headstart.server.text.layout import Layout, Mark, MessagePlace, ToolsPlace, common_prefix
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
WITHOUT_SYSTEM = ("gemma", "mistral")
"""Templates that refuse a system message."""
CHAT = [
    {"role": "system", "content": "  You keep the list of books. "},
    {"role": "user", "content": "Where is the lighthouse?"},
    {"role": "assistant", "content": "On shelf four."},
    {"role": "user", "content": 'And "the tides", where?\n'},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a book.",
        "parameters": {"type": "object", "properties": {"title": {"type": "string"}}},
    },
}


def template_of(path: Path, backend: tokenizers.Tokenizer) -> ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": "<|eos|>"}
    return ChatTemplate(Tokenizer(backend, special_tokens=special, chat_template=path.read_text()))


def chat_of(path: Path) -> list[dict[str, Any]]:
    return CHAT[1:] if path.stem in WITHOUT_SYSTEM else CHAT


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_messages_are_found(path: Path, backend: tokenizers.Tokenizer) -> None:
    template, chat = template_of(path, backend), chat_of(path)
    layout = template.layout(chat)
    assert layout.text == template.render(chat)
    # Llama 2 writes the system message into the user's.
    assert sorted(place.message for place in layout.messages) == list(range(len(chat)))
    for place in layout.messages:
        text = layout.text[place.start : place.end]
        assert text.strip() == chat[place.message]["content"].strip()
        assert layout.message_at(place.start) == place.message
        assert layout.message_at(place.end) == place.message
    last = max(place.end for place in layout.messages)
    assert layout.message_at(len(layout.text)) is None or last == len(layout.text)


@pytest.mark.parametrize(
    "name", ["chatml_tools", "qwen2_5", "qwen3", "llama3_1", "llama3_2", "smollm2", "mistral_tools"]
)
def test_tools_are_found(name: str, backend: tokenizers.Tokenizer) -> None:
    template = template_of(TEMPLATES[0].parent / f"{name}.jinja", backend)
    other = {"type": "function", "function": TOOL["function"] | {"name": "lend"}}
    with_tools, more = template.layout(CHAT, [TOOL]), template.layout(CHAT, [TOOL, other])
    without = template.layout(CHAT)
    for here, earlier in (
        (with_tools, more),
        (more, with_tools),
        (with_tools, without),
        (without, with_tools),
    ):
        at = common_prefix(here.text, earlier.text)
        assert here.tools_changed_at(at, earlier.text[at : at + 60])
    # A change of a message is none of theirs, wherever they stand.
    for i, message in enumerate(CHAT):
        edited = message | {"content": message["content"].replace("e", "E")}
        changed = template.layout([*CHAT[:i], edited, *CHAT[i + 1 :]], [TOOL])
        at = common_prefix(changed.text, with_tools.text)
        assert not changed.tools_changed_at(at, with_tools.text[at : at + 60])
        assert changed.message_at(at) == i


def test_special_tokens_within_a_message(backend: tokenizers.Tokenizer) -> None:
    template = template_of(TEMPLATES[0].parent / "chatml_tools.jinja", backend)
    chat = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "c"}]
    chat += [{"role": "user", "content": "d <|im_start|>"}]
    layout = template.layout(chat)
    assert layout.text == template.render(chat)
    texts = [layout.text[place.start : place.end] for place in layout.messages]
    assert texts == [message["content"] for message in chat]


def test_a_chat_that_is_continued(backend: tokenizers.Tokenizer) -> None:
    template = template_of(TEMPLATES[0].parent / "chatml_tools.jinja", backend)
    chat = [CHAT[1], {"role": "assistant", "content": "On shelf"}]
    layout = template.layout(chat, ending="continued")
    assert layout.text.endswith("On shelf")
    assert layout.message_at(len(layout.text)) == 1


def test_what_a_template_does_not_write_as_it_is_has_no_place(
    backend: tokenizers.Tokenizer,
) -> None:
    text = "{% for m in messages %}{{ m.content | length }} {% endfor %}"
    template = ChatTemplate(Tokenizer(backend, chat_template=text))
    assert template.layout(CHAT).messages == []
    twice = "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"
    template = ChatTemplate(Tokenizer(backend, chat_template=twice))
    assert template.layout(CHAT).messages == []


def test_what_is_between_two_texts_is_the_later_ones() -> None:
    #             0         10        20
    text = "<s>first</s><a>call</a><u>third</u><a>"
    layout = Layout(text, [MessagePlace(0, 3, 8), MessagePlace(2, 26, 31)], None)
    assert [layout.message_at(at) for at in (0, 3, 8, 9, 15, 26, 31, 32)] == [
        *(None, 0, 0, 1, 1, 2, 2, None)
    ]


def test_tools_that_begin_or_end_somewhere() -> None:
    place = ToolsPlace(10, 20, [Mark(10, "<|im_end"), Mark(22, '{"name":')])
    layout = Layout("x" * 40, [MessagePlace(0, 14, 16)], place)
    assert not layout.tools_changed_at(9, "x")
    assert layout.tools_changed_at(10, "<|im_end|> and so on")
    assert not layout.tools_changed_at(10, "more text")
    assert layout.tools_changed_at(11, "anything")
    assert not layout.tools_changed_at(15, "anything")
    assert layout.tools_changed_at(20, "anything")
    assert not layout.tools_changed_at(21, "anything")
    assert layout.tools_changed_at(22, '{"name": "lend"')
    assert not layout.tools_changed_at(22, "")
    assert not Layout("x", [], None).tools_changed_at(0, "x")
