"""/v1/responses of the real server, through the official client."""

from __future__ import annotations

import json
import shutil

import openai
import pytest

MODEL = "smollm2-135m"
PARIS = "What is the capital of France? Answer in one sentence."
LOOK = {
    "type": "function",
    "name": "look",
    "description": "Looks at the sky over a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{# <tool_call> #}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def test_a_text_whole_and_streamed(client):
    fields = {"model": MODEL, "input": PARIS, "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**fields)
    assert "Paris" in whole.output_text
    assert whole.status == "completed"
    with client.responses.stream(**fields) as stream:
        said = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert said == final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_an_answer_goes_on_from_a_stored_one(client):
    fields = {"model": MODEL, "max_output_tokens": 8, "temperature": 0}
    first = client.responses.create(input=PARIS, **fields)
    second = client.responses.create(input="And of Italy?", previous_response_id=first.id, **fields)
    spelt_out = client.responses.create(
        input=[
            {"role": "user", "content": PARIS},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And of Italy?"},
        ],
        **fields,
    )
    assert second.usage.input_tokens == spelt_out.usage.input_tokens
    assert second.output_text == spelt_out.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_schema(client):
    schema = LOOK["parameters"]
    answer = client.responses.create(
        model=MODEL,
        input="Where?",
        max_output_tokens=32,
        text={"format": {"type": "json_schema", "name": "place", "schema": schema}},
    )
    assert json.loads(answer.output_text)["city"] in ("Rome", "Paris")


def test_a_forced_call(tiny_folder, tmp_path, start_server):
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(TOOLS)
    server = start_server(str(folder), "--kv-memory", "16MiB", "--threads", "1")
    with server.client() as client:
        answer = client.responses.create(
            model="tiny",
            input="Where?",
            tools=[LOOK],
            tool_choice={"type": "function", "name": "look"},
            max_output_tokens=99,
        )
    assert answer.status == "completed"
    assert {(item.type, item.name) for item in answer.output} == {("function_call", "look")}
    assert json.loads(answer.output[0].arguments)["city"] in ("Rome", "Paris")


def test_a_template_without_tools_writes_ours(client):
    response = client.responses.create(
        model=MODEL,
        input="Where?",
        tools=[LOOK],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    assert [item.type for item in response.output] == ["function_call"]
    assert response.output[0].name == LOOK["name"]
