"""/v1/messages: blocks in and out, events, errors as Anthropic has them; the official client."""

from __future__ import annotations

import pydantic
import pytest

from headstart.server.api.anthropic_messages.routes import MessagesBody
from headstart.server.http.keys import Keys

URL = "/v1/messages"
LOOK = {
    "name": "look",
    "description": "the fox",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}}
USER = {"role": "user", "content": "hi"}
ROME = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "look", "arguments": {ROME}}}\n</tool_call>'
THOUGHT = "<think>\nThe fox.\n</think>\n\n"
WEB = {"type": "web_search_20250305", "name": "web", "max_uses": 1}
PDF = {"type": "document", "source": {"type": "url", "url": "https://example.org/a.pdf"}}
IGNORED = "x-headstart-ignored"
KEY, ADMIN = "the-key-of-sixteen", "the-admin-key-of-sixteen"


async def test_a_text(ask, engine):
    response = await ask(temperature=0.5, top_k=7, top_p=0.9, metadata={"user_id": "x"})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert body["content"] == [{"type": "text", "text": "hello world", "citations": None}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    added = engine.added[-1]
    usage = body["usage"]
    assert usage["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] + 3 == len(added.token_ids)
    params = added.params
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 0.9)
    assert params.max_tokens == 200


@pytest.mark.parametrize(
    ("fields", "reason", "stop", "text"),
    [
        ({"max_tokens": 1}, "max_tokens", None, "he"),
        ({"stop_sequences": ["zzz", "wor"]}, "stop_sequence", "wor", "hello "),
        ({"stop_sequences": ["zzz"]}, "end_turn", None, "hello world"),
    ],
)
async def test_why_it_ended(ask, fields, reason, stop, text, events_of):
    body = (await ask(**fields)).json()
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, stop)
    assert body["content"][0]["text"].startswith(text[:2])
    events = events_of((await ask(stream=True, **fields)).text)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": stop}
    said = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert said == body["content"][0]["text"]


async def test_blocks_become_messages(ask, build, shown):
    app = build()
    cached = {"cache_control": {"type": "ephemeral"}}
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {"city": "Rome"}}
    again = {"type": "tool_use", "id": "t2", "name": "look", "input": {}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Where?"} | cached]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                use,
                again,
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no city"}],
                },
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be"} | cached, {"type": "text", "text": "brief."}]
    response = await ask(app=app, messages=messages, system=system, tools=[LOOK | cached])
    assert response.status_code == 200, response.text
    first, user, assistant, *results, last = shown(app)
    assert first == {"role": "system", "content": "Be\nbrief."}
    assert user == {"role": "user", "content": "Where?"}
    assert (assistant["content"], assistant["reasoning"]) == ("I look.", "Hm.")
    calls = [call["function"]["arguments"] for call in assistant["tool_calls"]]
    assert calls == [{"city": "Rome"}, {}]
    assert results == [
        {"role": "tool", "content": "rain", "tool_call_id": "t1"},
        {"role": "tool", "content": "Error: no city", "tool_call_id": "t2"},
    ]
    assert last == {"role": "user", "content": "And now?"}


async def test_an_answer_goes_on_from_the_assistants_text(ask, build, prompt):
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    app = build(chatml)
    await ask(app=app, messages=[USER, {"role": "assistant", "content": "The fox"}])
    assert prompt(app).endswith("assistant\nThe fox")


@pytest.mark.parametrize("per_output", [1, 3, 50])
async def test_a_stream_tells_what_the_whole_answer_says(
    ask, engine, build, per_output, events_of, thinks
):
    engine.per_output = per_output
    app, text = build(thinks), f"{THOUGHT}I look.\n{CALL}"
    whole = (await ask(text, app=app, tools=[LOOK])).json()
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][2]["input"] == {"city": "Rome"}
    assert whole["stop_reason"] == "tool_use"
    events = events_of((await ask(text, app=app, tools=[LOOK], stream=True)).text)
    kinds = [event["type"] for event in events]
    assert (kinds[:2], kinds[-2:]) == (["message_start", "ping"], ["message_delta", "message_stop"])
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert events[-2]["usage"] == whole["usage"]
    order = [event["index"] for event in events if "index" in event]
    assert order == sorted(order)
    for i, (kind, key) in enumerate(
        (
            ("thinking_delta", "thinking"),
            ("text_delta", "text"),
            ("input_json_delta", "partial_json"),
        )
    ):
        begin, *deltas, end = [event for event in events if event.get("index") == i]
        assert begin["content_block"]["type"] == whole["content"][i]["type"]
        assert end["type"] == "content_block_stop"
        assert {delta["delta"]["type"] for delta in deltas} == {kind}
        said = "".join(delta["delta"][key] for delta in deltas)
        assert said == (ROME if i == 2 else whole["content"][i][key])
    assert [e for e in events if e["type"] == "content_block_start"][2]["content_block"][
        "input"
    ] == {}


@pytest.mark.parametrize(
    ("choice", "forced", "calls"),
    [
        (None, False, 2),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, 1),
        ({"type": "any"}, True, 2),
        ({"type": "tool", "name": "look"}, True, 1),
        ({"type": "none"}, False, 0),
    ],
)
async def test_the_choice_of_tools(ask, engine, choice, forced, calls):
    body = (await ask(CALL + CALL, tools=[LOOK, CLOCK], tool_choice=choice)).json()
    assert [block["type"] for block in body["content"]].count("tool_use") == calls
    grammar = engine.added[-1].params.grammar
    assert (grammar is not None) == forced
    if forced:
        assert ("clock" in grammar) == (choice["type"] == "any")


