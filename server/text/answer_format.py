"""AnswerFormat: how the model that is served writes thoughts and calls, found out once at start.

``auto`` goes by what the chat template says, since it shows the model its earlier calls:

    <function= and <parameter=                     qwen3_coder
    <arg_key>                                      glm
    tool▁call, with ```json or without             deepseek_v3, deepseek_v31
    <|/tool_call|> or <|/tool|>                    phi4
    <|tool_call|>                                  granite
    ```tool_code                                   tool_code
    <|channel|>                                    harmony
    marks of other formats                         none
    <tool_call> with JSON                          hermes
    [TOOL_CALLS]                                   mistral
    <|python_start|>, or an example [f(x=...)]     pythonic
    <|python_tag|>, or the role ipython            llama3_json
    none of these                                  hermes

Where the template knows neither tools nor calls, headstart writes them (tool_prompt.py).
Thoughts are looked for where the template knows <think>, or the vocabulary has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from headstart.server.text.answer import AnswerParser
from headstart.server.text.reasoning import THINK, ThoughtMarks, ThoughtReader
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer
from headstart.server.text.tool_formats import FORMATS, ToolFormat
from headstart.server.text.tool_formats.format import quoted
from headstart.server.text.tool_formats.schemas import Function
from headstart.server.text.tool_prompt import Abilities

# Patterns that are all there, and the format.
_CALLS = (
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<arg_key>",), "glm"),
    (("tool▁call", "```json"), "deepseek_v3"),
    (("tool▁call",), "deepseek_v31"),
    ((r"<\|/tool_call\|>|<\|/tool\|>",), "phi4"),
    ((r"<\|tool_call\|>",), "granite"),
    (("```tool_code",), "tool_code"),
    ((r"<\|channel\|>",), "harmony"),
    # Read as another format, their calls would be text: Functionary, Gemma 4, Kimi, MiniMax.
    ((r"<function=|<\|tool_call|<start_function_call>|:tool_call>",), "none"),
    (("<tool_call>",), "hermes"),
    ((r"\[TOOL_CALLS\]",), "mistral"),
    ((r"<\|python_start\|>|\[\w+\(\w+ ?=",), "pythonic"),
    ((r"<\|python_tag\|>|ipython",), "llama3_json"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """How answers to one request are read. ``shown``: special tokens that are text, by id."""

    new_parser: Callable[[], AnswerParser]
    shown: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """``thoughts``, ``calls``: None where there are none to be read.

    ``told_by_us``: tools and calls are written by headstart, the template knowing none, so the
    model was perhaps never taught to call, and calls follow a grammar. ``tokens``: the marks that
    are added tokens of the vocabulary, and their ids; ``special``: those left out of texts
    otherwise.
    """

    thoughts: ThoughtMarks | None = None
    calls: ToolFormat | None = None
    told_by_us: bool = False
    tokens: Mapping[str, int] = field(default_factory=dict)
    special: Collection[str] = ()

    def __str__(self) -> str:
        calls = self.calls.name if self.calls else "not read"
        return (
            f"tool calls {calls}, thoughts {self.thoughts.opens if self.thoughts else 'not read'}"
        )

    def inside(self, prompt_end: str) -> bool:
        """Whether a prompt with this end has opened the thoughts, so that an answer begins amid
        them."""
        return self.thoughts is not None and prompt_end.rstrip().endswith(self.thoughts.opens)

    def reading(
        self, functions: Sequence[Function], *, inside: bool, only_first: bool = False
    ) -> Reading | None:
        """How answers are read; None when they are text and nothing else.

        ``functions``: those whose calls are to be read. ``only_first``: the first call ends it.
        """
        calls = self.calls
        if not functions and calls is not None and not calls.frames_text:
            calls = None
        if self.thoughts is None and calls is None:
            return None
        marks = [*(calls.marks if calls else ())]
        if self.thoughts is not None:
            marks += [self.thoughts.opens, self.thoughts.closes]

        def new_parser() -> AnswerParser:
            return AnswerParser(
                ThoughtReader(self.thoughts, inside=inside) if self.thoughts else None,
                calls.reader(functions) if calls else None,
                only_first=only_first,
            )

        shown = {self.tokens[mark]: mark for mark in marks if mark in self.special}
        return Reading(new_parser, shown)

    def calls_grammar(self, functions: Sequence[Function], *, parallel: bool) -> str:
        """A grammar for llguidance: a call of one of the functions, or several if ``parallel``."""
        assert self.calls is not None
        return f"start: calls\n{self.calls.grammar(functions, parallel=parallel)}"

    def calls_or_text_grammar(self, functions: Sequence[Function], *, parallel: bool) -> str:
        """The same, or text: before the calls, or in their place."""
        assert self.calls is not None
        rules = self.calls.grammar(functions, parallel=parallel, amid_text=True)
        return f"start: calls | TEXT?\n{rules}"

    @property
    def calls_stand_out(self) -> bool:
        """Whether calls may come in the place of other structured output."""
        return self.calls is not None and self.calls.stands_out

    def calls_or_grammar(
        self, functions: Sequence[Function], grammar: str, *, parallel: bool
    ) -> str:
        """Calls, or what follows ``grammar``, as llguidance takes it."""
        assert self.calls is not None
        rules = self.calls.grammar(functions, parallel=parallel)
        first, *others = _grammars(grammar)
        calls = {"lark_grammar": f"start: calls | @asked\n{rules}"}
        grammars = [calls, first | {"name": "asked"}, *others]
        return msgspec.json.encode({"grammars": grammars}).decode()

    def after_thoughts(self, grammar: str, *, inside: bool) -> str:
        """``grammar``, as llguidance takes it, behind thoughts if the model thinks.

        ``inside``: the prompt has opened them, so that they come; else they may.
        """
        if self.thoughts is None:
            return grammar
        opens, closes = (
            f"<[{self.tokens[mark]}]>" if mark in self.tokens else None
            for mark in (self.thoughts.opens, self.thoughts.closes)
        )
        start = "thoughts" if inside else f"({opens or quoted(self.thoughts.opens)} thoughts)?"
        # A token ends them by itself; of a text, the first one has to.
        suffix = f"[suffix={quoted(self.thoughts.closes)}]" if closes is None else ""
        rules = (
            f"start: {start} answer",
            f"thoughts: thought {closes or ''} SPACE",
            f"thought{suffix}: /(.|\\n)*/",
            "SPACE: /[ \\n]{0,4}/",
            "answer: @answer",
        )
        first, *others = _grammars(grammar)
        grammars = [{"lark_grammar": "\n".join(rules)}, first | {"name": "answer"}, *others]
        return msgspec.json.encode({"grammars": grammars}).decode()


class _Grammars(msgspec.Struct):
    """llguidance's list of grammars, of which the first one begins."""

    grammars: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]


