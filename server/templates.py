"""Chat messages to token ids, through the model's own chat template.

Templates come with models, so they run in transformers' sandbox (jinja2, immutable, no torch).
Special tokens written inside message text stay plain text: only the template can make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from headstart.engine.errors import ModelError, RequestError
from headstart.engine.segments import Turn
from headstart.server.tokenizer import Tokenizer, private_characters
from headstart.server.turn_marks import NUM_SIGNS, Message, Signs, Tools
from headstart.server.turns import TextTurn, find_turns, refusal

__all__ = ["ChatTemplate", "Message", "Tools"]


class ChatTemplate:
    """A model's chat template; raises ModelError when it cannot be compiled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ModelError("the model has no chat template")
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        try:
            self._render([{"role": "user", "content": ""}], None)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is broken: {error}") from error
        except Exception:
            pass  # a template may refuse this chat and serve others

    @property
    def text(self) -> str:
        """The template itself."""
        return self._template

    def writes_tools(self) -> bool:
        """Whether tools are written into chats; True, too, for a template that refuses to say."""
        name = "headstart_probe"
        schema = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}}
        function = {"name": name, "description": name, "parameters": schema}
        user = {"role": "user", "content": "x"}
        for messages in ([user], [{"role": "system", "content": "x"}, user]):
            try:
                rendered = self._render(messages, [{"type": "function", "function": function}])
            except Exception:  # whatever a template may do with a chat it does not expect
                continue
            return name in rendered
        return True

    def encode(
        self, messages: Sequence[Message], tools: Tools | None = None, *, answer: bool = True
    ) -> list[int]:
        """Ids of the chat, up to where the assistant's answer begins, its header included.

        Without ``answer`` there is no such header. Raises RequestError with the template's own
        words when it refuses the messages.
        """
        messages, tools, hidden = self._hide(messages, tools)
        rendered = self._render_chat(messages, tools, answer=answer)
        return self._tokenizer.encode_rendered(rendered, hidden)

    def render(
        self, messages: Sequence[Message], tools: Tools | None = None, *, answer: bool = True
    ) -> str:
        """The text that ``encode`` encodes; raises as it does.

        Special tokens that were written inside messages look like the template's own here.
        """
        messages, tools, hidden = self._hide(messages, tools)
        rendered = self._render_chat(messages, tools, answer=answer)
        return self._tokenizer.show_control(rendered, hidden)

    def encode_turns(
        self, messages: Sequence[Message], tools: Tools | None = None
    ) -> tuple[list[int], list[Turn]]:
        """The same ids, and the turns among them.

        Raises RequestError also when the template does not let turns be told apart.
        """
        messages, tools, hidden = self._hide(messages, tools)
        rendered = self._render_chat(messages, tools)
        try:
            found = self._find_turns(messages, tools, rendered)
        except RequestError:
            if (again := self._render_chat(messages, tools)) == rendered:
                raise
            rendered = again  # a clock in the template went on
            found = self._find_turns(messages, tools, rendered)
        cuts = [cut for turn in found for cut in (turn.start, turn.end)]
        token_ids, places = self._tokenizer.encode_cut(rendered, hidden, cuts)
        turns: list[Turn] = []
        for turn, start, end in zip(found, places[::2], places[1::2], strict=True):
            if start is None or end is None or start == end:
                raise refusal(f"one token is both in and outside of the {turn.role} turn")
            turns.append(Turn(turn.role, start, end))
        return token_ids, turns

    def _find_turns(
        self, messages: Sequence[Message], tools: Tools | None, rendered: str
    ) -> list[TextTurn]:
        texts = [self._template, *_texts(messages), *_texts(tools)]
        signs = Signs.of(private_characters(texts, NUM_SIGNS))
        special = self._tokenizer.special_tokens
        bos = {"bos_token": signs.bos} if "bos_token" in special else {}

        def render(messages: Sequence[Message], tools: Tools | None, answer: bool) -> str | None:
            try:
                return self._render(messages, tools, answer=answer, special_tokens=special | bos)
            except Exception:  # a template may refuse the small chats it is asked about
                return None

        return find_turns(render, signs, messages, tools, rendered, special)

    def _hide(
        self, messages: Sequence[Message], tools: Tools | None
    ) -> tuple[Sequence[Message], Tools | None, dict[str, str]]:
        """The chat with placeholders for the special tokens written in it, and these."""
        hidden = self._tokenizer.placeholders([*_texts(messages), *_texts(tools)])
        if hidden:
            messages, tools = self._hidden(messages, hidden), self._hidden(tools, hidden)
        return messages, tools or None, hidden

    def _hidden(self, value: Any, placeholders: dict[str, str]) -> Any:
        if isinstance(value, str):
            return self._tokenizer.hide_control(value, placeholders)
        if isinstance(value, dict):
            return {
                self._hidden(key, placeholders): self._hidden(item, placeholders)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hidden(item, placeholders) for item in value]
        return value

    def _render_chat(
        self, messages: Sequence[Message], tools: Tools | None, *, answer: bool = True
    ) -> str:
        """The chat, its answer opened or not; RequestError when the template refuses it."""
        try:
            return self._render(messages, tools, answer=answer)
        except jinja2.TemplateError as error:
            reason = str(error)
        except Exception as error:  # whatever a template may do with a chat it does not expect
            reason = f"{type(error).__name__}: {error}"
        raise RequestError(f"the model's chat template refuses the messages: {reason}", "messages")

    def _render(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        *,
        answer: bool = True,
        special_tokens: dict[str, str] | None = None,
    ) -> str:
        rendered, _ = render_jinja_template(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=self._template,
            add_generation_prompt=answer,
            **(self._tokenizer.special_tokens if special_tokens is None else special_tokens),
        )
        return rendered[0]  # type: ignore[no-any-return]


def _texts(value: Any) -> list[str]:
    """Every text in a JSON value, keys included."""
    texts: list[str] = []
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                texts.append(text)
            case dict() as fields:
                waiting += fields
                waiting += fields.values()
            case list() | tuple() as items:
                waiting += items
    return texts
