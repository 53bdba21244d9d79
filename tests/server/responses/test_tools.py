"""Tools of /v1/responses that are no functions: custom ones, namespaces, and those left out."""

from __future__ import annotations

import json

import pytest
from openai.types.responses import Response

from headstart.server.api.openai_responses.custom_input import InputReader, custom_input

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "patch", "description": "Changes a file."}
MAPS = {
    "type": "namespace",
    "name": "maps",
    "description": "Places.",
    "tools": [LOOK | {"name": "find"}, PATCH | {"name": "draw"}],
}
INPUT = 'say "hi"\nand go'


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


async def test_a_custom_tool_is_a_function_of_its_input(ask, build, shown_tools, ignored):
    app = build()
    response = await ask(call("patch", {"input": INPUT}), app=app, tools=[PATCH])
    (function,) = shown_tools(app).values()
    assert function["description"] == "Changes a file."
    assert function["parameters"]["required"] == ["input"]
    answer = response.json()
    (item,) = Response.model_validate(answer).output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "patch", INPUT)
    assert item.id.startswith("ctc_")
    assert answer["tools"] == [PATCH]
    assert ignored(response) == set()


@pytest.mark.parametrize("per_output", [1, 3, 50])
async def test_the_events_of_a_custom_call(ask, engine, events_of, per_output):
    engine.per_output = per_output
    text = "I do. " + call("patch", {"input": INPUT})
    events = events_of((await ask(text, tools=[PATCH], stream=True)).text)
    added, *deltas, done, ended = [event for event in events if event.get("output_index") == 1]
    assert (added["item"]["type"], added["item"]["input"]) == ("custom_tool_call", "")
    assert {delta["type"] for delta in deltas} == {"response.custom_tool_call_input.delta"}
    assert (len(deltas) > 1) == (per_output < 50)
    assert done["type"] == "response.custom_tool_call_input.done"
    assert ended["type"] == "response.output_item.done"
    assert "".join(delta["delta"] for delta in deltas) == INPUT
    assert done["input"] == ended["item"]["input"] == INPUT
    assert {added["item"]["id"], done["item_id"]} == {ended["item"]["id"]}
    assert ended["item"] == events[-1]["response"]["output"][1]


async def test_a_custom_call_that_is_cut(ask, events_of):
    cut = call("patch", {"input": INPUT})
    cut = cut[: cut.index("and")]
    tokens = {"tools": [PATCH], "tool_choice": "auto"}
    whole = (await ask(cut, **tokens)).json()["output"]
    assert whole[0]["input"] == 'say "hi"\n'
    events = events_of((await ask(cut, stream=True, **tokens)).text)
    deltas = [event["delta"] for event in events if event["type"].endswith("input.delta")]
    assert "".join(deltas) == whole[0]["input"]


TEXTS = ("", "plain", 'a "b" \\ / \n\t\x01', "é😀\u2028", "\\u00e9 \\\\", "{}[]")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("ascii", [True, False])
def test_an_input_is_read_as_it_grows(text, size, ascii):
    arguments = json.dumps({"input": text}, ensure_ascii=ascii)
    reader = InputReader()
    pieces = [reader.push(arguments[i : i + size]) for i in range(0, len(arguments), size)]
    assert "".join(pieces) == reader.read == custom_input(arguments) == text


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"input": "a\\ud83d', "a"),
        ('{"input": "a\\udc00 b"}', "a"),
        ('{"input": "a\\', "a"),
        ('{"other": 1, "input": "a"}', "a"),
        ('{"inp', '{"inp'),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_inputs_that_are_wrong(arguments, given):
    assert custom_input(arguments) == given
    given.encode()


@pytest.mark.parametrize("arguments", [{"text": "x"}, {"input": 1}, {}])
async def test_a_custom_call_without_an_input_shows_what_was_written(ask, arguments):
    answer = (await ask(call("patch", arguments), tools=[PATCH])).json()
    assert answer["output"][0]["input"] == json.dumps(arguments)


async def test_custom_calls_in_the_history(ask, build, shown):
    app = build()
    items = [
        {"role": "user", "content": "hi"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": INPUT},
        {
            "type": "custom_tool_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "done"}],
        },
    ]
    response = await ask(app=app, tools=[PATCH], input=items)
    assert response.status_code == 200, response.text
    _, assistant, tool = shown(app)
    function = assistant["tool_calls"][0]["function"]
    assert function == {"name": "patch", "arguments": {"input": INPUT}}
    assert tool["content"] == "done"


async def test_the_format_of_a_custom_tool(ask, build, engine, shown_tools, ignored):
    app = build()
    regex = {"type": "grammar", "syntax": "regex", "definition": "[a-c]+|d"}
    response = await ask(
        app=app,
        tools=[PATCH | {"format": regex}],
        tool_choice={"type": "custom", "name": "patch"},
    )
    assert response.status_code == 200, response.text
    assert ignored(response) == set()
    function = shown_tools(app)["patch"]
    assert function["description"].endswith("follows this regex grammar:\n[a-c]+|d")
    assert function["parameters"]["properties"]["input"]["pattern"] == "^(?:[a-c]+|d)$"
    assert "[a-c]+|d" in engine.added[-1].params.grammar
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
    response = await ask(app=app, tools=[PATCH | {"format": lark}])
    assert ignored(response) == {"tools[].format.syntax=lark"}
    assert shown_tools(app)["patch"]["description"].endswith('lark grammar:\nstart: "a"')
    response = await ask(app=app, tools=[PATCH | {"format": {"type": "text"}}])
    assert (response.status_code, ignored(response)) == (200, set())
    for format, param in (
        ({"type": "xml"}, "tools[0].format.type"),
        ("text", "tools[0].format"),
        (lark | {"syntax": "ebnf"}, "tools[0].format.syntax"),
    ):
        response = await ask(app=app, tools=[PATCH | {"format": format}])
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_tools_of_a_namespace(ask, build, shown, shown_tools):
    app = build()
    response = await ask(call("maps__find", {"city": "Rome"}), app=app, tools=[MAPS, LOOK])
    assert list(shown_tools(app)) == ["maps__find", "maps__draw", "look"]
    (item,) = response.json()["output"]
    assert (item["type"], item["namespace"], item["name"]) == ("function_call", "maps", "find")
    # Models that leave the namespace out mean the only tool of that name.
    (drawn,) = (await ask(call("draw", {"input": "x"}), app=app, tools=[MAPS])).json()["output"]
    assert (drawn["type"], drawn["namespace"], drawn["name"]) == (
        "custom_tool_call",
        "maps",
        "draw",
    )
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "here"}
    items = [{"role": "user", "content": "hi"}, item, result]
    assert (await ask(app=app, tools=[MAPS], input=items)).status_code == 200
    assert shown(app)[1]["tool_calls"][0]["function"]["name"] == "maps__find"


