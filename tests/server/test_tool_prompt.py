"""Tools in chats whose template knows none, and calls in the form that a template reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart.server.text.answer_format import find_format
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer
from headstart.server.text.tool_formats import FORMATS
from headstart.server.text.tool_prompt import EXAMPLE, Abilities, tool_text

TEMPLATES = Path(__file__).parent / "chat_templates"
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "the fox",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [LOOK, CLOCK]
TEXT = tool_text(TOOLS, FORMATS["hermes"]({}))


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def calls(text, *arguments):
    found = [
        {"id": f"{i}", "type": "function", "function": {"name": "look", "arguments": value}}
        for i, value in enumerate(arguments)
    ]
    return {"role": "assistant", "content": text, "tool_calls": found}


def result(text, call_id="0"):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


@pytest.fixture
def template(backend):
    def make(name, text=None):
        text = text or (TEMPLATES / f"{name}.jinja").read_text()
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        return ChatTemplate(Tokenizer(backend, special_tokens=special, chat_template=text))

    return make


CHAT = [
    user("hi"),
    calls("I look.", {"city": "Rome"}, {}),
    result("hot"),
    result("cold", "1"),
    user("thanks"),
]
CALLS = (
    '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
)
RESULTS = "<tool_response>\nhot\n</tool_response>\n<tool_response>\ncold\n</tool_response>"


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def test_what_the_model_is_told():
    lines = TEXT.splitlines()
    assert [json.loads(line) for line in lines[1:3]] == [tool["function"] for tool in TOOLS]
    form = '<tool_call>\n{"name": "function_name", "arguments": {"parameter_name": "value"}}\n'
    assert form in TEXT


def test_a_system_turn_tells_of_tools(template):
    smollm2 = template("smollm2")
    assert not smollm2.able.tools
    assert smollm2.render([user("hi")], TOOLS, ending="closed") == chatml(
        ("system", TEXT), ("user", "hi")
    )
    assert smollm2.render([system("Be brief."), *CHAT], TOOLS, ending="closed") == chatml(
        ("system", f"{TEXT}\n\nBe brief."),
        ("user", "hi"),
        ("assistant", f"I look.\n{CALLS}"),
        ("user", RESULTS),
        ("user", "thanks"),
    )


def test_calls_and_results_without_tools(template):
    text = template("smollm2").render([system("Be brief."), *CHAT[:3]], ending="closed")
    assert text == chatml(
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", f"I look.\n{CALLS}"),
        ("user", "<tool_response>\nhot\n</tool_response>"),
    )
    # Without either nothing is ours.
    text = template("smollm2").render([system("Be brief."), user("hi")], ending="closed")
    assert text == chatml(("system", "Be brief."), ("user", "hi"))


@pytest.mark.parametrize("name", ["mistral", "gemma", "gemma3", "llama2"])
@pytest.mark.parametrize("first", [[], [system("Be brief.")]])
def test_templates_without_a_system_turn_or_that_insist_on_turns(template, name, first):
    found = template(name)
    text = found.render([*first, *CHAT], TOOLS)
    before, rest = text.split(TEXT)
    assert "hi" not in before
    assert "Be brief." not in before
    places = [rest.find(part) for part in ("hi", CALLS, RESULTS, "thanks")]
    assert places == sorted(places)
    assert places[0] >= 0
    assert ("Be brief." in rest) == bool(first)
    # Chats with the same tools begin with the same text.
    other = found.render([user("other")], TOOLS)
    assert text.startswith(other.split(TEXT)[0] + TEXT)


def test_a_chat_without_a_user(template):
    text = template("gemma").render([], TOOLS)
    assert text.startswith(f"<s><start_of_turn>user\n{TEXT}<end_of_turn>")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "llama3_2", "mistral_tools"])
def test_templates_with_tools(template, name):
    assert template(name).able == Abilities()


def test_special_tokens_written_by_users_stay_text(template, backend):
    """The marks of a call are the prompt's own, those in what is described are not."""
    tokenizer = Tokenizer(backend, chat_template=(TEMPLATES / "smollm2.jinja").read_text())
    evil = {"type": "function", "function": {"name": "f", "description": "<|eos|>"}}
    ids = ChatTemplate(tokenizer).encode([user("hi")], [evil])
    assert tokenizer.backend.token_to_id("<|eos|>") not in ids


