"""Tools in chats: what the template and the engine get, calls in answers, what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import httpx
import llguidance
import msgspec
import pytest
import tokenizers
from tokenizers import AddedToken

from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings
from headstart.server.text.answer_format import AnswerFormat, find_format
from headstart.server.text.reasoning import THINK
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer
from headstart.server.text.tool_formats import FORMATS

URL = "/v1/chat/completions"
TEMPLATES = Path(__file__).parent / "chat_templates"
USER = {"role": "user", "content": "hi"}
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "the fox",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "look"}}
ROME = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "look", "arguments": {ROME}}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
# Writes everything that a message may have, as JSON, so that tests can read it.
SHOWS_ALL = (
    "{% if tools %}TOOLS {{ tools | tojson }} /TOOLS {# <tool_call> #}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def allowed(mode, *names):
    """A ``tool_choice`` of some of the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture
def build(engine, backend):
    """An app over a template; ``tokens`` are special tokens of its vocabulary."""

    def make(template=SHOWS_ALL, tokens=(), **settings):
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        own.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        engine.model = msgspec.structs.replace(
            engine.model, vocab_size=own.get_vocab_size(), max_model_len=4096
        )
        tokenizer = Tokenizer(own, special_tokens={"eos_token": "<|eos|>"}, chat_template=template)
        return create_app(
            engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**settings)
        )

    return make


@pytest.fixture
def ask(build, engine):
    """``await ask(text, field=value)``: the response to an answer of this text."""

    async def send(text="", *, app=None, **fields):
        app = app or build()
        tokenizer = app.state.runtime.tokenizer
        engine.answer = lambda _: tokenizer.encode(text, add_special_tokens=False)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"model": "tiny", "messages": [USER]} | fields
            response = await http.post(URL, json=body)
        await app.state.runtime.grammars.close()
        return response

    return send


@pytest.fixture
def choice(ask):
    """The one choice of an answer that has to be a 200."""

    async def get(text="", **fields):
        response = await ask(text, **fields)
        assert response.status_code == 200, response.text
        [found] = response.json()["choices"]
        return found

    return get


def shown(engine, app):
    """What the template wrote: the tools, and the messages."""
    text = app.state.runtime.tokenizer.decode_all(engine.added[-1].token_ids)
    tools, _, rest = text.rpartition(" /TOOLS ")
    messages = [
        json.loads(part.split("<|im_end|>")[0]) for part in rest.split("<|im_start|>")[1:-1]
    ]
    return json.loads(tools.removeprefix("TOOLS ")) if tools else None, messages


async def test_calls_in_a_whole_answer(choice):
    found = await choice(f"I look.\n{CALL}\n{CLOCK_CALL}", tools=[LOOK, CLOCK])
    assert found["finish_reason"] == "tool_calls"
    message = found["message"]
    assert message["content"] == "I look."
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "look", "arguments": ROME},
        {"name": "clock", "arguments": "{}"},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert (await choice(CALL, tools=[LOOK]))["message"]["content"] is None


