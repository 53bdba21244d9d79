"""What /v1/responses stores: for whom, how much, and how it is gone on from; conversations."""

from __future__ import annotations

import openai
import pytest

from headstart.server.api.openai_responses.store import Entry, ResponseStore
from headstart.server.http.keys import Keys

URL = "/v1/responses"
CONVERSATIONS = "/v1/conversations"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>'
KEYS = ("first-key-of-sixteen", "second-key-of-sixteen")


async def test_an_answer_goes_on_from_a_stored_one(ask, engine, build, connect, events_of, shown):
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
    messages = shown(app)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    third = {"previous_response_id": second["id"], "input": "And now?", "store": False}
    last = (await ask("x", app=app, tools=[LOOK], **third)).json()
    assert [m["content"] for m in shown(app)] == ["hi", "Yes.", "wet", "rain", "And now?"]
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
        store.put(b"me", str(i), Entry(b"x" * 10, b"y" * 10))
        store.get(b"me", "2")
    assert [i for i in range(5) if store.get(b"me", str(i))] == [2, 3, 4]
    assert (len(store), store.num_bytes) == (3, 60)
    store.put(b"me", "large", Entry(b"x" * 50, b"y" * 10))
    assert store.num_bytes == 100
    assert store.get(b"me", "2") is None
    store.put(b"me", "larger", Entry(b"x" * 100, b"y"))
    assert store.get(b"me", "larger") is None
    assert store.get(b"me", "large") is not None
    assert store.get(b"you", "large") is None
    assert store.delete(b"me", "large")
    assert store.num_bytes == 40


def test_items_of_what_is_gone_are_not_found():
    store = ResponseStore(2, 100)
    store.put(b"me", "a", Entry(b"x", b"y", ["1", "2"]))
    store.put(b"me", "b", Entry(b"x", b"y", ["2", "3"]))
    assert [store.place(b"me", i) for i in "123"] == ["a", "b", "b"]
    assert store.place(b"you", "1") is None
    store.delete(b"me", "a")
    assert [store.place(b"me", i) for i in "123"] == [None, "b", "b"]
    store.put(b"me", "b", Entry(b"x", b"y", ["3"]))
    assert [store.place(b"me", i) for i in "123"] == [None, None, "b"]
    assert store.num_bytes == 3


async def test_references_to_items_of_answers(ask, build, shown):
    app = build(keys=Keys.of(api=KEYS))
    first = (await ask(f"Yes. {CALL}", app=app, key=KEYS[0], tools=[LOOK])).json()
    said, called = first["output"]
    items = [
        {"role": "user", "content": "hi"},
        {"type": "item_reference", "id": said["id"]},
        {"id": called["id"]},
        {"type": "function_call_output", "call_id": called["call_id"], "output": "wet"},
    ]
    response = await ask(app=app, key=KEYS[0], tools=[LOOK], input=items)
    assert response.status_code == 200, response.text
    user, assistant, tool = shown(app)
    assert assistant["content"] == "Yes."
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert (user["content"], tool["content"]) == ("hi", "wet")
    error = await ask(app=app, key=KEYS[1], tools=[LOOK], input=items)
    assert (error.status_code, error.json()["error"]["param"]) == (400, "input[1].id")
    assert error.json()["error"]["code"] == "item_not_found"


async def test_the_items_that_an_answer_answers(ask, build, connect, official):
    app = build()
    client = official(app)
    first = await client.responses.create(model="tiny", input="one")
    second = await client.responses.create(
        model="tiny", input=[{"role": "user", "content": "two"}], previous_response_id=first.id
    )
    page = await client.responses.input_items.list(second.id, order="asc", limit=2)
    assert [(item.role, item.content[0].text) for item in page.data] == [
        ("user", "one"),
        ("assistant", "hello world"),
    ]
    assert page.has_more
    rest = await client.responses.input_items.list(second.id, order="asc", after=page.last_id)
    assert [item.content[0].text for item in rest.data] == ["two"]
    assert not rest.has_more
    newest = await client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in newest.data] == ["two", "hello world", "one"]
    async with connect(app) as http:
        for query, param in (
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=x", "limit"),
            ("order=up", "order"),
            ("after=none", "after"),
        ):
            response = await http.get(f"{URL}/{second.id}/input_items?{query}")
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert (await http.get(f"{URL}/resp_none/input_items")).status_code == 404
        shown = await http.get(f"{URL}/{second.id}?include=reasoning.encrypted_content")
        assert shown.json()["id"] == second.id
        assert (await http.get(f"{URL}/{second.id}?stream=true")).status_code == 400


