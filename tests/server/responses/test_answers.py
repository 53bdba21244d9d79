"""/v1/responses: answers, their events, what is refused, what is ignored; the official client."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from headstart.server.api.openai_responses.body import ResponsesBody

LOOK = {
    "type": "function",
    "name": "look",
    "description": "the fox",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
ROME = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "look", "arguments": {ROME}}}\n</tool_call>'
THOUGHT = "<think>\nThe fox.\n</think>\n\n"
PLAIN = (
    "{% if tools %}TOOLS {{ tools | tojson }} /TOOLS {# <tool_call> #}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def test_a_text(ask, engine):
    response = await ask("hello world", instructions="Be brief.", metadata={"a": "b"}, top_p=0.5)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "tiny")
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}
    ]
    added = engine.added[-1]
    usage = body["usage"]
    assert usage["input_tokens"] == len(added.token_ids)
    assert usage["input_tokens_details"]["cached_tokens"] == 3
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert (added.params.top_p, added.params.temperature) == (0.5, 1.0)
    assert (body["instructions"], body["metadata"], body["top_p"]) == ("Be brief.", {"a": "b"}, 0.5)


async def test_an_answer_that_is_cut(ask, engine):
    body = (await ask("hello world hello world", max_output_tokens=2)).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    assert engine.added[-1].params.max_tokens == 2


async def test_items_become_messages(ask, engine, build, shown):
    app = build()
    items = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Where?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": ROME},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]  # fmt: skip
    response = await ask(app=app, input=items, instructions="Be brief.", tools=[LOOK])
    assert response.status_code == 200, response.text
    system, user, assistant, tool = shown(app)
    assert system == {"role": "system", "content": "Be brief.\n\nRules."}
    assert user == {"role": "user", "content": "Where?"}
    assert (assistant["content"], assistant["reasoning"]) == ("I look.", "Hm.")
    assert assistant["tool_calls"][0]["function"] == {"name": "look", "arguments": {"city": "Rome"}}
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


@pytest.mark.parametrize("per_output", [1, 3, 50])
async def test_a_stream_tells_what_the_whole_answer_says(ask, engine, per_output, events_of):
    engine.per_output = per_output
    text = f"{THOUGHT}I look.\n{CALL}"
    whole = (await ask(text, tools=[LOOK])).json()
    events = events_of((await ask(text, tools=[LOOK], stream=True)).text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    kinds = [item["type"] for item in final["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    assert kinds == [item["type"] for item in whole["output"]]
    assert final["usage"] == whole["usage"]
    if per_output < 50:  # else thoughts and text come in one output
        assert final["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    for i, kind in enumerate(("reasoning_text", "output_text", "function_call_arguments")):
        own = [event for event in events if event.get("output_index") == i]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["status"] == "in_progress"
        assert not own[0]["item"].get("content")
        assert not own[0]["item"].get("arguments")
        assert own[-1]["type"] == "response.output_item.done"
        assert own[-1]["item"] == final["output"][i]
        assert {e["item_id"] for e in own if "item_id" in e} == {final["output"][i]["id"]}
        said = "".join(e["delta"] for e in own if e["type"] == f"response.{kind}.delta")
        (done,) = [e for e in own if e["type"] == f"response.{kind}.done"]
        key = "arguments" if kind == "function_call_arguments" else "text"
        assert said == done[key]
        wanted = whole["output"][i]
        assert said == (wanted["arguments"] if i == 2 else wanted["content"][0]["text"])
    assert final["output"][2]["arguments"] == ROME


async def test_an_error_amid_a_stream(ask, engine, events_of):
    engine.fail_after = (2, RuntimeError("secret"))
    events = events_of((await ask(stream=True)).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(events)


async def test_log_probabilities(ask, build, engine, events_of):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    app = build(PLAIN)
    whole = (await ask(app=app, **fields)).json()["output"][0]["content"][0]["logprobs"]
    assert len(whole) == len(engine.answer(0))
    assert {len(entry["top_logprobs"]) for entry in whole} == {2}
    events = events_of((await ask(app=app, stream=True, **fields)).text)
    deltas = [event["logprobs"] for event in events if event["type"].endswith("text.delta")]
    assert [entry for delta in deltas for entry in delta] == whole
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"name": "look"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode"),
        (
            {"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "tool_choice.tools",
        ),
        (
            {
                "tools": [LOOK],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "look"}}],
                },
            },
            "tool_choice.tools[0]",
        ),
        ({"tools": [LOOK], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]},
            "input[0].call_id",
        ),
        ({"truncation": "middle"}, "truncation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}, "background": True}, "background"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"conversation": {"name": "x"}}, "conversation.id"),
        ({"include": ["message.output_text.logprobs"], "tools": [LOOK]}, "include"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
async def test_what_is_refused(ask, engine, fields, param):
    response = await ask(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.added


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_tool_calls": 1, "client_metadata": {}}, {"max_tool_calls", "client_metadata"}),
        (
            {"include": ["reasoning.encrypted_content", "of.next.year"]},
            {"include=reasoning.encrypted_content", "include=of.next.year"},
        ),
        ({"reasoning": {"effort": "high", "mode": "standard"}}, {"reasoning.effort"}),
        ({"reasoning": {"summary": "auto"}}, {"reasoning.summary"}),
        ({"text": {"verbosity": "high"}}, {"text.verbosity"}),
        ({"text": {"verbosity": "medium"}, "service_tier": "auto", "background": False}, set()),
        ({"n": 2, "service_tier": "flex"}, {"n", "service_tier"}),
        ({"prompt_cache_key": "x", "prompt_cache_retention": "24h"},
         {"prompt_cache_key", "prompt_cache_retention"}),
        ({"stream_options": {"include_obfuscation": 1}}, {"stream_options.include_obfuscation"}),
        ({"context_management": [{"type": "compaction"}], "moderation": {}},
         {"context_management", "moderation"}),
        ({"top_logprobs": 2}, {"top_logprobs"}),
        ({"metadata": {"a": "b"}, "truncation": "disabled"}, set()),
    ],
)  # fmt: skip
async def test_what_is_ignored(ask, ignored, fields, names):
    response = await ask(**fields)
    assert response.status_code == 200, response.text
    assert ignored(response) == names


async def test_unknown_fields_are_refused_where_that_is_asked_for(ask, build, engine):
    app = build(unknown_fields="refuse")
    nested = {"input": [{"role": "user", "content": "hi", "colour": "red"}]}
    for fields, param in (({"n": 2}, "n"), (nested, "input[0].colour")):
        response = await ask(app=app, **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not engine.added
    response = await ask(app=app, include=["of.next.year"], tools=[{"type": "web_search"}])
    assert response.status_code == 200, response.text


async def test_everything_refused_is_named_at_once(ask):
    error = (await ask(background=True, prompt={"id": "x"})).json()["error"]
    assert "background is not supported" in error["message"]
    assert "prompt is not supported" in error["message"]


ODD = (1, "x", [], {}, [1], [[]], [None], [{}], {"type": []}, {"type": {}}, {"format": 1})


@pytest.mark.parametrize("field", sorted(ResponsesBody.model_fields))
async def test_odd_values_are_no_internal_errors(ask, build, field):
    app = build()
    for value in (*ODD, [{"type": []}], [{"role": "user", "content": [{"type": {}}]}]):
        assert (await ask(app=app, **{field: value})).status_code < 500, value


async def test_effort_goes_to_templates_that_read_it(ask, build, engine):
    app = build(PLAIN + "{{ reasoning_effort }}")
    response = await ask(app=app, reasoning={"effort": "low", "summary": None})
    assert response.json()["reasoning"]["effort"] == "low"
    assert app.state.runtime.tokenizer.decode_all(engine.added[-1].token_ids).endswith("low")


class Place(pydantic.BaseModel):
    city: str


async def test_the_official_client(build, official, engine):
    client = official(build(), f"I look.\n{CALL}")
    answer = await client.responses.create(model="tiny", input="hi", tools=[LOOK])
    assert answer.output_text == "I look."
    assert answer.output[1].arguments == ROME
    async with client.responses.stream(model="tiny", input="hi", tools=[LOOK]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == "I look."
    assert final.output[1].arguments == ROME
    found = await client.responses.retrieve(answer.id)
    assert found.output == answer.output
    await client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_the_official_client_parses_a_schema(build, official, engine):
    app = build(PLAIN)
    client = official(app, ROME)
    answer = await client.responses.parse(model="tiny", input="hi", text_format=Place)
    assert answer.output_parsed == Place(city="Rome")
    assert '"city"' in engine.added[-1].params.grammar.replace("\\", "")
    await client.responses.create(
        model="tiny",
        input="hi",
        tools=[LOOK],
        tool_choice={"type": "function", "name": "look"},
    )
    assert "look" in engine.added[-1].params.grammar
    for mode in ("auto", "required"):
        await client.responses.create(
            model="tiny",
            input="hi",
            tools=[LOOK, LOOK | {"name": "hear"}],
            tool_choice={
                "type": "allowed_tools",
                "mode": mode,
                "tools": [{"type": "function", "name": "hear"}],
            },
        )
        grammar = engine.added[-1].params.grammar
        assert ("hear" in grammar, "look" in grammar) == (True, False)
        assert ("TEXT" in grammar) == (mode == "auto")