async def test_no_calls(choice):
    found = await choice("hello", tools=[LOOK])
    assert found["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert found["finish_reason"] == "stop"
    for fields in ({}, {"tools": [LOOK], "tool_choice": "none"}, {"tools": []}):
        found = await choice(CALL, **fields)
        assert found["message"]["content"] == CALL
        assert found["finish_reason"] == "stop"


async def test_calls_in_a_stream(ask, engine, events):
    engine.per_output = 3
    response = await ask(f"So {CALL}{CLOCK_CALL}", tools=[LOOK, CLOCK], stream=True)
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "So"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    starts = [call for call in calls if "id" in call]
    assert [(call["index"], call["type"], call["function"]) for call in starts] == [
        (0, "function", {"name": "look", "arguments": ""}),
        (1, "function", {"name": "clock", "arguments": ""}),
    ]
    rest = [call for call in calls if "id" not in call]
    assert all(set(call) == {"index", "function"} for call in rest)
    arguments = ["", ""]
    for call in rest:
        assert set(call["function"]) == {"arguments"}
        arguments[call["index"]] += call["function"]["arguments"]
    assert arguments == [ROME, "{}"]
    assert len(rest) > 3
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_calls(ask, app, events, say, stream):
    response = await ask(CALL, tools=[LOOK], logprobs=True, stream=stream)
    choices = (
        [chunk["choices"][0] for chunk in events(response.text)[:-1]]
        if stream
        else response.json()["choices"]
    )
    content = [
        entry for each in choices if each["logprobs"] for entry in each["logprobs"]["content"]
    ]
    assert "".join(entry["token"] for entry in content) == CALL


async def test_one_call_at_most(choice, engine):
    found = await choice(CALL + CLOCK_CALL, tools=[LOOK, CLOCK], parallel_tool_calls=False)
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    assert found["finish_reason"] == "tool_calls"
    assert engine.added[0].stream.aborted >= 1


async def test_cut_short(choice, say):
    text = '<tool_call>\n{"name": "look", "arguments": {"city": "Ro'
    found = await choice(text, tools=[LOOK], max_tokens=len(say(text)))
    assert found["finish_reason"] == "length"
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Ro'


async def test_several_choices(ask, engine, events):
    response = await ask(CALL, tools=[LOOK], n=2)
    calls = [found["message"]["tool_calls"][0] for found in response.json()["choices"]]
    assert calls[0]["id"] != calls[1]["id"]
    assert calls[0]["function"] == calls[1]["function"]


async def test_tools_and_calls_reach_the_template(build, choice, engine):
    app = build()
    strict = {"type": "function", "function": LOOK["function"] | {"strict": True, "x": None}}
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": ROME}}
    clock = {"id": "b", "type": "function", "function": {"name": "clock", "arguments": ""}}
    await choice(
        app=app,
        tools=[strict],
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call, clock | {"index": 1}]},
            {"role": "tool", "tool_call_id": "a", "content": "hot"},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "12"}]},
            {"role": "assistant", "content": "Hot.", "tool_calls": []},
        ],
    )
    tools, messages = shown(engine, app)
    assert tools == [LOOK]
    parsed = {"name": "look", "arguments": {"city": "Rome"}}
    assert messages == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                call | {"function": parsed},
                clock | {"function": {"name": "clock", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "hot"},
        {"role": "tool", "tool_call_id": "b", "content": "12"},
        {"role": "assistant", "content": "Hot."},
    ]


async def test_the_prompt_does_not_depend_on_the_choice(choice, engine):
    for tool_choice in ("none", "auto", None):
        await choice(tools=[LOOK, CLOCK], tool_choice=tool_choice)
    assert all(added.params.grammar is None for added in engine.added)
    for tool_choice in ("required", NAMED, allowed("auto", "clock"), allowed("required", "look")):
        await choice(tools=[LOOK, CLOCK], tool_choice=tool_choice)
    first, *others = (added.token_ids for added in engine.added)
    assert all(ids == first for ids in others)


STRICT = {"type": "function", "function": LOOK["function"] | {"strict": True}}


@pytest.mark.parametrize("tokens", [(), ("<tool_call>", "</tool_call>")])
@pytest.mark.parametrize(
    ("fields", "passes", "fails"),
    [
        (
            {"tools": [STRICT, CLOCK]},
            ("", "Rome is hot.", CALL, f"I look.\n{CALL}", f"{CALL}\n{CLOCK_CALL}"),
            (CALL.replace("city", "town"), CALL.replace("look", "other"), f"{CALL} Done."),
        ),
        (
            {"tools": [STRICT, CLOCK], "parallel_tool_calls": False},
            ("Rome is hot.", f"I look.\n{CALL}", CLOCK_CALL),
            (f"{CALL}\n{CLOCK_CALL}", "<tool_call>", "I <tool_call> you"),
        ),
        (
            {"tools": [LOOK, CLOCK], "tool_choice": allowed("auto", "clock")},
            ("Rome is hot.", CLOCK_CALL, f"{CLOCK_CALL}\n{CLOCK_CALL}"),
            (CALL, f"{CLOCK_CALL}\n{CALL}"),
        ),
        (
            {"tools": [LOOK], "response_format": {"type": "json_object"}},
            ('{"a": 1}', CALL, f"{CALL}\n{CALL}"),
            ("", "Rome is hot.", f'{{"a": 1}}{CALL}', CALL.replace("city", "town")),
        ),
    ],
)
async def test_calls_that_may_be_made_are_right(
    choice, build, engine, tokens, fields, passes, fails
):
    app = build(SHOWS_ALL, tokens)
    await choice("Rome is hot.", app=app, **fields)
    follows = partial(follows_grammar, app, engine.added[0].params.grammar)
    assert [text for text in passes if not follows(text)] == []
    assert [text for text in fails if follows(text)] == []


