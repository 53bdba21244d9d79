"""What blocks and roles become in the prompt: system turns, images, results without calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[1] / "chat_templates"
IGNORED = "x-headstart-ignored"
TOOLS = [{"name": "look", "input_schema": {"type": "object"}}]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
CONTENT = "messages[].content"
BLOCKS = f"{CONTENT}[]"
# Which system messages are written in their places, and which chats are refused.
ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}|{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role != ('user' if loop.index0 is even else 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role[0] }}:{{ m.content }}|"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
DROPPING = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
)


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else [*content]}


def assistant(*content):
    return user(*content) | {"role": "assistant"}


def system(text, **fields):
    return {"role": "system", "content": text, **fields}


def text(words):
    return {"type": "text", "text": words}


def call(call_id="t1", given=None):
    return {"type": "tool_use", "id": call_id, "name": "look", "input": given}


def result(content, call_id="t1", **fields):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def reminder(words):
    return f"<system-reminder>\n{words}\n</system-reminder>"


async def test_system_messages_in_their_places(ask, build, shown):
    app = build()
    messages = [user("u"), system("one"), system([text("two")]), assistant("a"), user("v")]
    response = await ask(app=app, system="first", messages=messages)
    assert response.status_code == 200, response.text
    assert [(m["role"], m["content"]) for m in shown(app)] == [
        ("system", "first"),
        ("user", "u"),
        ("system", "one\ntwo"),
        ("assistant", "a"),
        ("user", "v"),
    ]
    await ask(app=app, system="first", messages=[system("second"), user("u"), system("last")])
    assert [m["content"] for m in shown(app)] == ["first\nsecond", "u", "last"]
    assert IGNORED not in response.headers


async def test_system_messages_where_the_template_knows_one(ask, build, prompt):
    app, seen = build(ALTERNATING), []
    turns = [user("u"), system("one"), assistant("a"), system("two"), system("three"), user("v")]
    for count in (1, 2, 4, 5, 6):
        response = await ask(app=app, system="first", messages=turns[:count])
        assert response.status_code == 200, response.text
        seen.append(prompt(app))
    one, two, three = map(reminder, ("one", "two", "three"))
    assert seen == [
        "first|u:u|a:",
        f"first|u:u\n\n{one}|a:",
        f"first|u:u\n\n{one}|a:a|u:{two}|a:",
        f"first|u:u\n\n{one}|a:a|u:{two}\n\n{three}|a:",
        f"first|u:u\n\n{one}|a:a|u:{two}\n\n{three}\n\nv|a:",
    ]


async def test_system_messages_beside_results(ask, build, shown):
    # Its condition makes the template one that leaves later system messages out.
    app = build(
        "{# <tool_call> #}TOOLS {{ tools | tojson }} /TOOLS {% for m in messages %}"
        "{% if m.role != 'system' %}<|im_start|>{{ m | tojson }}<|im_end|>{% endif %}{% endfor %}"
    )
    messages = [user("u"), assistant(call()), system("before"), user(result("rain")), system("x")]
    response = await ask(app=app, messages=messages, tools=TOOLS)
    assert response.status_code == 200, response.text
    roles = [message["role"] for message in shown(app)]
    assert roles == ["user", "assistant", "tool"]
    said = f"rain\n\n{reminder('before')}\n\n{reminder('x')}"
    assert shown(app)[-1]["content"] == said


@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("chatml_tools", True),
        ("gemma", False),
        ("gemma3", False),
        ("llama2", False),
        ("llama3", True),
        ("llama3_1", True),
        ("mistral", False),
        ("mistral_tools", False),
        ("phi3", True),
        ("phi4", True),
        ("qwen2_5", True),
        ("qwen3", True),
        ("smollm2", True),
        (DROPPING, False),
        (ALTERNATING, False),
    ],
)
def test_which_templates_take_later_system_messages(backend, name, later):
    path = FOLDER / f"{name}.jinja"
    source = name if "{" in name else path.read_text()
    special = {"bos_token": "<s>", "eos_token": "<|eos|>"}
    template = ChatTemplate(Tokenizer(backend, special_tokens=special, chat_template=source))
    for _ in range(2):
        assert template.takes_later_system(None) == later


async def test_images_among_texts(ask, build, shown):
    app = build()
    response = await ask(app=app, messages=[user(text("What is"), IMAGE, text("here?"))])
    assert response.status_code == 200, response.text
    assert shown(app) == [user("What is\n[image]\nhere?")]
    assert response.headers[IGNORED] == f"{CONTENT}[type=image]"
    messages = [user(IMAGE), assistant("A fox."), user("Sure?")]
    response = await ask(app=app, messages=messages)
    assert shown(app)[0] == user("[image]")
    for messages in ([user("Look:"), user(IMAGE, text(""))], [user(IMAGE), assistant("It")]):
        response = await ask(app=app, messages=messages)
        assert response.status_code == 400
        assert "this model reads text only" in response.json()["error"]["message"]


async def test_what_else_becomes_text(ask, build, shown):
    app = build()
    plain = {"type": "text", "media_type": "text/plain", "data": "Foxes."}
    blocks = {"type": "content", "content": [text("Owls."), IMAGE]}
    content = [
        {"type": "document", "source": plain, "title": "Of foxes", "context": "A book."},
        {"type": "document", "source": blocks},
        {"type": "document", "source": {"type": "file", "file_id": "f"}},
        {"type": "search_result", "source": "s", "title": "Of owls", "content": [text("Night.")]},
        {"type": "compaction", "content": "They spoke of foxes."},
        {"type": "hologram", "data": "x"},
    ]
    response = await ask(app=app, messages=[user(*content, text("So?"))])
    assert response.status_code == 200, response.text
    [message] = shown(app)
    assert message["content"].split("\n") == [
        *("Of foxes", "A book.", "Foxes."),
        *("Owls.", "[image]"),
        "[document]",
        *("Of owls", "s", "Night."),
        "They spoke of foxes.",
        "[hologram]",
        "So?",
    ]
    named = response.headers[IGNORED].split(", ")
    assert f"{CONTENT}[type=hologram]" in named
    assert f"{CONTENT}[type=document]" in named
    strict = await ask(app=build(unknown_fields="refuse"), messages=[user(*content)])
    assert strict.status_code == 400
    assert "hologram" in strict.json()["error"]["message"]


async def test_results_with_other_blocks(ask, build, shown):
    app = build()
    found = [text("two:"), IMAGE, {"type": "tool_reference", "tool_name": "look"}]
    messages = [user("u"), assistant(call(), call("t2")), user(result(found), result(None, "t2"))]
    response = await ask(app=app, messages=messages, tools=TOOLS)
    assert response.status_code == 200, response.text
    assert [message["content"] for message in shown(app)[2:]] == ["two:\n[image]\nlook", ""]
    assert response.headers[IGNORED] == f"{BLOCKS}.content[type=image]"
    only = [user("u"), assistant(call()), user(result([IMAGE]))]
    assert (await ask(app=app, messages=only, tools=TOOLS)).status_code == 200


async def test_a_result_without_its_call(ask, build, shown):
    app = build()
    response = await ask(app=app, messages=[user(result("rain", is_error=True), text("So?"))])
    assert response.status_code == 200, response.text
    assert shown(app) == [user("Error: rain\nSo?")]
    assert response.headers[IGNORED] == f"{BLOCKS}.tool_use_id"


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"a": 1}, {"a": 1}),
        (None, {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": ', {"INVALID_JSON": '{"a": '}),
        ([1], {"INVALID_JSON": "[1]"}),
    ],
)
async def test_the_input_of_a_call(ask, build, shown, given, arguments):
    app = build()
    messages = [user("u"), assistant(call(given=given)), user(result("rain"))]
    response = await ask(app=app, messages=messages, tools=TOOLS)
    assert response.status_code == 200, response.text
    assert shown(app)[1]["tool_calls"][0]["function"]["arguments"] == arguments


async def test_what_says_nothing(ask, build, shown):
    app = build()
    messages = [user(text(""), text("u"), text("")), assistant(text("")), user("v")]
    assert (await ask(app=app, messages=messages)).status_code == 200
    assert shown(app) == [user("u"), assistant(""), user("v")]
    empty = {"role": "assistant", "content": []}
    assert (await ask(app=app, messages=[user("u"), empty, user("v")])).status_code == 200
    assert shown(app) == [user("u"), assistant(""), user("v")]
    for last in (empty, assistant(""), assistant(text(""))):  # nothing to go on from
        assert (await ask(app=app, messages=[user("u"), last])).status_code == 200
        assert shown(app) == [user("u")]
    assert (await ask(app=app, messages=[user("")])).status_code == 200
    assert shown(app) == [user("")]


async def test_what_anthropics_servers_have_done(ask, build, shown):
    app = build()
    done = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        text("Rain."),
    ]
    response = await ask(app=app, messages=[user("u"), assistant(*done), user("v")])
    assert response.status_code == 200, response.text
    assert shown(app)[1] == assistant("Rain.")
    assert set(response.headers[IGNORED].split(", ")) == {
        f"{CONTENT}[type={block['type']}]" for block in done[:3]
    }


async def test_fields_of_blocks_and_messages(ask):
    content = [
        text("u")
        | {"cache_control": {"type": "ephemeral"}, "citations": [], "x": 1, "nothing": None}
    ]
    messages = [user(*content), system("s", clear_at="next_user_message")]
    response = await ask(messages=messages)
    assert set(response.headers[IGNORED].split(", ")) == {
        f"{BLOCKS}.cache_control",
        f"{BLOCKS}.x",
        "messages[].clear_at",
    }
    wrong = await ask(messages=[user({"type": "text", "text": 1})])
    assert "messages[0].content[0].text" in wrong.json()["error"]["message"]


async def test_blocks_have_a_limit(ask, build):
    app = build(max_messages=2)
    most = [text("u")] * 4
    messages = [user(*most), user(*most)]
    assert (await ask(app=app, messages=messages)).status_code == 200
    messages = [user(*most), user(*most, text("v"))]
    response = await ask(app=app, messages=messages)
    assert response.status_code == 400
    assert "at most 8 blocks" in response.json()["error"]["message"]


async def test_blocks_in_blocks_in_blocks(ask):
    block = text("deep")
    for _ in range(60):
        block = {"type": "search_result", "source": "s", "title": "t", "content": [block]}
    assert (await ask(messages=[user(block)])).status_code in (200, 400)
    assert (await ask(messages=[user(result([block]))])).status_code in (200, 400)