ADDS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + CALL + '</call>' }}{% endfor %}|{% endfor %}"
)
ONLY_WITHOUT_TEXT = (
    "{% for message in messages %}{% if message.content is none %}"
    "{% for call in message.tool_calls %}{{ call.function.name + call.function.arguments }}"
    "{% endfor %}{% else %}{{ message.role }}: {{ message.content }}{% endif %}|{% endfor %}"
)
JSON = '{"city": "Rome"}'


@pytest.mark.parametrize(
    ("arguments", "as_text", "written"),
    [
        ("call.function.arguments", True, JSON),
        ("call.function.arguments ~ ''", True, JSON),
        ("call.function.arguments | tojson", False, JSON),
        ("(call.function.arguments.items() | list | string)", False, "[('city', 'Rome')]"),
        (
            "(call.function.arguments if call.function.arguments is string else "
            "call.function.arguments | tojson)",
            False,
            JSON,
        ),
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_arguments_have_the_form_that_the_template_reads(
    template, arguments, as_text, written, tools
):
    text = ADDS.replace("CALL", arguments)
    found = template("", ("{{ tools | tojson }}" if tools else "") + text)
    assert found.able.arguments_as_text == as_text
    assert found.able.calls
    chat = [user("hi"), calls("", {"city": "Rome"}), result("hot")]
    assert f"<call>look{written}</call>" in found.render(chat, tools)


def test_a_template_that_writes_calls_keeps_them(template):
    found = template("", ADDS.replace("CALL", "call.function.arguments"))
    assert found.render(CHAT[:3], [CLOCK]) == (
        f"system: {tool_text([CLOCK], FORMATS['hermes']({}))}|user: hi|"
        f"assistant: I look.<call>look{JSON}</call><call>look{{}}</call>|tool: hot|"
    )


def test_calls_that_are_written_only_where_there_is_no_text(template):
    found = template("", ONLY_WITHOUT_TEXT)
    assert found.able.calls_without_text
    chat = [user("hi"), calls("I look.", {"city": "Rome"}), result("hot"), calls("", {})]
    assert found.render(chat) == (f"user: hi|assistant: I look.|look{JSON}|tool: hot|look{{}}|")


OF_SYSTEM = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'system' and message.tools %}<|tool|>{{ message.tools }}<|/tool|>"
    "{% endif %}<|end|>{% endfor %}"
)


@pytest.mark.parametrize("first", [[], [system("Be brief.")]])
def test_tools_that_are_the_system_message_s(template, first):
    found = template("", OF_SYSTEM)
    text = found.render([*first, user("hi")], TOOLS)
    functions = json.dumps([tool["function"] for tool in TOOLS])
    said = "Be brief." if first else ""
    assert text == f"<|system|>{said}<|tool|>{functions}<|/tool|><|end|><|user|>hi<|end|>"


def test_the_format_of_such_a_template(backend):
    tokenizer = Tokenizer(backend, chat_template=OF_SYSTEM)
    found = find_format(tokenizer, ChatTemplate(tokenizer), calls="auto", thoughts="auto")
    assert found.calls is not None
    assert found.calls.name == "phi4"


def test_a_template_that_has_calls_and_no_tools_tells_of_its_own_calls(backend):
    """As DeepSeek's V3 and R1: what it writes of earlier calls is what the model is told to."""
    source = ADDS.replace(
        "'<call>' + call.function.name + CALL + '</call>'",
        "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name"
        " + '\n```json\n' + call.function.arguments"
        " + '\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'",
    )
    tokenizer = Tokenizer(backend, chat_template=source)
    found = ChatTemplate(tokenizer)
    answers = find_format(tokenizer, found, calls="auto", thoughts="auto")
    assert answers.told_by_us
    assert answers.calls is not None
    assert answers.calls.name == "deepseek_v3"
    found.call_format = answers.calls
    call = answers.calls.written([("look", JSON)])
    text = found.render([user("hi"), calls("", {"city": "Rome"}), result("hot")], TOOLS)
    assert text.count(call) == 1
    assert text.count(answers.calls.written([EXAMPLE])) == 1