async def test_other_structured_output_that_looks_like_calls_stands_alone(choice, build, engine):
    """A call of Llama 3's may be the JSON that is asked for; then it is that."""
    app = build(SHOWS_ALL, tool_call_parser="llama3_json")
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"required": ["a"]}}}
    await choice('{"a": 1}', app=app, tools=[LOOK], response_format=asked)
    follows = partial(follows_grammar, app, engine.added[0].params.grammar)
    assert follows('{"a": 1}')
    assert not follows(f'{{"name": "look", "parameters": {ROME}}}')


async def test_calls_are_right_where_the_template_knows_none(choice, build, engine):
    """Text is free; what opens a call has to become one. Without tools nothing is followed."""
    app = build((TEMPLATES / "smollm2.jinja").read_text())
    found = await choice(f"I look.\n{CALL}", app=app, tools=[LOOK, CLOCK])
    assert found["message"]["content"] == "I look."
    assert found["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": ROME}
    follows = partial(follows_grammar, app, engine.added[0].params.grammar)
    for text in ("", "Rome is hot.", CALL, f"I look.\n{CALL}\n{CLOCK_CALL}"):
        assert follows(text), text
    made_up = "<tool_response>\nhot\n</tool_response>"
    wrong = CALL.replace("city", "town"), CALL.replace("look", "other"), "<tool_call>hm", made_up
    for text in (*wrong, f"{made_up}\n{CALL}"):
        assert not follows(text), text
    await choice("hi", app=app)
    await choice("hi", app=app, tools=[LOOK], tool_choice="none")
    assert [added.params.grammar for added in engine.added[1:]] == [None, None]
    await choice(CALL, app=app, tools=[LOOK, CLOCK], tool_choice="required")
    assert not follows_grammar(app, engine.added[-1].params.grammar, "Rome is hot.")


@pytest.mark.parametrize(
    ("fields", "passes", "fails"),
    [
        ({"tool_choice": "required"}, (CALL, CLOCK_CALL, f"{CALL}\n{CLOCK_CALL}"), ("Rome", "")),
        ({"tool_choice": NAMED}, (CALL,), (CLOCK_CALL, f"{CALL}\n{CALL}")),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            (CALL, CLOCK_CALL),
            (f"{CALL}\n{CLOCK_CALL}",),
        ),
        (
            {"tool_choice": allowed("required", "look")},
            (CALL, f"{CALL}\n{CALL}"),
            (CLOCK_CALL, f"{CALL}\n{CLOCK_CALL}", "Rome"),
        ),
        (
            {"tool_choice": allowed("required", "clock", "look"), "parallel_tool_calls": False},
            (CALL, CLOCK_CALL),
            (f"{CALL}\n{CLOCK_CALL}",),
        ),
    ],
)
async def test_forced_calls(choice, build, engine, fields, passes, fails):
    app = build()
    found = await choice(CALL, app=app, tools=[LOOK, CLOCK], **fields)
    assert found["finish_reason"] == "tool_calls"
    follows = partial(follows_grammar, app, engine.added[0].params.grammar)
    assert all(map(follows, passes))
    assert not any(map(follows, fails))


def follows_grammar(app, grammar, text):
    """Whether a text, and its end, follow a grammar."""
    backend = app.state.runtime.tokenizer.backend
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer(backend.to_str(), eos_token=0), grammar, log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    ids = backend.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("tokens", [(), ("<think>", "</think>", "<tool_call>", "</tool_call>")])
@pytest.mark.parametrize("opened", [False, True])
async def test_thoughts_come_before_forced_calls(choice, build, engine, tokens, opened):
    template = SHOWS_ALL.replace("assistant\n", "assistant\n<think>\n") if opened else SHOWS_ALL
    app = build(template, tokens, reasoning_parser="think")
    text = ("" if opened else "<think>\n") + f"hm {{}}\n</think>\n\n{CALL}"
    found = await choice(text, app=app, tools=[LOOK], tool_choice="required")
    assert found["message"]["reasoning_content"] == "hm {}"
    assert len(found["message"]["tool_calls"]) == 1
    follows = partial(follows_grammar, app, engine.added[0].params.grammar)
    assert follows(text)
    assert follows(CALL) == (not opened)
    assert not follows(text.replace(CALL, "Rome"))