async def test_thinking(ask, build, prompt, thinks):
    app = build(thinks)
    for thinking, end in (
        ({"type": "enabled", "budget_tokens": 1024}, "True"),
        ({"type": "disabled"}, "False"),
        ({"type": "adaptive"}, "assistant\n"),
    ):
        assert (await ask(app=app, thinking=thinking)).status_code == 200
        assert prompt(app).endswith(end)
    for thinking in ({"type": "enabled"}, {"type": "adaptive"}, {"type": "disabled"}):
        response = await ask(thinking=thinking)  # a template that does not let it be chosen
        assert (response.status_code, response.headers[IGNORED]) == (200, "thinking")
    refused = await ask(thinking={"type": "hard"})
    assert refused.status_code == 400
    assert "thinking.type" in refused.json()["error"]["message"]


async def test_tokens_are_counted_as_messages_uses_them(ask, build):
    app = build()
    fields = {"system": "Be brief.", "tools": [LOOK], "app": app}
    usage = (await ask(**fields)).json()["usage"]
    counted = await ask(url=f"{URL}/count_tokens", **fields)
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted.json() == {"input_tokens": total}
    sampling = {"max_tokens": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "stream": True}
    others = {"stop_sequences": ["x"], "metadata": {}, "betas": ["x"], "container": "x"}
    counted = await ask(url=f"{URL}/count_tokens", **fields | sampling | others)
    assert counted.json() == {"input_tokens": total}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [PDF]}]}, "document"),
        ({"messages": [{"role": "user", "content": []}]}, "content must not be empty"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "So "}]}, "trailing whitespace"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"tools": [{"type": "function", "function": LOOK}]}, "function"),
        ({"tools": [WEB], "tool_choice": {"type": "tool", "name": "web"}}, "web_search_20250305"),
        ({"tools": [WEB], "tool_choice": {"type": "any"}}, "web_search_20250305"),
        ({"tools": [{"name": "look"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"mcp_servers": [{"url": "x"}]}, "headstart calls no servers"),
        ({"thread": {"type": "continue", "previous_message_id": "x"}}, "whole conversation"),
        ({"compaction": {"type": "summarize"}}, "compaction"),
        ({"temperature": 9.0}, "temperature"),
    ],
)
async def test_what_is_refused(ask, engine, fields, named):
    response = await ask(**fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]
    assert not engine.added


ODD = (1, "x", [], {}, [1], [[]], [None], [{}], {"type": []}, {"type": {}}, {"format": 1})


@pytest.mark.parametrize("field", sorted(MessagesBody.model_fields))
async def test_odd_values_are_no_internal_errors(ask, build, field):
    app = build()
    for value in (*ODD, [{"type": []}], [{"role": "user", "content": [{"type": {}}]}]):
        assert (await ask(app=app, **{field: value})).status_code < 500, value


async def test_errors_have_anthropics_shape(ask, engine, build, events_of):
    def told(response):
        body = response.json()
        assert body["type"] == "error"
        return response.status_code, body["error"]["type"]

    assert told(await ask(model="other")) == (404, "not_found_error")
    assert told(await ask(url=f"{URL}/batches")) == (404, "not_found_error")
    assert told(await ask(app=build(max_body_bytes=100), system="x" * 200)) == (
        413,
        "request_too_large",
    )
    app = build(keys=Keys.of(api=[KEY], admin=[ADMIN]))
    assert told(await ask(app=app)) == (401, "authentication_error")
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    assert (await ask(app=app, headers=headers)).status_code == 200
    engine.fail_after = (2, RuntimeError("secret"))
    events = events_of((await ask(stream=True)).text)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
    engine.fail_after = (0, RuntimeError("secret"))
    assert told(await ask()) == (500, "api_error")
    engine.ready = False
    assert told(await ask()) == (503, "overloaded_error")


class Place(pydantic.BaseModel):
    city: str


async def test_the_official_client(build, official, anthropic, shown, thinks):
    app = build(thinks)
    client = official(app, f"{THOUGHT}I look.\n{CALL}")
    fields = {"model": "tiny", "max_tokens": 200, "messages": [USER], "tools": [LOOK]}
    message = await client.messages.create(**fields)
    thought, text, use = message.content
    assert (thought.thinking, text.text, use.input) == ("The fox.", "I look.", {"city": "Rome"})
    async with client.messages.stream(**fields) as stream:
        said = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(said) == "I look."
    assert final.content[2].input == {"city": "Rome"}
    assert (final.stop_reason, final.usage) == ("tool_use", message.usage)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    went_on = [USER, message.to_param(), {"role": "user", "content": [result]}]
    await client.messages.create(**fields | {"messages": went_on})
    roles = [message["role"] for message in shown(app)]
    assert roles == ["user", "assistant", "tool"]
    counted = await client.messages.count_tokens(model="tiny", messages=[USER], tools=[LOOK])
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(**fields | {"model": "other"})


async def test_the_official_client_parses_a_schema(build, official, engine):
    app = build()
    client = official(app, ROME)
    message = await client.messages.parse(
        model="tiny", max_tokens=50, messages=[USER], output_format=Place
    )
    assert message.parsed_output == Place(city="Rome")
    assert "city" in engine.added[-1].params.grammar
    await app.state.runtime.grammars.close()