async def test_there_is_nothing_to_cancel(ask, build, official):
    app = build()
    client = official(app)
    answer = await client.responses.create(model="tiny", input="hi")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await client.responses.cancel(answer.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_none")


async def test_tokens_are_counted_as_they_are_sent(build, official, engine):
    client = official(build())
    asked = {"model": "tiny", "input": "hi", "instructions": "Be brief.", "tools": [LOOK]}
    counted = await client.responses.input_tokens.count(**asked)
    assert counted.object == "response.input_tokens"
    assert not engine.added
    answer = await client.responses.create(**asked)
    assert counted.input_tokens == answer.usage.input_tokens == len(engine.added[-1].token_ids)
    without_model = await client.responses.input_tokens.count(input="hi")
    assert without_model.input_tokens < counted.input_tokens


async def test_a_conversation(build, official, shown):
    app = build()
    client = official(app)
    made = await client.conversations.create(
        items=[{"role": "user", "content": "one"}], metadata={"a": "b"}
    )
    assert (made.object, made.metadata) == ("conversation", {"a": "b"})
    answer = await client.responses.create(model="tiny", input="two", conversation=made.id)
    assert answer.conversation.id == made.id
    assert [message["content"] for message in shown(app)] == ["one", "two"]
    for conversation in (made.id, {"id": made.id}):
        await client.responses.create(
            model="tiny", input="three", conversation=conversation, store=False
        )
    contents = [message["content"] for message in shown(app)]
    assert contents == ["one", "two", "hello world", "three", "hello world", "three"]
    page = await client.conversations.items.list(made.id, order="asc", limit=3)
    assert [item.content[0].text for item in page.data] == ["one", "two", "hello world"]
    assert page.data[2].id == answer.output[0].id
    added = await client.conversations.items.create(
        made.id, items=[{"role": "user", "content": "four"}, {"role": "user", "content": "five"}]
    )
    assert [item.content[0].text for item in added.data] == ["four", "five"]
    four = await client.conversations.items.retrieve(added.first_id, conversation_id=made.id)
    assert four.content[0].text == "four"
    await client.conversations.items.delete(added.first_id, conversation_id=made.id)
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.retrieve(added.first_id, conversation_id=made.id)
    newest = await client.conversations.items.list(made.id, limit=1)
    assert newest.data[0].content[0].text == "five"
    changed = await client.conversations.update(made.id, metadata={"c": "d"})
    assert changed.metadata == (await client.conversations.retrieve(made.id)).metadata == {"c": "d"}
    assert (await client.conversations.items.list(made.id)).data[0].id == added.last_id
    deleted = await client.conversations.delete(made.id)
    assert (deleted.id, deleted.deleted) == (made.id, True)
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="tiny", input="x", conversation=made.id)
    assert (await client.responses.retrieve(answer.id)).id == answer.id


async def test_what_is_stored_may_be_answered_without_an_input(ask, build, official, shown):
    app = build()
    client = official(app)
    made = await client.conversations.create(items=[{"role": "user", "content": "one"}])
    answer = await client.responses.create(model="tiny", conversation=made.id)
    assert [message["content"] for message in shown(app)] == ["one"]
    await client.responses.create(model="tiny", previous_response_id=answer.id)
    assert [message["content"] for message in shown(app)] == ["one", "hello world"]
    empty = await client.conversations.create()
    for fields in ({}, {"conversation": empty.id}):
        with pytest.raises(openai.BadRequestError, match="input is required"):
            await client.responses.create(model="tiny", **fields)


async def test_conversations_are_kept_apart_by_key_and_from_answers(ask, build, connect):
    app = build(keys=Keys.of(api=KEYS))
    async with connect(app, key=KEYS[0]) as http:
        made = (await http.post(CONVERSATIONS, json={})).json()["id"]
        assert (await http.get(f"{CONVERSATIONS}/{made}")).status_code == 200
        assert (await http.get(f"{URL}/{made}")).status_code == 404
        answer = (await http.post(URL, json={"model": "tiny", "input": "x"})).json()["id"]
        assert (await http.get(f"{CONVERSATIONS}/{answer}")).status_code == 404
        both = {"conversation": made, "previous_response_id": answer}
        response = await http.post(URL, json={"model": "tiny", "input": "x"} | both)
        assert response.status_code == 400
        wrong = {"items": [{"type": "function_call_output", "call_id": "x", "output": ""}]}
        response = await http.post(f"{CONVERSATIONS}/{made}/items", json=wrong)
        assert response.json()["error"]["param"] == "items[0].call_id"
        assert (await http.get(f"{CONVERSATIONS}/{made}/items")).json()["data"] == []
    async with connect(app, key=KEYS[1]) as http:
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/items")):
            response = await http.request(method, f"{CONVERSATIONS}/{made}{path}")
            assert response.status_code == 404
        response = await http.post(f"{CONVERSATIONS}/{made}/items", json={"items": "x"})
        assert response.status_code == 404


ODD = (1, "x", [], {}, [1], [[]], [None], [{}], {"type": []}, [{"type": []}], [{"id": {}}])


async def test_odd_values_are_no_internal_errors(build, connect):
    app = build()
    async with connect(app) as http:
        made = (await http.post(CONVERSATIONS, json={})).json()["id"]
        for path in ("", f"/{made}", f"/{made}/items"):
            for field in ("items", "metadata"):
                for value in ODD:
                    response = await http.post(CONVERSATIONS + path, json={field: value})
                    assert response.status_code < 500, (path, field, value)