@pytest.mark.parametrize("opened", [False, True])
async def test_thoughts_come_before_structured_output(choice, build, engine, opened):
    template = SHOWS_ALL.replace("assistant\n", "assistant\n<think>\n") if opened else SHOWS_ALL
    app = build(template, reasoning_parser="think")
    text = ("" if opened else "<think>") + 'hm</think>{"a": 1}'
    for format in (
        {"type": "json_object"},
        {"type": "regex", "pattern": r"\{.*\}"},
        {"type": "grammar", "grammar": 'start: "{" /[^}]*/ "}"'},
    ):
        found = await choice(text, app=app, response_format=format)
        assert found["message"]["content"] == '{"a": 1}'
        follows = partial(follows_grammar, app, engine.added[-1].params.grammar)
        assert follows(text)
        assert not follows(text.replace("{", "["))


async def test_what_cannot_be_followed_is_named_behind_thoughts_too(ask, build):
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = await ask(app=build(reasoning_parser="think"), response_format=format)
    assert response.status_code == 400
    assert "'properties.a.not' cannot be followed" in response.json()["error"]["message"]


@pytest.mark.parametrize("format", FORMATS)
async def test_marks_that_are_special_tokens_are_read(choice, build, format):
    texts = {
        "hermes": CALL,
        "llama3_json": f'<|python_tag|>{{"name": "look", "parameters": {ROME}}}',
        "mistral": f"[TOOL_CALLS]look[ARGS]{ROME}",
        "pythonic": '<|python_start|>[look(city="Rome")]<|python_end|>',
    }
    app = build(tokens=FORMATS[format].marks, tool_call_parser=format)
    text = texts.get(format) or FORMATS[format]({}).written([("look", ROME)])
    for skip in (True, False):
        found = await choice(text, app=app, tools=[LOOK], skip_special_tokens=skip)
        assert found["message"]["content"] is None
        [call] = found["message"]["tool_calls"]
        assert call["function"] == {"name": "look", "arguments": ROME}
    # Where no calls are read they are left out, as other special tokens are.
    found = await choice(f"a{FORMATS[format].marks[0]}b", app=app)
    assert found["message"]["content"] == ("a" if FORMATS[format].frames_text else "ab")


TOOL_RESULT = {"role": "tool", "tool_call_id": "a", "content": ""}


def calling(**call):
    whole = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}} | call
    return [{"role": "assistant", "content": None, "tool_calls": [whole]}]