def _grammars(text: str) -> list[dict[str, Any]]:
    """A grammar, which is such a list or a text in Lark, as such a list."""
    try:
        return msgspec.json.decode(text, type=_Grammars).grammars
    except (msgspec.MsgspecError, RecursionError):
        return [{"lark_grammar": text}]


def find_format(
    tokenizer: Tokenizer, template: ChatTemplate | None, *, calls: str, thoughts: str
) -> AnswerFormat:
    """The format of a model's answers. ``calls``: "auto", "none", or a format's name;
    ``thoughts``: "auto", "none" or "think"."""
    able = Abilities() if template is None else template.able
    if calls == "auto":
        calls = "none" if template is None else "hermes"
        if template is not None and (able.tools or able.calls or able.tools_of_system):
            calls = _calls_of(template.tool_text)
    if thoughts == "auto":
        known = set(tokenizer.added_tokens((THINK.opens, THINK.closes)))
        texts = () if template is None else (template.text, template.tool_text)
        told = any(mark in text for text in texts for mark in (THINK.opens, THINK.closes))
        thoughts = "think" if told or len(known) == 2 else "none"
    marks = [*(FORMATS[calls].marks if calls in FORMATS else ()), THINK.opens, THINK.closes]
    tokens = tokenizer.added_tokens(marks)
    return AnswerFormat(
        thoughts=THINK if thoughts == "think" else None,
        calls=FORMATS[calls](tokens) if calls in FORMATS else None,
        told_by_us=not able.tools,
        tokens=tokens,
        special=tokenizer.special_among(marks),
    )


def _calls_of(template: str) -> str:
    for patterns, name in _CALLS:
        if all(re.search(pattern, template) for pattern in patterns):
            return name
    return "hermes"
