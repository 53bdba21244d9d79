"""Calls of tools amid text, in every format: read however it is cut, and forced by grammars."""

from __future__ import annotations

import json
from functools import partial
from itertools import count

import llguidance
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.engine.errors import RequestError
from headstart.server.settings import TOOL_CALL_PARSERS
from headstart.server.text.answer import (
    AnswerParser,
    Text,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from headstart.server.text.tool_formats import FORMATS
from headstart.server.text.tool_formats.schemas import arguments_schema, kinds

AMID_TEXT = [name for name, format in FORMATS.items() if not format.frames_text]
HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'.format
ROME = '{"city": "Rome"}'
LOOK = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "from": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock"}
TOOLS = (LOOK, CLOCK)

QWEN = "<tool_call>\n<function=look>\n{}</function>\n</tool_call>".format
# Texts of formats that are alike, and what is read.
LISTED = [
    (f'Hm.<|tool_call|>[{{"name": "look", "arguments": {ROME}}}]', ["Hm.", ["look", ROME]]),
    (
        '<|tool_call|>[{"name": "any", "arguments": "{\\"a\\": 1}"}, {"name": "clock"}]'
        "<|/tool_call|>",
        [["any", '{"a": 1}'], ["clock", "{}"]],
    ),
    ('<|tool_call|>{"name": "clock"} Done.', [["clock", "{}"], " Done."]),
    ('functools[{"name": "clock", "arguments": {}}]', [["clock", "{}"]]),
    ('my functools[{"name": "clock"}]', ['my functools[{"name": "clock"}]']),
    ("<|tool_call|>[1]", ["<|tool_call|>[1]"]),
    ("functions, not calls", ["functions, not calls"]),
]
FENCED = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>".format
DEEPSEEK = [
    (
        f"Hm.<｜tool▁calls▁begin｜>{FENCED('look', ROME)}\n{FENCED('any', '{}')}"
        "<｜tool▁calls▁end｜>",
        ["Hm.", ["look", ROME], ["any", "{}"]],
    ),
    (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>look<｜tool▁sep｜>{ROME}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [["clock", "{}"], ["look", ROME]],
    ),
    (f"{FENCED('look', ROME)} Done.", [["look", ROME], " Done."]),
    ("<｜tool▁calls▁begin｜>none", ["<｜tool▁calls▁begin｜>none"]),
    (FENCED("look", "[]"), [FENCED("look", "[]")]),
    (FENCED("look", ROME).partition("me")[0], [["look", '{"city": "Ro', "cut"]]),
]


def read(format, pieces):
    """Text and calls, (name, arguments) or (name, arguments, "cut"), in order; parts joined."""
    reader = FORMATS[format]({}).reader(TOOLS)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    return joined(parts)


def joined(parts):
    found = []
    indices = count()
    for part in parts:
        match part:
            case Text(text):
                if found and isinstance(found[-1], str):
                    found[-1] += text
                else:
                    found.append(text)
            case ToolCallStart(index, _, name):
                assert index == next(indices)
                found.append([name, "", "cut"])
            case ToolCallArguments(index, text):
                found[-1][1] += text
            case ToolCallEnd(_):
                del found[-1][2]
    return found


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("hermes", "plain <b>text</b> {}", ["plain <b>text</b> {}"]),
        ("hermes", " \n text \n", [" \n text \n"]),
        ("hermes", HERMES("look", ROME), [["look", ROME]]),
        (
            "hermes",
            f"I look.\n{HERMES('look', ROME)}\n{HERMES('any', '{}')}\nDone. ",
            ["I look.", ["look", ROME], ["any", "{}"], "\nDone. "],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": "}\\"<"}, "id": [1, {}], "name": "look"}</tool_call>',
            [["look", '{"a": "}\\"<"}']],
        ),
        ("hermes", '<tool_call>{"name": "look"}</tool_call>', [["look", "{}"]]),
        ("hermes", '<tool_call>{"name": "look", "arguments": null}</tool_call>', [["look", "{}"]]),
        (
            "hermes",
            f'<tool_call>{{"name": "look", "arguments": {ROME}\n</tool_call>',
            [["look", ROME]],
        ),
        ("hermes", "a <tool_call>nothing</tool_call>", ["a <tool_call>nothing</tool_call>"]),
        ("hermes", '<tool_call>\n{"x": 1}\n</tool_call>', ['<tool_call>\n{"x": 1}\n</tool_call>']),
        ("hermes", '<tool_call>{"name": "a b"}', ['<tool_call>{"name": "a b"}']),
        ("hermes", f"<tool_call>no {HERMES('look', ROME)}", ["<tool_call>no", ["look", ROME]]),
        ("hermes", f"<<tool_<tool{HERMES('look', ROME)}", ["<<tool_<tool", ["look", ROME]]),
        ("hermes", '<tool_call>\n{"name": "lo', ['<tool_call>\n{"name": "lo']),
        (
            "hermes",
            '<tool_call>{"name": "look", "arguments": {"city": "Ro',
            [["look", '{"city": "Ro', "cut"]],
        ),
        ("hermes", '<tool_call>{"name": "look", "arguments": {}}\n</tool_', [["look", "{}"]]),
        ("llama3_json", f'{{"name": "look", "parameters": {ROME}}}', [["look", ROME]]),
        ("llama3_json", f'<|python_tag|>{{"name": "any", "parameters": {ROME}}}', [["any", ROME]]),
        (
            "llama3_json",
            f' {{"type": "function", "name": "look", "parameters": {ROME}}}; '
            '{"name": "clock", "parameters": {}};',
            [["look", ROME], ["clock", "{}"]],
        ),
        ("llama3_json", '{"name": "Bob", "age": 4}', ['{"name": "Bob", "age": 4}']),
        ("llama3_json", '{"name": "Bob", "parameters": {}}', ['{"name": "Bob", "parameters": {}}']),
        ("llama3_json", '{"name": "look"}', ['{"name": "look"}']),
        (
            "llama3_json",
            f'Say {{"name": "look", "parameters": {ROME}}}',
            [f'Say {{"name": "look", "parameters": {ROME}}}'],
        ),
        ("llama3_json", "<|python_tag|>print(1)", ["<|python_tag|>print(1)"]),
        (
            "mistral",
            f'[TOOL_CALLS] [{{"name": "look", "arguments": {ROME}}}, '
            '{"name": "any", "arguments": {}}]',
            [["look", ROME], ["any", "{}"]],
        ),
        (
            "mistral",
            f"[TOOL_CALLS]look{ROME}[TOOL_CALLS]clock{{}}",
            [["look", ROME], ["clock", "{}"]],
        ),
        ("mistral", f"Hm.[TOOL_CALLS]look[ARGS]{ROME}", ["Hm.", ["look", ROME]]),
        ("mistral", f"[TOOL_CALLS]look[CALL_ID]ab12[ARGS] {ROME}", [["look", ROME]]),
        ("mistral", "[TOOL_CALLS] [1, 2] [x]", ["[TOOL_CALLS] [1, 2] [x]"]),
        ("mistral", "[TOOL_[TOOL_CALLS]look(1)", ["[TOOL_[TOOL_CALLS]look(1)"]),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "look", "arguments": {}}, {"name": ',
            [["look", "{}"], ', {"name": '],
        ),
        (
            "pythonic",
            "[look(city='Rome', days=-2, from=True, x=[1.50, (None,)], y={'a': \"'\"},), clock()]",
            [
                [
                    "look",
                    '{"city": "Rome", "days": -2, "from": true, "x": [1.50, [null]], '
                    '"y": {"a": "\'"}}',
                ],
                ["clock", "{}"],
            ],
        ),
        ("pythonic", "<|python_start|>[any(n=0x1f)]<|python_end|>", [["any", '{"n": 31}']]),
        ("pythonic", 'x = [look(city="Rome")]', ['x = [look(city="Rome")]']),
        ("pythonic", "[1, 2, 3]", ["[1, 2, 3]"]),
        ("pythonic", "[any(a=1)]", ["[any(a=1)]"]),
        *(
            ("pythonic", f"[look({bad})]", [f"[look({bad})]"])
            for bad in (
                "1",
                "a=b",
                "a=f()",
                "a=1, a=2",
                "**{}",
                "a=1+1",
                "a=b'x'",
                "a=1e999j",
                "a={1: 2}",
                'a="\\ud800"',
                "a=f'{x}'",
                "a=" + "[" * 70 + "]" * 70,
                "a=__import__('os')",
                "a=",
                "a=-True",
            )
        ),
        ("pythonic", "[look(a=1), clock(b=c)] x", [["look", '{"a": 1}'], ", clock(b=c)] x"]),
        ("pythonic", '[look(a="Ro', ['[look(a="Ro']),
        ("pythonic", '[look(a="\\ud83d\\ude00é\\n")]', [["look", '{"a": "\U0001f600é\\n"}']]),
        *((format, *case) for format in ("phi4", "granite") for case in LISTED),
        ("qwen3_coder", QWEN("<parameter=city>\nRome\n</parameter>\n"), [["look", ROME]]),
        ("qwen3_coder", f"Hm.\n{QWEN('')}\n{QWEN('')}", ["Hm.", ["look", "{}"], ["look", "{}"]]),
        (
            "qwen3_coder",
            QWEN(
                '<parameter=city>\n\n "R<o>\n</param>\n\n\n</parameter>'
                "<parameter=days> 3 </parameter>\n<parameter=from>\nTrue\n</parameter>"
                "<parameter=city>again</parameter><parameter=more>1</parameter>"
            ),
            [
                [
                    "look",
                    '{"city": "\\n \\"R<o>\\n</param>\\n\\n", "days": 3, '
                    '"from": true, "more": "1"}',
                ]
            ],
        ),
        ("qwen3_coder", QWEN("<parameter=days>soon</parameter>"), [["look", '{"days": "soon"}']]),
        ("qwen3_coder", QWEN("<parameter=days>NaN</parameter>"), [["look", '{"days": "NaN"}']]),
        (
            "qwen3_coder",
            "<function=look>\n</function>\n<function=clock>\n</function>\n</tool_call>",
            [["look", "{}"], ["clock", "{}"]],
        ),
        ("qwen3_coder", "<function=any>\n</function>", ["<function=any>\n</function>"]),
        ("qwen3_coder", HERMES("look", ROME), [HERMES("look", ROME)]),
        (
            "qwen3_coder",
            "<tool_call><function=look><parameter=city>\nRo",
            [["look", '{"city": "Ro', "cut"]],
        ),
        ("qwen3_coder", "<tool_call><function=look><parameter=days>\n4", [["look", "{", "cut"]]),
        (
            "qwen3_coder",
            "<tool_call><function=look><parameter=city>a</parameter>\n<parm=b>",
            [["look", '{"city": "a"}'], "\n<parm=b>"],
        ),
        ("qwen3_coder", "<tool_call><function=look></function>\n</to", [["look", "{}"]]),
        (
            "glm",
            "Hm.<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>\nRome</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
            ["Hm.", ["look", '{"city": "\\nRome", "days": 3}']],
        ),
        (
            "glm",
            "<tool_call>look<arg_key>city</arg_key><arg_value>a</arg_value></tool_call>"
            "<tool_call>clock</tool_call>",
            [["look", '{"city": "a"}'], ["clock", "{}"]],
        ),
        ("glm", "<tool_call>nothing</tool_call>", ["<tool_call>nothing</tool_call>"]),
        ("glm", HERMES("look", ROME), [HERMES("look", ROME)]),
        (
            "glm",
            "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Ro</arg_va",
            [["look", '{"city": "Ro', "cut"]],
        ),
        *((f"deepseek_{version}", *case) for version in ("v3", "v31") for case in DEEPSEEK),
        ("tool_code", "Hm.\n```tool_code\nlook(city='Rome')\n```", ["Hm.", ["look", ROME]]),
        (
            "tool_code",
            "```tool_code\nany(a=1)\nclock()\n```\nDone.",
            [["any", '{"a": 1}'], ["clock", "{}"], "\nDone."],
        ),
        (
            "tool_code",
            "```tool_code\n[any(a=1), clock()]\n```",
            [["any", '{"a": 1}'], ["clock", "{}"]],
        ),
        ("tool_code", "```tool_code\nx = 1\n```", ["```tool_code\nx = 1\n```"]),
        ("tool_code", "```python\nlook()\n```", ["```python\nlook()\n```"]),
        ("tool_code", "```tool_code\nclock()\n``", [["clock", "{}"]]),
        (
            "hermes",
            '<tool_call>{"name": "look", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
            [["look", ROME]],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": "", "name": "look"}</tool_call>',
            [["look", "{}"]],
        ),
        (
            "hermes",
            '<tool_call>{"name": "look", "arguments": "Rome"}</tool_call>',
            ['<tool_call>{"name": "look", "arguments": "Rome"}</tool_call>'],
        ),
    ],
)
def test_texts_and_calls(format, text, expected):
    assert read(format, [text]) == expected
    assert read(format, text) == expected