def function(**fields):
    return [{"type": "function", "function": {"name": "look"} | fields}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": LOOK}, "tools", "a valid array"),
        ({"tools": [LOOK, 3]}, "tools[1]", "an object"),
        ({"tools": [LOOK, LOOK]}, "tools[1].function.name", "given twice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
        ({"tools": [{"type": "x"}]}, "tools[0].type", "'function' or 'custom'"),
        ({"tools": function(name="a b")}, "tools[0].function.name", "1 to 128 characters"),
        ({"tools": function(name="a" * 129)}, "tools[0].function.name", "1 to 128 characters"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters", "an object"),
        (
            {"tools": function(parameters={"type": "string"})},
            "tools[0].function.parameters",
            'type "object"',
        ),
        ({"tools": function(strict=1)}, "tools[0].function.strict", "boolean"),
        ({"tools": function(description=1)}, "tools[0].function.description", "a valid string"),
        ({"tools": function(description="x" * 65536)}, "tools[0]", "larger than 65536 bytes"),
        ({"tools": [LOOK] * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED, "tools": []}, "tool_choice", "needs tools"),
        ({"tools": [LOOK], "tool_choice": "any"}, "tool_choice", "must be"),
        ({"tools": [LOOK], "tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice", "no tool 'look'"),
        ({"tool_choice": allowed("auto", "look")}, "tool_choice", "needs tools"),
        (
            {"tools": [CLOCK], "tool_choice": allowed("auto", "clock", "look")},
            "tool_choice",
            "no tool 'look'",
        ),
        (
            {"tools": [LOOK], "tool_choice": allowed("none", "look")},
            "tool_choice.allowed_tools.mode",
            '"auto" or "required"',
        ),
        (
            {"tools": [LOOK], "tool_choice": allowed("auto")},
            "tool_choice.allowed_tools.tools",
            "a list of tools",
        ),
        (
            {"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "tool_choice.allowed_tools",
            "must be an object",
        ),
        (
            {
                "tools": [LOOK],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]},
                },
            },
            "tool_choice.allowed_tools.tools[0]",
            '"function": {"name": ...}',
        ),
        (
            {
                "tools": [LOOK],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
            "response_format cannot be combined",
        ),
        (
            {
                "tools": function(strict=True, parameters={"not": {}}),
                "tool_choice": "required",
            },
            "tools",
            "the keyword 'look.not' cannot be followed",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
        ({"messages": [TOOL_RESULT]}, "messages[0].tool_call_id", "no call before"),
        (
            {"messages": [*calling(), {"role": "tool", "content": ""}]},
            "messages[1].tool_call_id",
            "required",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages[0].content",
            "required",
        ),
        (
            {"messages": [calling()[0] | {"role": "user"}]},
            "messages[0].tool_calls",
            "the role 'assistant'",
        ),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "messages[0].tool_call_id", "role 'tool'"),
        ({"messages": [USER | {"reasoning": "a"}]}, "messages[0].reasoning_content", "'assistant'"),
        ({"messages": calling(id=None)}, "messages[0].tool_calls[0].id", "valid string"),
        ({"messages": calling(type="x")}, "messages[0].tool_calls[0].type", "'function'"),
        ({"messages": calling(type="custom")}, "messages[0].tool_calls[0].custom", "required"),
        ({"messages": calling(function=None)}, "messages[0].tool_calls[0].function", "required"),
        ({"messages": calling(function=1)}, "messages[0].tool_calls[0].function", "an object"),
        (
            {"messages": calling(function={"name": "f", "arguments": {}})},
            "messages[0].tool_calls[0].function.arguments",
            "a valid string",
        ),
    ],
)
async def test_what_is_refused(ask, engine, fields, param, words):
    response = await ask(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.added


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        ("{{ messages[0].content }}", {"tool_call_parser": "none"}, "--tool-call-parser"),
        (SHOWS_ALL, {"tool_call_parser": "none"}, "--tool-call-parser"),
        (SHOWS_ALL.replace("<tool_call>", "<function=x>"), {}, "--tool-call-parser"),
    ],
)
async def test_models_without_calls(ask, build, template, settings, words):
    response = await ask(app=build(template, **settings), tools=[LOOK])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert words in response.json()["error"]["message"]
    assert (await ask(app=build(template, **settings), tools=[])).status_code == 200


def format_of(backend, template, calls="auto", thoughts="auto", tokens=()) -> AnswerFormat:
    own = tokenizers.Tokenizer.from_str(backend.to_str())
    own.add_tokens([AddedToken(token, special=False) for token in tokens])
    tokenizer = Tokenizer(own, chat_template=template)
    return find_format(tokenizer, ChatTemplate(tokenizer), calls=calls, thoughts=thoughts)


@pytest.mark.parametrize(
    ("name", "calls", "thinks"),
    [
        ("qwen2_5", "hermes", False),
        ("qwen3", "hermes", True),
        ("llama3_1", "llama3_json", False),
        ("llama3_2", "llama3_json", False),
        ("mistral_tools", "mistral", False),
        ("mistral", "hermes", False),
        ("gemma3", "hermes", False),
        ("smollm2", "hermes", False),
    ],
)
def test_formats_are_found_in_templates(backend, name, calls, thinks):
    found = format_of(backend, (TEMPLATES / f"{name}.jinja").read_text())
    assert found.calls.name == calls
    assert found.told_by_us == (name in ("mistral", "gemma3", "smollm2"))
    assert (found.thoughts is THINK) == thinks


