"""/v1/responses: items in and out, events, what is stored for whom; the official client."""

from __future__ import annotations

import json

import httpx
import msgspec
import openai
import pydantic
import pytest
import tokenizers

from headstart.server.api.openai_responses.routes import ResponsesBody
from headstart.server.api.openai_responses.store import ResponseStore, StoredResponse
from headstart.server.http.app import create_app
from headstart.server.http.keys import Keys
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

URL = "/v1/responses"
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
SHOWS_ALL = (
    "{% if tools %}TOOLS {{ tools | tojson }} /TOOLS {# <tool_call> <think> #}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = SHOWS_ALL.replace(" <think>", "")
KEYS = ("first-key-of-sixteen", "second-key-of-sixteen")


@pytest.fixture
def build(engine, backend):
    def make(template=SHOWS_ALL, **settings):
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        engine.model = msgspec.structs.replace(engine.model, max_model_len=4096)
        tokenizer = Tokenizer(own, special_tokens={"eos_token": "<|eos|>"}, chat_template=template)
        return create_app(
            engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**settings)
        )

    return make


@pytest.fixture
def connect(engine):
    """``async with connect(app, text)``: a client of an app whose model says ``text``."""

    def make(app, text="hello world", key=""):
        encode = app.state.runtime.tokenizer.encode
        engine.answer = lambda _: encode(text, add_special_tokens=False)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    return make


@pytest.fixture
def ask(build, connect):
    async def send(text="hello world", /, *, app=None, key="", **fields):
        app = app or build()
        async with connect(app, text, key) as http:
            response = await http.post(URL, json={"model": "tiny", "input": "hi"} | fields)
        await app.state.runtime.grammars.close()
        return response

    return send


@pytest.fixture
def official(app_saying):
    """The official client of an app whose model says ``text``."""

    def make(app, text):
        return openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key="none",
            max_retries=0,
            http_client=app_saying(app, text),
        )

    return make


def shown(engine, app):
    """The messages that the template wrote."""
    text = app.state.runtime.tokenizer.decode_all(engine.added[-1].token_ids)
    _, _, rest = text.rpartition(" /TOOLS ")
    return [json.loads(part.split("<|im_end|>")[0]) for part in rest.split("<|im_start|>")[1:-1]]


def events_of(body):
    found = []
    assert body.endswith("\n\n")
    for number, block in enumerate(body[:-2].split("\n\n")):
        first, second = block.split("\n")
        event = json.loads(second.removeprefix("data: "))
        assert first == f"event: {event['type']}"
        assert event["sequence_number"] == number
        found.append(event)
    return found


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


async def test_items_become_messages(ask, engine, build):
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
    system, user, assistant, tool = shown(engine, app)
    assert system == {"role": "system", "content": "Be brief.\n\nRules."}
    assert user == {"role": "user", "content": "Where?"}
    assert (assistant["content"], assistant["reasoning"]) == ("I look.", "Hm.")
    assert assistant["tool_calls"][0]["function"] == {"name": "look", "arguments": {"city": "Rome"}}
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


@pytest.mark.parametrize("per_output", [1, 3, 50])
async def test_a_stream_tells_what_the_whole_answer_says(ask, engine, per_output):
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


async def test_an_error_amid_a_stream(ask, engine):
    engine.fail_after = (2, RuntimeError("secret"))
    events = events_of((await ask(stream=True)).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(events)


async def test_log_probabilities(ask, build, engine):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    app = build(PLAIN)
    whole = (await ask(app=app, **fields)).json()["output"][0]["content"][0]["logprobs"]
    assert len(whole) == len(engine.answer(0))
    assert {len(entry["top_logprobs"]) for entry in whole} == {2}
    events = events_of((await ask(app=app, stream=True, **fields)).text)
    deltas = [event["logprobs"] for event in events if event["type"].endswith("text.delta")]
    assert [entry for delta in deltas for entry in delta] == whole
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole


async def test_an_answer_goes_on_from_a_stored_one(ask, engine, build, connect):
    app = build()
    asked = {"tools": [LOOK], "instructions": "Once.", "stream": True}
    first = events_of((await ask(f"Yes. {CALL}", app=app, **asked)).text)[-1]["response"]
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"]}
    second = (
        await ask(
            "rain",
            app=app,
            tools=[LOOK],
            previous_response_id=first["id"],
            input=[result | {"output": "wet"}],
        )
    ).json()
    assert second["previous_response_id"] == first["id"]
    messages = shown(engine, app)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    third = {"previous_response_id": second["id"], "input": "And now?", "store": False}
    last = (await ask("x", app=app, tools=[LOOK], **third)).json()
    assert [m["content"] for m in shown(engine, app)] == ["hi", "Yes.", "wet", "rain", "And now?"]
    async with connect(app) as http:
        assert (await http.get(f"{URL}/{second['id']}")).json() == second
        assert (await http.get(f"{URL}/{first['id']}")).json() == first
        assert (await http.get(f"{URL}/{last['id']}")).status_code == 404  # store: false
        deleted = await http.delete(f"{URL}/{first['id']}")
        assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
        assert (await http.delete(f"{URL}/{first['id']}")).status_code == 404
    response = await ask(app=app, previous_response_id=first["id"])
    assert (response.status_code, response.json()["error"]["param"]) == (
        404,
        "previous_response_id",
    )


async def test_answers_are_kept_apart_by_key(ask, build, connect):
    app = build(keys=Keys.of(api=KEYS))
    own = (await ask(app=app, key=KEYS[0])).json()["id"]
    texts = []
    for key, status in zip(KEYS, (200, 404), strict=True):
        async with connect(app, key=key) as http:
            response = await http.get(f"{URL}/{own}")
            assert response.status_code == status
            none = await http.get(f"{URL}/resp_none")
            texts.append((response.text.replace(own, ""), none.text.replace("resp_none", "")))
            if status == 404:
                assert (await http.delete(f"{URL}/{own}")).status_code == 404
        went_on = await ask(app=app, key=key, previous_response_id=own)
        assert went_on.status_code == status
    assert texts[1][0] == texts[1][1]  # as if it was not there


def test_the_store_is_bounded():
    store = ResponseStore(3, 100)
    for i in range(5):
        store.put(b"me", str(i), StoredResponse(b"x" * 10, b"y" * 10))
        store.get(b"me", "2")
    assert [i for i in range(5) if store.get(b"me", str(i))] == [2, 3, 4]
    assert (len(store), store.num_bytes) == (3, 60)
    store.put(b"me", "large", StoredResponse(b"x" * 50, b"y" * 10))
    assert store.num_bytes == 100
    assert store.get(b"me", "2") is None
    store.put(b"me", "larger", StoredResponse(b"x" * 100, b"y"))
    assert store.get(b"me", "larger") is None
    assert store.get(b"me", "large") is not None
    assert store.get(b"you", "large") is None
    assert store.delete(b"me", "large")
    assert store.num_bytes == 40


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
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
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]},
            "input[0].call_id",
        ),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"include": ["message.output_text.logprobs"], "tools": [LOOK]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"n": 2}, "n"),
    ],
)
async def test_what_is_refused(ask, engine, fields, param):
    response = await ask(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.added


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
    await app.state.runtime.grammars.close()
