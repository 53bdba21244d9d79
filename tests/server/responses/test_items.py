"""The history of /v1/responses: every item that a client may give back."""

from __future__ import annotations

import pytest

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
ASKED = {"role": "user", "content": "hi"}
CALLED = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
WET = {"type": "function_call_output", "call_id": "c1", "output": "wet"}
IMAGE = {"type": "input_image", "image_url": "http://127.0.0.1/x.png", "detail": "auto"}


@pytest.fixture
def history(ask, build, shown, ignored):
    """The messages that items become, and what of them is ignored."""

    async def send(*items, **fields):
        app = build()
        response = await ask(app=app, tools=[LOOK], input=list(items), **fields)
        assert response.status_code == 200, response.text
        return shown(app), ignored(response)

    return send


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"city": "Rome"}', {"city": "Rome"}),
        ("", {}),
        ('{"city": "Ro', '{"city": "Ro'),
        ("[1]", "[1]"),
        ("Rome", "Rome"),
        ("[" * 5000, "[" * 5000),
    ],
)
async def test_arguments_are_given_as_they_were_written(ask, build, shown, arguments, given):
    app = build(context=1 << 16)
    items = [ASKED, CALLED | {"arguments": arguments}, WET]
    response = await ask(app=app, tools=[LOOK], input=items)
    assert response.status_code == 200, response.text
    assert shown(app)[1]["tool_calls"][0]["function"]["arguments"] == given


@pytest.mark.parametrize(
    "kind",
    ["web_search_call", "mcp_call", "local_shell_call", "compaction", "item_of_next_year", "a, b"],
)
async def test_items_of_other_types_are_left_out(history, kind):
    messages, ignored = await history(ASKED, {"type": kind, "id": "x", "call_id": "y"})
    assert [message["content"] for message in messages] == ["hi"]
    assert ignored <= {f"input[].type={kind}", "input[].type=a??b"}
    assert len(ignored) == 1


async def test_an_input_of_nothing_else_has_no_message(ask):
    response = await ask(input=[{"type": "web_search_call"}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


async def test_images_beside_a_text(history, ask):
    text = {"type": "input_text", "text": "What is it?"}
    file = {"type": "input_file", "file_id": "x"}
    messages, ignored = await history({"role": "user", "content": [text, IMAGE, file]})
    assert messages[0]["content"] == "What is it?\n[image]\n[file]"
    assert ignored == {"input[].content[].type=input_image", "input[].content[].type=input_file"}
    for items, param in (
        ([{"role": "user", "content": [IMAGE]}], "input[0].content[0]"),
        ([{"role": "user", "content": [text, IMAGE]}, {"role": "user", "content": [file, IMAGE]}],
         "input[1].content[0]"),
        ([ASKED, CALLED, WET | {"output": [IMAGE]}], "input[2].output[0]"),
    ):  # fmt: skip
        error = (await ask(tools=[LOOK], input=items)).json()["error"]
        assert (error["param"], "reads text only" in error["message"]) == (param, True)


async def test_parts_of_outputs_and_refusals(history):
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    messages, ignored = await history(ASKED, refusal, ASKED, CALLED, WET | {"output": parts})
    assert [message["content"] for message in messages] == ["hi", "No.", "hi", "", "a\nb"]
    assert ignored == set()


async def test_what_answers_are_given_back_with(history):
    said = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "phase": "commentary",
        "content": [
            {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []},
        ],
    }
    direct = {"caller": {"type": "direct"}, "id": "fc_1", "status": "completed"}
    messages, ignored = await history(ASKED, said, CALLED | direct, WET | direct)
    assert (messages[1]["content"], len(messages[1]["tool_calls"])) == ("I look.", 1)
    assert ignored == {"input[].phase"}
    said["content"][0]["annotations"] = [{"type": "url_citation"}]
    _, ignored = await history(ASKED, said)
    assert ignored == {"input[].phase", "input[].content[].annotations"}


async def test_reasoning_items(history):
    empty = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None}
    secret = empty | {"encrypted_content": "gAAAA"}
    summary = empty | {"summary": [{"type": "summary_text", "text": "Hm."}]}
    messages, ignored = await history(ASKED, empty, secret, summary, CALLED, WET)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["reasoning"] == "Hm."
    assert ignored == {"input[].encrypted_content"}
    content = empty | {"content": [{"type": "reasoning_text", "text": "Oh."}]}
    messages, _ = await history(ASKED, summary, content, {"role": "assistant", "content": "Yes."})
    assert [message["content"] for message in messages] == ["hi", "Yes."]
    assert messages[1]["reasoning"] == messages[1]["reasoning_content"] == "Hm.\nOh."


async def test_developer_messages_side_by_side_are_one(history):
    rules = [{"role": "developer", "content": "One."}, {"role": "system", "content": "Two."}]
    messages, _ = await history(*rules, ASKED, instructions="None.")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[0]["content"] == "None.\n\nOne.\n\nTwo."


async def test_results_come_right_behind_their_calls(history):
    said = [{"role": "assistant", "content": text} for text in ("First.", "Then.")]
    messages, _ = await history(ASKED, said[0], CALLED, said[1], WET)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["content"] == "First.\nThen."


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": 1}, "input[0].type"),
        ({}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user", "content": [{"text": "x"}]}, "input[0].content[0]"),
        ({"type": "function_call", "call_id": "x", "name": "y"}, "input[0].arguments"),
        (CALLED | {"arguments": {}}, "input[0].arguments"),
        ({"type": "custom_tool_call", "call_id": "x", "name": "y"}, "input[0].input"),
        ({"type": "item_reference"}, "input[0].id"),
        ("x", "input[0]"),
    ],
)
async def test_items_that_are_wrong(ask, item, param):
    response = await ask(tools=[LOOK], input=[item])
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_truncation_drops_the_oldest_turns(ask, build, shown, engine):
    app = build(context=600)
    turns = [
        {"role": role, "content": f"{i} " + "x" * 40}
        for i in range(12)
        for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "Rules."}, *turns, {"role": "user", "content": "And?"}]
    refused = await ask(app=app, input=items)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    response = await ask(app=app, input=items, truncation="auto", max_output_tokens=20)
    assert response.status_code == 200, response.text
    assert response.json()["truncation"] == "auto"
    system, first, *_, last = shown(app)
    assert (system["content"], last["content"]) == ("Rules.", "And?")
    assert first["role"] == "user"
    assert first["content"] > turns[0]["content"]
    kept = len(engine.added[-1].token_ids)
    assert kept <= 580
    # One turn more would have been too much.
    dropped = next(i for i, turn in enumerate(turns) if turn["content"] == first["content"])
    fewer = [items[0], *turns[dropped - 2 :], items[-1]]
    counted = await ask(app=app, url="/v1/responses/input_tokens", input=fewer)
    assert counted.json()["input_tokens"] > 580


async def test_truncation_changes_nothing_that_fits(ask, build, engine):
    app = build(context=600)
    items = [ASKED, {"role": "assistant", "content": "x"}, ASKED]
    await ask(app=app, input=items)
    await ask(app=app, input=items, truncation="auto")
    assert engine.added[0].token_ids == engine.added[1].token_ids
    long = await ask(app=app, input="x" * 2000, truncation="auto")
    assert (long.status_code, long.json()["error"]["param"]) == (400, "input")
