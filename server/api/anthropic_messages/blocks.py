"""The blocks that Anthropic's messages consist of, and what each is to a model that reads text.

Documents of text, search results and summaries of earlier messages become text. Where an image or
a block of another type stands among others, the model reads its type: ``[image]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from headstart.server.api.fields import ContentField, Ignored
from headstart.server.http.errors import bad_request, invalid, string_at
from headstart.server.http.policy import Advisory, Body, Notes, body_at

Citations = Annotated[Any, Advisory(harmless=([], {"enabled": False}))]


class Block(Body):
    """A block of a type that has no class below; its other fields are not looked at."""

    type: str
    cache_control: Ignored = None


class TextBlock(Block):
    text: str
    citations: Citations = None


class ThinkingBlock(Block):
    """``signature``: headstart's own is empty."""

    thinking: str
    signature: Annotated[Any, Advisory(harmless=("",))] = None


class ToolUseBlock(Block):
    id: str
    name: str
    input: Any = None
    caller: Annotated[Any, Advisory(harmless=({"type": "direct"},))] = None
    toolset_name: Ignored = None


class ToolResultBlock(Block):
    tool_use_id: str
    content: ContentField = None
    is_error: bool | None = None
    toolset_name: Ignored = None


class ToolReferenceBlock(Block):
    """A tool that a search for tools has found."""

    tool_name: str


class DocumentBlock(Block):
    source: Any
    title: str | None = None
    context: str | None = None
    citations: Citations = None


class SearchResultBlock(Block):
    source: str
    title: str
    content: ContentField
    citations: Citations = None


class SummaryBlock(Block):
    """What stands for messages that the client leaves out."""

    content: str | None = None
    encrypted_content: Ignored = None
    signature: Ignored = None
    tool_changes: Ignored = None


_KINDS: dict[str, type[Block]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
    "tool_reference": ToolReferenceBlock,
    "document": DocumentBlock,
    "search_result": SearchResultBlock,
    "compaction": SummaryBlock,
}
_KIND = re.compile(r"[a-z0-9_]{1,64}")
_FOR_EYES = ("image", "document", "container_upload")
_OF_SERVERS = re.compile(
    "redacted_thinking|fallback|tool_addition|tool_removal|mcp_tool_listing|mcp_tool_use|"
    "server_tool_use|(advisor|mcp|tool_search|web_fetch|web_search|code_execution|"
    "bash_code_execution|text_editor_code_execution)_tool_result"
)
"""What Anthropic's servers have done, or are to do."""
_ONLY_IN = {"thinking": "assistant", "tool_use": "assistant", "tool_result": "user"}


@dataclass(slots=True)
class BlockReader:
    """Reads contents: strings, or lists of blocks. Its methods raise APIError.

    ``most``: blocks of all contents together.
    """

    notes: Notes
    most: int
    _count: int = 0

    def blocks(self, content: Any, role: str, path: str) -> Iterator[tuple[Block, str]]:
        """The blocks of a content and their paths; a string is one.

        ``role``: whose content it is; "" of what may only be text.
        """
        if isinstance(content, str):
            yield TextBlock(type="text", text=content), path
            return
        if not isinstance(content, list):
            raise invalid(path, "must be a string or a list of blocks")
        self._count += len(content)
        if self._count > self.most:
            raise bad_request(f"{path}: at most {self.most} blocks are allowed", path)
        for i, value in enumerate(content):
            where = f"{path}[{i}]"
            kind = value.get("type") if isinstance(value, dict) else None
            if not isinstance(kind, str) or not _KIND.fullmatch(kind):
                raise invalid(where, "must be an object with a type")
            if _ONLY_IN.get(kind, role) != role:
                raise bad_request(f"{where}: a block of type {kind!r} does not belong here", where)
            if kind in _KINDS:
                yield body_at(_KINDS[kind], value, where, self.notes), where
            else:
                yield Block(type=kind), where

    def words(self, block: Block, path: str) -> str | None:
        """What the model reads of a block that is no thought, call or result; None where it would
        have to see it. What is not read is noted."""
        match block:
            case TextBlock():
                return block.text
            case ToolReferenceBlock():
                return block.tool_name
            case SummaryBlock():
                return block.content or ""
            case SearchResultBlock():
                text = self.text(block.content, f"{path}.content")
                return _lines(block.title, block.source, text)
            case DocumentBlock(source={"type": "text"}):
                text = string_at(block.source, "data", f"{path}.source")
                return _lines(block.title, block.context, text)
            case DocumentBlock(source={"type": "content"}):
                text = self.text(block.source.get("content"), f"{path}.source.content")
                return _lines(block.title, block.context, text)
        where = f"{path.rpartition('[')[0]}[type={block.type}]"
        if _OF_SERVERS.fullmatch(block.type):
            self.notes.ignore(where)
            return ""
        if block.type in _FOR_EYES:
            self.notes.ignore(where)
        else:
            self.notes.unknown(where)
        return None

    def text(self, content: Any, path: str) -> str:
        """A content that may only be text: its blocks joined by newlines."""
        texts: list[str] = []
        for block, where in self.blocks(content, "", path):
            words = self.words(block, where)
            texts.append(f"[{block.type}]" if words is None else words)
        return _lines(*texts)


def _lines(*texts: str | None) -> str:
    return "\n".join(filter(None, texts))