PIECES = st.sampled_from(
    (
        *(mark for format in FORMATS.values() for mark in format.marks),
        '{"name": "look", ',
        '"name": "look", ',
        '"arguments": {',
        '"arguments": "{}"',
        '"parameters": {',
        "<function=look>",
        "<parameter=city>",
        "<parameter=days>",
        "</parameter>",
        "</function>",
        "city",
        "function",
        "functools",
        "```json",
        "```",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        "look(",
        "a='x'",
        ")",
        ",",
        ";",
        " ",
        "\n",
        "<",
        "look",
        "é",
    )
)


@given(format=st.sampled_from(AMID_TEXT), pieces=st.lists(PIECES, max_size=14), data=st.data())
@settings(deadline=None, max_examples=4 * settings.default.max_examples)
def test_cuts_change_nothing(format, pieces, data):
    text = "".join(pieces)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    cuts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = read(format, [text])
    assert read(format, cuts) == whole
    # What is no call is given back as it was.
    if all(isinstance(part, str) for part in whole):
        assert "".join(whole) == text


def test_the_name_and_arguments_come_as_they_grow():
    reader = FORMATS["hermes"]({}).reader(TOOLS)
    pieces = [
        "a ",
        "<tool",
        '_call>{"name": "lo',
        'ok"',
        ', "arguments": ',
        '{"city"',
        ': "R',
        '"}',
        "}",
    ]
    found = [reader.push(piece) for piece in pieces]
    assert [[type(part) for part in parts] for parts in found] == [
        [Text],
        [],
        [],
        [],
        [],
        [ToolCallStart, ToolCallArguments],
        [ToolCallArguments],
        [ToolCallArguments, ToolCallEnd],
        [],
    ]


