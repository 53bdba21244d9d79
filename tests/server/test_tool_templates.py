"""Models with a chat template of their own for chats with tools (Hermes 2 Pro, Hermes 3)."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest

from headstart.engine.errors import ModelError
from headstart.server.http.app import create_app
from headstart.server.text.answer_format import find_format
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Other marks than those of PLAIN: nothing learned from that one helps here.
WITH_TOOLS = (
    "<|im_start|>Tools: {{ tools | tojson }} Call as <tool_call>\n<|eos|>"
    "{% for message in messages %}{{ message['role'] }} says {{ message['content'] }}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}assistant says {% endif %}"
)
LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}
CHAT = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over"},
]
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


@pytest.fixture
def both(backend):
    special = {"eos_token": "<|eos|>"}
    return Tokenizer(backend, special_tokens=special, chat_template=PLAIN, tool_template=WITH_TOOLS)


@pytest.fixture
def tools_only(backend):
    """The template for tools as the only one."""
    return Tokenizer(backend, special_tokens={"eos_token": "<|eos|>"}, chat_template=WITH_TOOLS)


@pytest.fixture
async def http(engine, both):
    engine.model = msgspec.structs.replace(engine.model, max_model_len=1024)
    app = create_app(engine, both, model_names=["tiny"])
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await app.state.runtime.grammars.close()


@pytest.mark.parametrize("saved", ["in the config", "in files", "in both"])
def test_where_they_are_kept(model_folder, saved):
    config = {"chat_template": "old"}
    if saved == "in the config":
        named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
        config = {"chat_template": named}
    else:
        (model_folder / "chat_template.jinja").write_text("a")
        (model_folder / "additional_chat_templates").mkdir()
        (model_folder / "additional_chat_templates" / "tool_use.jinja").write_text("b")
        (model_folder / "additional_chat_templates" / "rag.jinja").write_text("c")
        config = config if saved == "in both" else {}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(model_folder)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("a", "b")


@pytest.mark.parametrize("tools", [None, [LOOK]])
async def test_the_prompt_of_a_chat(http, engine, both, tools_only, tools):
    body = {"model": "tiny", "messages": CHAT, "tools": tools}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text = both.decode_all(engine.added[-1].token_ids)
    assert text == ChatTemplate(tools_only if tools else both).render(CHAT, tools)
    assert text.endswith("assistant says " if tools else "<|im_start|>assistant\n")
    rendered = await http.post("/apply-template", json={"messages": CHAT, "tools": tools})
    assert rendered.json()["prompt"] == text


async def test_calls_are_read_as_that_template_has_them(http, engine, both):
    engine.answer = lambda _: both.encode(CALL, add_special_tokens=False)
    body = {"model": "tiny", "messages": CHAT, "tools": [LOOK]}
    [choice] = (await http.post("/v1/chat/completions", json=body)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


@pytest.mark.parametrize("mark", ["", "<think>"])
def test_what_the_template_for_tools_says_of_answers(backend, mark):
    tokenizer = Tokenizer(
        backend,
        chat_template=PLAIN,
        tool_template=f"{WITH_TOOLS}{mark}[TOOL_CALLS]".replace("<tool_call>", ""),
    )
    found = find_format(tokenizer, ChatTemplate(tokenizer), calls="auto", thoughts="auto")
    assert not found.told_by_us
    assert found.calls is not None
    assert found.calls.name == "mistral"
    assert (found.thoughts is not None) is bool(mark)


@pytest.mark.parametrize("tools", [None, [LOOK]])
async def test_turns_become_segments(http, engine, both, tools_only, tools):
    """They are found in the template that wrote the chat."""
    body = {"model": "tiny", "messages": CHAT, "tools": tools, "segment_mask": "turns"}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    added = engine.added[-1]
    texts = [both.decode_all(added.token_ids[start:end]) for start, end in added.segments]
    if tools is None:
        marks = ("user\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n")
    else:
        marks = ("user says {}<|eos|>",) * 2
        assert texts.pop(0).startswith("Tools: ")
    assert texts == [marks[0].format("the fox"), marks[1].format("over")]


def test_a_broken_one_is_found_at_start(backend):
    with pytest.raises(ModelError, match="chat template is broken"):
        ChatTemplate(Tokenizer(backend, chat_template=PLAIN, tool_template="{% for %}"))