async def test_names_of_namespaces(ask, build, shown_tools):
    app = build()
    long = LOOK | {"name": "x" * 60}
    tools = [
        MAPS | {"name": "functions", "tools": [LOOK]},
        MAPS | {"name": "a", "tools": [LOOK, MAPS]},
        MAPS | {"name": "b" * 120, "tools": [long]},
    ]
    response = await ask(app=app, tools=tools)
    assert response.status_code == 200, response.text
    assert list(shown_tools(app)) == ["look", "a__look", "x" * 60]
    assert "tools[].tools[].type=namespace" in response.headers["x-headstart-ignored"]
    for wrong, param in (
        ([MAPS | {"tools": None}, MAPS | {"tools": [LOOK, LOOK]}], "tools[1].tools[1].name"),
        ([MAPS | {"tools": 1}], "tools[0].tools"),
        ([{"type": "namespace", "tools": [LOOK]}], "tools[0].name"),
        ([MAPS | {"tools": [LOOK | {"name": f"f{i}"} for i in range(129)]}], "tools[0].tools"),
        ([MAPS | {"name": f"n{i}", "tools": [LOOK] * 3} for i in range(64)], "tools"),
        ([MAPS | {"tools": [LOOK | {"description": "x" * (1 << 17)}]}], "tools[0].tools[0]"),
    ):
        response = await ask(app=app, tools=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


HOSTED = (
    "web_search",
    "file_search",
    "computer_use_preview",
    "mcp",
    "code_interpreter",
    "image_generation",
    "local_shell",
    "tool_search",
    "of_next_year",
)


@pytest.mark.parametrize("kind", HOSTED)
async def test_hosted_tools_are_left_out_unless_they_are_forced(ask, build, shown_tools, kind):
    app = build()
    hosted = {"type": kind, "server_label": "x", "anything": 1}
    response = await ask(app=app, tools=[hosted, LOOK])
    assert response.status_code == 200, response.text
    assert response.headers["x-headstart-ignored"] == f"tools[].type={kind}"
    assert list(shown_tools(app)) == ["look"]
    assert (await ask(app=app, tools=[hosted])).status_code == 200
    for choice in (
        {"type": kind},
        {"type": "allowed_tools", "mode": "required", "tools": [hosted]},
    ):
        error = await ask(app=app, tools=[hosted, LOOK], tool_choice=choice)
        assert error.status_code == 400
        assert kind in error.json()["error"]["message"]
        assert error.json()["error"]["param"] == "tool_choice"
    error = await ask(app=app, tools=[hosted], tool_choice="required")
    assert kind in error.json()["error"]["message"]


async def test_what_may_be_called(ask, build, engine):
    app = build()
    tools = [LOOK, PATCH, MAPS, {"type": "web_search"}]

    async def grammar(choice):
        response = await ask(app=app, tools=tools, tool_choice=choice)
        assert response.status_code == 200, response.text
        return engine.added[-1].params.grammar or ""

    named = {"type": "custom", "name": "patch"}
    found = await grammar(named)
    assert ("patch" in found, "look" in found) == (True, False)
    assert "maps__find" in await grammar({"type": "function", "name": "find", "namespace": "maps"})
    assert "maps__find" in await grammar({"type": "function", "name": "find"})
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named, {"type": "web_search"}]}
    found = await grammar(allowed)
    assert ("patch" in found, "look" in found) == (True, False)
    assert await grammar(allowed | {"tools": [{"type": "web_search"}]}) == ""
    none = await ask(app=app, tools=tools, tool_choice={"type": "function", "name": "smell"})
    assert (none.status_code, none.json()["error"]["param"]) == (400, "tool_choice")


SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "object", "required": ["city"]}}


async def test_a_choice_of_tools_beside_a_format(ask, build, engine):
    app = build()
    text = {"format": SCHEMA}
    answer = (await ask(app=app, tools=[LOOK], text=text, tool_choice="auto")).json()
    grammar = engine.added[-1].params.grammar
    assert ("look" in grammar, "city" in grammar) == (True, True)
    assert answer["text"] == text
    for choice in ("required", {"type": "function", "name": "look"}):
        response = await ask(app=app, tools=[LOOK], text=text, tool_choice=choice)
        assert response.status_code == 200, response.text
        grammar = engine.added[-1].params.grammar
        assert ("look" in grammar, "city" in grammar) == (True, False)
    await ask(app=app, tools=[LOOK], text=text, tool_choice="none")
    grammar = engine.added[-1].params.grammar
    assert ("look" in grammar, "city" in grammar) == (False, True)