def test_formats_of_other_templates(backend):
    tools = "{{ tools | tojson }}{{ messages[0].content }}"
    assert format_of(backend, tools).calls.name == "hermes"
    assert format_of(backend, f"{tools}[f(a=1, b=2)]").calls.name == "pythonic"
    for marks, name in (
        ("<function=f> <parameter=a>", "qwen3_coder"),
        ("<tool_call>f <arg_key>a</arg_key>", "glm"),
        ("<｜tool▁calls▁begin｜> ```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<|tool_call|>[]<|/tool_call|>", "phi4"),
        ("<|tool_call|>", "granite"),
        ("```tool_code", "tool_code"),
        ("<|channel|>", "harmony"),
    ):
        assert format_of(backend, tools + marks).calls.name == name
    for marks in ("<function=f>", "<|tool_call>call:f", "<minimax:tool_call>"):
        assert format_of(backend, tools + marks).calls is None
    assert format_of(backend, tools, calls="mistral").calls.name == "mistral"
    assert format_of(backend, tools, calls="none").calls is None
    assert format_of(backend, "x", tokens=("<think>", "</think>")).thoughts is THINK
    assert format_of(backend, "x", tokens=("<think>",)).thoughts is None
    assert format_of(backend, "<think>", thoughts="none").thoughts is None
    assert format_of(backend, "x", thoughts="think").thoughts is THINK


@pytest.mark.parametrize("name", ["qwen2_5", "smollm2"])
async def test_turns_with_tools(choice, build, engine, name):
    """Segments of chats with tools and results are those of the system and user turns."""
    app = build((TEMPLATES / f"{name}.jinja").read_text())
    messages = [USER, *calling(), TOOL_RESULT | {"content": "hot"}, USER]
    await choice(app=app, messages=messages, tools=[LOOK], segment_mask="turns")
    decode = app.state.runtime.tokenizer.decode_all
    [added] = engine.added
    texts = [decode(added.token_ids[start:end]) for start, end in added.segments]
    assert len(texts) == 3
    assert '"name": "look"' in texts[0]
    assert texts[1:] == ["<|im_start|>user\nhi<|im_end|>\n"] * 2


async def test_every_token_of_a_call_is_shown(ask, engine, events):
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await ask(
        f"so:{CALL}", tools=[LOOK], stream=True, return_token_ids=True, stream_options=options
    )
    *chunks, last, _ = events(response.text)
    choices = [chunk["choices"][0] for chunk in chunks]
    sent = [token_id for choice in choices for token_id in choice.get("token_ids", ())]
    assert sent == [
        token_id for out in engine.added[0].stream.outputs for token_id in out.token_ids
    ]
    assert any(choice["delta"].get("tool_calls") for choice in choices)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"]


async def test_what_is_continued_is_echoed_before_calls(ask, build):
    begun = {"role": "assistant", "content": "I look"}
    fields = {"messages": [USER, begun], "continue_final_message": True, "echo": True}
    template = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{{ messages[-1].content }}"
    response = await ask(f": {CALL}", app=build(template), tools=[LOOK], **fields)
    [found] = response.json()["choices"]
    assert found["message"]["content"].startswith("I look:")
    assert found["message"]["tool_calls"][0]["function"]["name"] == "look"


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"city": "Ro', '{"city": "Ro'),
        ("[1]", "[1]"),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ('{"a": ' * 300, '{"a": ' * 300),
        ("no JSON", "no JSON"),
        ('{"a": [1]}', {"a": [1]}),
        (" ", {}),
        (None, {}),
    ],
)
async def test_a_chat_goes_on_from_a_call_that_was_cut(build, choice, engine, arguments, written):
    engine.model = msgspec.structs.replace(engine.model, max_model_len=100_000)
    app = build()
    called = calling(function={"name": "f", "arguments": arguments, "x": 1}, x=1, index=0)
    await choice(app=app, messages=[USER, *called, TOOL_RESULT], max_tokens=1)
    call = shown(engine, app)[1][1]["tool_calls"][0]
    assert call["function"] == {"name": "f", "arguments": written}


async def test_long_names_and_fields_that_are_ignored(ask, build, engine):
    app = build()
    tool = function(name="a" * 128, x=1)[0] | {"cache_control": {}, "y": 2}
    picked = {"type": "function", "function": {"name": "a" * 128}, "z": 3}
    messages = [USER, *calling(x=1), TOOL_RESULT, USER]
    response = await ask(app=app, tools=[tool], tool_choice=picked, messages=messages)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-headstart-ignored"].split(", ")) == {
        "tools[].cache_control",
        "tools[].y",
        "tools[].function.x",
        "tool_choice.z",
        "messages[].tool_calls[].x",
    }
    assert shown(engine, app)[0] == [{"type": "function", "function": {"name": "a" * 128}}]


