"""Chat messages to token ids, through the model's own chat template.

Templates come with models, so they run in a sandbox with limits (template_sandbox.py).
Special tokens written inside message text stay plain text: only the template can make them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jinja2

from headstart.engine.errors import ModelError, RequestError
from headstart.engine.ranges.segments import Turn
from headstart.server.text.layout import NUM_SIGNS as NUM_LAYOUT_SIGNS
from headstart.server.text.layout import Layout, Mark, MessagePlace, ToolsPlace, lay_out
from headstart.server.text.template_sandbox import (
    LimitedTemplate,
    TemplateLimitError,
    TemplateLimits,
)
from headstart.server.text.template_trial import find_abilities
from headstart.server.text.tokenizer import Tokenizer, private_characters
from headstart.server.text.tool_formats import ToolFormat
from headstart.server.text.tool_formats.hermes import Hermes
from headstart.server.text.tool_prompt import for_calls, written_by_us
from headstart.server.text.turn_marks import NUM_SIGNS, Message, Signs, Tools
from headstart.server.text.turns import TextTurn, find_turns, refusal

__all__ = ["ChatTemplate", "Ending", "Message", "Tools"]

Ending = Literal["opened", "closed", "continued"]
"""What a rendered chat ends with: the header of the assistant's answer; the last message and what
ends it; the text of the last message, for the answer to go on from there."""

_OWN = ("messages", "tools", "documents", "add_generation_prompt")
_NONE: Mapping[str, Any] = {}


class ChatTemplate:
    """A model's chat template, and the one it has for chats with tools, if that is another; raises
    ModelError when one cannot be compiled.

    ``variables`` of the methods: what else the template reads, ``documents`` included. All of them
    raise RequestError with the template's own words when it refuses the chat, or when it passes
    ``limits``.
    """

    def __init__(self, tokenizer: Tokenizer, limits: TemplateLimits | None = None) -> None:
        if tokenizer.chat_template is None:
            raise ModelError("the model has no chat template")
        self._tokenizer = tokenizer
        self.text = tokenizer.chat_template
        """The template itself."""
        self.tool_text = tokenizer.tool_template or self.text
        """The one for chats with tools."""
        limits = limits or TemplateLimits()
        try:
            self._plain = self._for_tools = LimitedTemplate(self.text, limits)
            if self.tool_text != self.text:
                self._for_tools = LimitedTemplate(self.tool_text, limits)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is broken: {error}") from error
        self._later_system: dict[LimitedTemplate, bool] = {}
        with self._for_tools.running():
            self.able = find_abilities(self._tried)
        self.call_format: ToolFormat = Hermes({})
        """How calls are written where the template has none."""

    @property
    def _read(self) -> frozenset[str]:
        return self._plain.variables | self._for_tools.variables

    @property
    def variables(self) -> list[str]:
        """What the template reads that a request may set, by name."""
        own = {*_OWN, *self._tokenizer.special_tokens}
        return sorted(name for name in self._read - own if not name.endswith("_token"))

    @property
    def reads_documents(self) -> bool:
        return "documents" in self._read

    def _template(self, tools: Tools | None) -> LimitedTemplate:
        """The one for a chat with these tools."""
        return self._for_tools if tools else self._plain

    def _tried(self, messages: Sequence[Message], tools: Tools | None) -> str | None:
        """A small chat rendered; None when the template refuses it."""
        special = self._tokenizer.special_tokens
        try:
            return self._run(self._for_tools, messages, tools, special, answer=True)
        except Exception:  # whatever a template may do with a chat it does not expect
            return None

    def takes_later_system(self, tools: Tools | None) -> bool:
        """Whether system messages behind others are written in their places, in chats with tools or
        without; found out once, with a small chat."""
        template = self._template(tools)
        if template not in self._later_system:
            self._later_system[template] = self._writes_later_system(template)
        return self._later_system[template]

    def _writes_later_system(self, template: LimitedTemplate) -> bool:
        roles = ("system", "user", "system", "assistant", "user", "assistant", "system", "user")
        texts = [f"headstart_probe_{i}" for i in range(len(roles))]
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        special = self._tokenizer.special_tokens
        try:
            with template.running():
                rendered = self._run(template, chat, None, special, answer=True)
        except Exception:  # whatever a template may do with a chat it does not expect
            return False
        return re.findall(r"headstart_probe_\d", rendered) == texts

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        ending: Ending = "opened",
        variables: Mapping[str, Any] = _NONE,
        on_rendered: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Ids of the chat. ``on_rendered`` is called between its text and them."""
        with self._template(tools).running():
            rendered, hidden = self._rendered(messages, tools, ending, variables)
        on_rendered()
        return self._tokenizer.encode_rendered(rendered, hidden)

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        ending: Ending = "opened",
        variables: Mapping[str, Any] = _NONE,
    ) -> str:
        """The text that ``encode`` encodes.

        Special tokens that were written inside messages look like the template's own here.
        """
        with self._template(tools).running():
            rendered, hidden = self._rendered(messages, tools, ending, variables)
        return self._tokenizer.show_control(rendered, hidden)

    def layout(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        ending: Ending = "opened",
        variables: Mapping[str, Any] = _NONE,
    ) -> Layout:
        """Where messages and tools are in the text that ``render`` makes."""
        messages, tools, variables, hidden = self._hide(messages, tools, variables)
        texts = [self.text, self.tool_text, *_texts([messages, tools, variables]), *hidden.values()]
        signs = "".join(private_characters(texts, NUM_LAYOUT_SIGNS))

        template = self._template(tools)

        def render(messages: Sequence[Message], tools: Tools | None) -> str | None:
            if self._template(tools) is not template:  # another one, and another clock
                return None
            try:
                return self._render_ending(messages, tools, ending, variables)
            except TemplateLimitError:
                raise
            except RequestError:  # a template may refuse what it is asked about
                return None

        with template.running():
            text = self._render_ending(messages, tools, ending, variables)
            layout = lay_out(render, signs, messages, tools, text)
        return self._shown(layout, hidden) if hidden else layout

    def _shown(self, layout: Layout, hidden: dict[str, str]) -> Layout:
        """The layout of the text with special tokens in place of their placeholders."""

        def at(place: int) -> int:
            return len(self._tokenizer.show_control(layout.text[:place], hidden))

        places = [MessagePlace(i, at(start), at(end)) for i, start, end in layout.messages]
        tools = layout.tools
        if tools is not None:
            marks = [Mark(at(mark.at), mark.text) for mark in tools.marks]
            tools = ToolsPlace(at(tools.start), at(tools.end), marks)
        return Layout(self._tokenizer.show_control(layout.text, hidden), places, tools)

    def encode_turns(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        variables: Mapping[str, Any] = _NONE,
        on_rendered: Callable[[], None] = lambda: None,
    ) -> tuple[list[int], list[Turn]]:
        """The ids with the answer opened, and the turns among them. ``on_rendered`` is called
        between the text and them.

        Raises RequestError also when the template does not let turns be told apart.
        """
        messages, tools, variables, hidden = self._hide(messages, tools, variables)
        with self._template(tools).running():
            rendered = self._render_chat(messages, tools, variables)
            try:
                found = self._find_turns(messages, tools, variables, rendered)
            except TemplateLimitError:
                raise
            except RequestError:
                if (again := self._render_chat(messages, tools, variables)) == rendered:
                    raise
                rendered = again  # a clock in the template went on
                found = self._find_turns(messages, tools, variables, rendered)
        on_rendered()
        cuts = [cut for turn in found for cut in (turn.start, turn.end)]
        token_ids, places = self._tokenizer.encode_cut(rendered, hidden, cuts)
        turns: list[Turn] = []
        for turn, start, end in zip(found, places[::2], places[1::2], strict=True):
            if start is None or end is None or start == end:
                raise refusal(f"one token is both in and outside of the {turn.role} turn")
            turns.append(Turn(turn.role, start, end))
        return token_ids, turns

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        ending: Ending,
        variables: Mapping[str, Any],
    ) -> tuple[str, dict[str, str]]:
        """The chat, and the placeholders in it."""
        messages, tools, variables, hidden = self._hide(messages, tools, variables)
        return self._render_ending(messages, tools, ending, variables), hidden

    def _render_ending(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        ending: Ending,
        variables: Mapping[str, Any],
    ) -> str:
        if ending == "continued":
            return self._render_continued(messages, tools, variables)
        return self._render_chat(messages, tools, variables, answer=ending == "opened")

    def _render_continued(
        self, messages: Sequence[Message], tools: Tools | None, variables: Mapping[str, Any]
    ) -> str:
        """The chat up to the end of the last message's text, as transformers finds it.

        A template that strips texts leaves no space behind the sign; what it would have stripped
        of the text without a sign is stripped here, then.
        """
        *before, last = messages
        texts = [self.text, self.tool_text, *_texts([messages, tools, variables])]
        [sign] = private_characters(texts, 1)
        signed = last | {"content": f"{last['content']}{sign} "}
        rendered = self._render_chat([*before, signed], tools, variables, answer=False)
        text, found, rest = rendered.partition(sign)
        if not found or sign in rest:
            raise RequestError(
                "the model's chat template does not write the last message once and to its end, "
                "so it cannot be continued",
                "continue_final_message",
            )
        return text if rest.startswith(" ") else text.rstrip()

    def _find_turns(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        variables: Mapping[str, Any],
        rendered: str,
    ) -> list[TextTurn]:
        texts = [self.text, self.tool_text, *_texts([variables, messages, tools])]
        signs = Signs.of(private_characters(texts, NUM_SIGNS))
        special = self._tokenizer.special_tokens
        bos = {"bos_token": signs.bos} if "bos_token" in special else {}
        # The chat's own, also for small chats that leave out its tools.
        template = self._template(tools)

        def render(messages: Sequence[Message], tools: Tools | None, answer: bool) -> str | None:
            try:
                named = {**special, **bos, **variables}
                return self._render(template, messages, tools, named, answer=answer)
            except TemplateLimitError:
                raise
            except Exception:  # a template may refuse the small chats it is asked about
                return None

        return find_turns(render, signs, messages, tools, rendered, special)

    def _hide(
        self, messages: Sequence[Message], tools: Tools | None, variables: Mapping[str, Any]
    ) -> tuple[Sequence[Message], Tools | None, Mapping[str, Any], dict[str, str]]:
        """The chat with placeholders for the special tokens written in it, and these."""
        texts = [*_texts(messages), *_texts(tools), *_texts(variables)]
        hidden = self._tokenizer.placeholders(texts)
        if hidden:
            messages, tools = self._hidden(messages, hidden), self._hidden(tools, hidden)
            variables = self._hidden(variables, hidden)
        return messages, tools or None, variables, hidden

    def _hidden(self, value: Any, placeholders: dict[str, str]) -> Any:
        if isinstance(value, str):
            return self._tokenizer.hide_control(value, placeholders)
        if isinstance(value, Mapping):
            return {
                self._hidden(key, placeholders): self._hidden(item, placeholders)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hidden(item, placeholders) for item in value]
        return value

    def _render_chat(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        variables: Mapping[str, Any],
        *,
        answer: bool = True,
    ) -> str:
        """The chat, its answer opened or not; RequestError when the template refuses it."""
        named = {**self._tokenizer.special_tokens, **variables}
        try:
            return self._render(self._template(tools), messages, tools, named, answer=answer)
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            reason = str(error)
        except Exception as error:  # whatever a template may do with a chat it does not expect
            reason = f"{type(error).__name__}: {error}"
        raise RequestError(
            "the model's chat template refuses the messages", "messages", quote=f": {reason}"
        )

    def _render(
        self,
        template: LimitedTemplate,
        messages: Sequence[Message],
        tools: Tools | None,
        variables: Mapping[str, Any],
        *,
        answer: bool,
    ) -> str:
        messages, tools = written_by_us(messages, tools, self.able, self.call_format)
        return self._run(template, for_calls(messages, self.able), tools, variables, answer=answer)

    def _run(
        self,
        template: LimitedTemplate,
        messages: Sequence[Message],
        tools: Tools | None,
        variables: Mapping[str, Any],
        *,
        answer: bool,
    ) -> str:
        return template.render(
            {
                "documents": None,
                **variables,
                "messages": [_with_reasoning(message) for message in messages],
                "tools": None if tools is None else list(tools),
                "add_generation_prompt": answer,
            }
        )


def _with_reasoning(message: Message) -> Message:
    """Reasoning under each name that templates read it by, as transformers gives it to them."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _texts(value: Any) -> list[str]:
    """Every text in a JSON value, keys included."""
    texts: list[str] = []
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                texts.append(text)
            case Mapping() as fields:
                waiting += fields
                waiting += fields.values()
            case list() | tuple() as items:
                waiting += items
    return texts