def test_ids_are_as_the_model_wants_them():
    def ids(format, text):
        parts = FORMATS[format]({}).reader(TOOLS).push(text)
        return [part.id for part in parts if isinstance(part, ToolCallStart)]

    first, second = ids("hermes", HERMES("look", "{}") * 2)
    assert first != second
    assert first.startswith("call_")
    assert len(first) == 29
    [short] = ids("mistral", "[TOOL_CALLS]look{}")
    assert len(short) == 9
    assert short.isalnum()


def test_an_answer_may_end_with_its_first_call():
    text = f"Hm.{HERMES('look', ROME) * 2}"
    parser = AnswerParser(None, FORMATS["hermes"]({}).reader(TOOLS), only_first=True)
    assert not parser.done
    assert joined(parser.push(text)) == ["Hm.", ["look", ROME]]
    assert parser.done
    assert parser.calls_tools


def test_reading_takes_time_in_proportion():
    text = '<tool_call>{"a": "' * 20_000
    assert read("hermes", [text]) == [text]
    text = "[look(" * 20_000
    assert read("pythonic", [text]) == [text]


def test_the_flag_knows_every_format():
    assert set(TOOL_CALL_PARSERS) == {"auto", "none", *FORMATS}


# Grammars


def build(marks):
    """A byte-level tokenizer with ``marks`` as tokens of their own, and llguidance's of it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = [tokenizers.AddedToken(mark, special=True) for mark in ("<|end|>", *marks)]
    backend.add_special_tokens(added)
    end = backend.token_to_id("<|end|>")
    ids = {mark: backend.token_to_id(mark) for mark in marks}
    return backend, llguidance.LLTokenizer(backend.to_str(), eos_token=end), ids, end


@pytest.fixture(scope="module")
def vocabularies():
    """By format: with its marks as tokens, and without."""
    marks = {name: format.marks for name, format in FORMATS.items()}
    with_marks = {name: build(found) for name, found in marks.items()}
    return {False: dict.fromkeys(FORMATS, build(())), True: with_marks}


def matcher_of(tokenizer, rules, start="calls"):
    matcher = llguidance.LLMatcher(tokenizer, f"start: {start}\n{rules}", log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def random_answer(vocabulary, rules, seed, start="calls", begins="", leave=""):
    """A text that the grammar lets through, chosen at random, with what ends it first.

    ``leave``: a mark that ends texts that stand there as they are; chance would not find it.
    """
    backend, tokenizer, _, end = vocabulary
    matcher, random = matcher_of(tokenizer, rules, start), np.random.default_rng(seed)
    closing = {backend.token_to_id(char) for char in '}])"'}
    mark = backend.encode(leave).ids
    ids = backend.encode(begins, add_special_tokens=False).ids
    assert matcher.consume_tokens(ids), begins
    while not matcher.is_stopped():
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        choices = [i for i in allowed if i == end or i in closing] if len(ids) > 60 else []
        if end in choices:
            choices = [end]
        leaves = mark and len(ids) > 60 and choices != [end]
        if leaves and matcher.validate_tokens(mark) == len(mark):
            tokens = mark
        else:
            tokens = [int(random.choice(choices or allowed))]
        assert matcher.consume_tokens(tokens)
        if tokens != [end]:
            ids += tokens
        assert len(ids) < 2000
    assert not matcher.is_error(), matcher.get_error()
    return backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("format", AMID_TEXT)
@pytest.mark.parametrize("parallel", [False, True])
def test_what_a_grammar_lets_through_are_calls(vocabularies, format, as_tokens, parallel):
    vocabulary = vocabularies[as_tokens][format]
    rules = FORMATS[format](vocabulary[2]).grammar([LOOK, CLOCK], parallel=parallel)
    numbers = set()
    for seed in range(12):
        calls = read(format, [random_answer(vocabulary, rules, seed, leave=TYPED.get(format, ""))])
        check_calls(calls)
        numbers.add(len(calls))
    assert 0 not in numbers
    if not parallel:
        assert numbers == {1}


def check_calls(calls):
    """That they are calls, and follow the schemas of the tools."""
    assert all(isinstance(call, list) and len(call) == 2 for call in calls), calls
    for name, written in calls:
        arguments = json.loads(written)
        if name == "clock":
            assert arguments == {}
        else:
            assert name == "look"
            assert isinstance(arguments["city"], str)
            assert set(arguments) <= {"city", "days", "from"}
            assert isinstance(arguments.get("days", 0), int)
            assert arguments.get("from") in (None, True, False)


# Formats with texts as they are, and what ends these.
TYPED = {"qwen3_coder": "</parameter>", "glm": "</arg_value>"}
# How calls begin, and whether text may come before.
BEGINNINGS = {
    "hermes": ("<tool_call>", True),
    "llama3_json": ('{"name": ', False),
    "mistral": ("[TOOL_CALLS]", True),
    "pythonic": ("[", False),
    "qwen3_coder": ("<tool_call>", True),
    "glm": ("<tool_call>", True),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", True),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>", True),
    "phi4": ("<|tool_call|>", True),
    "granite": ("<|tool_call|>", True),
    "tool_code": ("```tool_code", True),
}
SAYINGS = ("Rome: ", "a < b <tool {", "1 [a] [TOOL", "\n", " <|python")


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("format", AMID_TEXT)
def test_what_may_be_text_is_text_or_calls(vocabularies, format, as_tokens):
    vocabulary = vocabularies[as_tokens][format]
    rules = FORMATS[format](vocabulary[2]).grammar([LOOK, CLOCK], parallel=True, amid_text=True)
    mark, amid_text = BEGINNINGS[format]
    answer = partial(random_answer, vocabulary, rules, start="calls | TEXT?")
    for seed, said in enumerate((*SAYINGS, "")):
        for begins in (said, said + mark) if amid_text or not said else (said,):
            leave = TYPED.get(format, "")
            parts = read(format, [answer(seed, begins=begins, leave=leave)])
            if said.strip():
                assert parts.pop(0).startswith(said.rstrip())
            elif parts and isinstance(parts[0], str):
                del parts[0]
            assert parts or begins == said
            check_calls(parts)


TYPICAL = {
    "hermes": (HERMES("look", ROME), f"{HERMES('look', ROME)}\n{HERMES('clock', '{}')}"),
    "llama3_json": (
        f'{{"name": "look", "parameters": {ROME}}}',
        f'{{"name": "look", "parameters": {ROME}}}; {{"name": "clock", "parameters": {{}}}}',
    ),
    "mistral": (
        f'[TOOL_CALLS] [{{"name": "look", "arguments": {ROME}}}]',
        f'[TOOL_CALLS] [{{"name": "look", "arguments": {ROME}}}, '
        '{"name": "clock", "arguments": {}}]',
    ),
    "pythonic": ("[look(city='Rome')]", "[look(city='Rome'), clock()]"),
    "qwen3_coder": (
        QWEN("<parameter=city>\nRome\n</parameter>\n"),
        QWEN("<parameter=city>\nRome\n</parameter>\n")
        + "\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    ),
    "glm": (
        "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
        "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
        "\n<tool_call>clock\n</tool_call>",
    ),
    "deepseek_v3": (
        f"<｜tool▁calls▁begin｜>{FENCED('look', ROME)}<｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜>{FENCED('look', ROME)}\n{FENCED('clock', '{}')}"
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>"
        f"{ROME}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>"
        f"{ROME}<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>"
        "{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "phi4": (
        f'<|tool_call|>[{{"name": "look", "arguments": {ROME}}}]<|/tool_call|>',
        f'<|tool_call|>[{{"name": "look", "arguments": {ROME}}}, '
        '{"name": "clock", "arguments": {}}]<|/tool_call|>',
    ),
    "granite": (
        f'<|tool_call|>[{{"name": "look", "arguments": {ROME}}}]',
        f'<|tool_call|>[{{"name": "look", "arguments": {ROME}}}, '
        '{"name": "clock", "arguments": {}}]',
    ),
    "tool_code": (
        "```tool_code\nlook(city='Rome')\n```",
        "```tool_code\nlook(city='Rome')\nclock()\n```",
    ),
}


def typical(format, ids):
    """One call, and several, as the model writes them."""
    if format == "mistral" and ids:
        one = f"[TOOL_CALLS]look[ARGS]{ROME}"
        return one, one + "[TOOL_CALLS]clock[ARGS]{}"
    return TYPICAL[format]


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("format", AMID_TEXT)
def test_calls_are_written_as_models_write_them(vocabularies, format, as_tokens):
    ids = vocabularies[as_tokens][format][2]
    calls = [("look", ROME), ("clock", "{}")]
    written = FORMATS[format](ids).written
    assert (written(calls[:1]), written(calls)) == typical(format, ids)
    odd = json.dumps({"city": 'é"\n\\<', "days": -3, "from": None, "more": [1.5, {"a": True}]})
    [(_, arguments)] = read(format, [written([("look", odd)])])
    expected = json.loads(odd)
    if format in TYPED:
        expected["more"] = '[1.5, {"a": true}]'  # of which the schema knows nothing
    assert json.loads(arguments) == expected


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("format", AMID_TEXT)
def test_grammars_let_through_what_models_write(vocabularies, format, as_tokens):
    backend, tokenizer, ids, end = vocabularies[as_tokens][format]
    one, several = typical(format, ids)
    if format in ("pythonic", "tool_code"):  # the grammar has JSON's texts
        one, several = (text.replace("'", '"') for text in (one, several))

    def takes(text, functions, parallel):
        rules = FORMATS[format](ids).grammar(functions, parallel=parallel)
        written = [*backend.encode(text, add_special_tokens=False).ids, end]
        return matcher_of(tokenizer, rules).validate_tokens(written) == len(written)

    assert takes(one, [LOOK, CLOCK], False)
    assert takes(one, [LOOK], False)
    assert not takes(one, [CLOCK], False)
    assert not takes(several, [LOOK, CLOCK], False)
    assert takes(several, [LOOK, CLOCK], True)
    assert not takes("Rome", [LOOK, CLOCK], True)
    if format not in TYPED:
        assert not takes(one.replace('"Rome"', "3"), [LOOK], False)
    else:  # texts stand there as they are, so any is one
        one = one.replace("city", "days")
        days = {"name": "look", "parameters": {"properties": {"days": {"type": "integer"}}}}
        assert takes(one.replace("Rome", "3"), [days], False)
        assert not takes(one, [days], False)


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("format", AMID_TEXT)
def test_text_is_no_call(vocabularies, format, as_tokens):
    backend, tokenizer, ids, end = vocabularies[as_tokens][format]
    rules = FORMATS[format](ids).grammar([LOOK], parallel=False, amid_text=True)
    matcher = matcher_of(tokenizer, rules, "calls | TEXT?")

    def takes(text, *, spelled=False):
        pieces = text if spelled else [text]
        written = [i for piece in pieces for i in backend.encode(piece).ids]
        return matcher.deep_copy().validate_tokens([*written, end]) == len(written) + 1

    for text in ("", "Rome", "Rome is hot.\nVery.", "日本 ✓", "a < b", "see [1] {2}"):
        assert takes(text), text
    (mark, amid_text), (one, _) = BEGINNINGS[format], typical(format, ids)
    if format in ("pythonic", "tool_code"):  # the grammar has JSON's texts
        one = one.replace("'", '"')
    assert not takes(one.replace("look", "clock"))
    assert not takes(mark)
    # The letters of a mark that is a token are read as the mark, too.
    assert not takes(mark, spelled=True)
    assert takes(f"Rome. {mark}", spelled=True) != amid_text
    assert takes(one)
    assert takes(f"Rome. {one}")
    assert (read(format, [f"Rome. {one}"]) == [f"Rome. {one}"]) != amid_text


@pytest.mark.parametrize("format", AMID_TEXT)
def test_schemas_that_cannot_be_enforced(vocabularies, format):
    """They are errors for strict functions, else what cannot be enforced is left out."""
    _, tokenizer, ids, _ = vocabularies[False][format]
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "no-such"}}}
    for strict in (False, True):
        function = {"name": "f", "parameters": odd, "strict": strict}
        if strict and format in TYPED:
            with pytest.raises(RequestError, match=r"'f\.properties\.a\.format' cannot be"):
                FORMATS[format](ids).grammar([function], parallel=False)
            continue
        rules = FORMATS[format](ids).grammar([function], parallel=False)
        matcher = llguidance.LLMatcher(tokenizer, f"start: calls\n{rules}", log_level=0)
        assert matcher.is_error() == strict


NESTED = {
    "properties": {
        "at": {"properties": {"x": {"type": "integer"}}},
        "all": {"type": "array", "items": {"properties": {"y": {"type": "integer"}}}},
        "any": {"type": "object"},
        "open": {"properties": {"z": {"type": "integer"}}, "additionalProperties": True},
        "default": {"enum": [{"properties": {}}]},
    },
}


@pytest.mark.parametrize("strict", [False, True])
def test_objects_have_the_properties_that_they_name(vocabularies, strict):
    backend, tokenizer, ids, end = vocabularies[False]["hermes"]
    tool = {"name": "f", "parameters": NESTED, "strict": strict}
    rules = FORMATS["hermes"](ids).grammar([tool], parallel=False)
    matcher = matcher_of(tokenizer, rules)

    def takes(arguments):
        written = [*backend.encode(HERMES("f", arguments)).ids, end]
        return matcher.deep_copy().validate_tokens(written) == len(written)

    for arguments in (
        "{}",
        '{"at": {"x": 1}, "all": [{"y": 1}], "any": {"a": 1}, "open": {"z": 1, "a": 1}}',
        '{"default": {"properties": {}}}',
    ):
        assert takes(arguments), arguments
    for arguments in ('{"a": 1}', '{"at": {"x": 1, "a": 1}}', '{"all": [{"a": 1}]}'):
        assert not takes(arguments), arguments


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"x": {"properties": {"a": {}}, "$ref": "#/$defs/b"}}},
    ],
)
def test_objects_put_together_of_several_are_left_as_they_are(schema):
    assert arguments_schema({"name": "f", "parameters": schema}) == {"type": "object"} | schema


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"enum": [1, "a", None]}, {"integer", "string", "null"}),
        ({"const": 1.5}, {"number"}),
        ({"anyOf": [{"type": "array"}, {"$ref": "#/$defs/b"}]}, {"array", "boolean"}),
        ({"anyOf": [{"type": "array"}, {}]}, set()),
        ({"$ref": "#/$defs/none"}, set()),
        ({"$ref": "#/$defs/loop"}, {"object"}),
        ({}, set()),
        (True, set()),
    ],
)
def test_types_of_values(schema, expected):
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "object"}, {"$ref": "#/$defs/loop"}]}
    assert kinds(schema, {"$defs": {"b": {"type": "boolean"}, "loop": loop}}) == expected


def test_types_take_time_in_proportion():
    defs = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
    defs["a60"] = {"type": "null"}
    assert kinds({"$ref": "#/$defs/a0"}, {"$defs": defs}) == {"null"}