async def test_unknown_fields_of_nested_objects_may_be_refused(ask, build):
    app = build(unknown_fields="refuse")
    tool = function(x=1)[0] | {"y": None}
    picked = {"type": "function", "function": {"name": "look"}, "z": 3}
    response = await ask(app=app, tools=[tool], tool_choice=picked)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "tools[0].function.x is not a known field"
    response = await ask(app=app, tools=[LOOK], tool_choice=picked)
    assert response.json()["error"]["message"] == "tool_choice.z is not a known field"


RUN = {"type": "custom", "custom": {"name": "run", "description": "runs it"}}
RUN_CALL = '<tool_call>\n{"name": "run", "arguments": {"input": "ls \\"a\\"\\n"}}\n</tool_call>'


async def test_custom_tools_take_a_text(build, choice, engine):
    app = build()
    found = await choice(f"So {RUN_CALL}{CLOCK_CALL}", app=app, tools=[RUN, CLOCK])
    [run, clock] = found["message"]["tool_calls"]
    assert run == {
        "id": run["id"],
        "type": "custom",
        "custom": {"name": "run", "input": 'ls "a"\n'},
    }
    assert clock["function"] == {"name": "clock", "arguments": "{}"}
    assert found["finish_reason"] == "tool_calls"
    said = {"role": "assistant", "content": None, "tool_calls": [run]}
    result = {"role": "tool", "tool_call_id": run["id"], "content": "b"}
    await choice(app=app, tools=[RUN], messages=[USER, said, result])
    (tool,), messages = shown(engine, app)
    assert tool["function"]["parameters"]["properties"] == {"input": {"type": "string"}}
    called = {"name": "run", "arguments": {"input": 'ls "a"\n'}}
    assert messages[1]["tool_calls"][0]["function"] == called


@pytest.mark.parametrize("cut", [False, True])
async def test_custom_calls_in_a_stream(ask, events, say, cut):
    text = RUN_CALL[: RUN_CALL.index(" \\")] if cut else RUN_CALL + CLOCK_CALL
    response = await ask(text, tools=[RUN, CLOCK], stream=True, max_tokens=len(say(text)) + 9)
    *chunks, _ = events(response.text)
    calls = [
        call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    begun, given = (call for call in calls if call["index"] == 0)
    assert (begun["type"], begun["custom"]) == ("custom", {"name": "run", "input": ""})
    assert given["custom"] == {"input": '{"input": "ls' if cut else 'ls "a"\n'}
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_forced_custom_calls(build, choice, engine):
    """Of a tool whose input has to match a regex."""
    app = build()
    grammar = {"syntax": "regex", "definition": "[0-9]+|x"}
    tool = {"type": "custom", "custom": {"name": "run", "format": {"type": "grammar"}}}
    tool["custom"]["format"]["grammar"] = grammar
    picked = {"type": "custom", "custom": {"name": "run"}}
    await choice("", app=app, tools=[tool, CLOCK], tool_choice=picked)
    params = engine.added[-1].params
    follows = partial(follows_grammar, app, params.grammar)

    def call(text):
        return f'<tool_call>\n{{"name": "run", "arguments": {{"input": "{text}"}}}}\n</tool_call>'

    assert follows(call("12"))
    assert follows(call("x"))
    assert not follows(call("12a"))
    assert not follows(CLOCK_CALL)


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        (
            {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: x"}},
            "tools[0].custom.format.grammar.syntax",
            "use 'regex'",
        ),
        ({"type": "grammar"}, "tools[0].custom.format.grammar", "required"),
        ({"type": "xml"}, "tools[0].custom.format.type", "'grammar'"),
    ],
)
async def test_formats_of_custom_tools(ask, engine, given, param, words):
    tool = {"type": "custom", "custom": {"name": "run", "format": given}}
    response = await ask(tools=[tool])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    plain = {"type": "custom", "custom": {"name": "run", "format": {"type": "text"}}}
    assert (await ask(tools=[plain])).status_code == 200
