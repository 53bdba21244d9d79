"""Requests that schemathesis makes of /openapi.json: answers are as the document says they are.

All of its checks are made, of every single request; schemathesis.toml says what an answer to data
that follows the document may be.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from headstart.server.http.api_document import ANSWERS, STATUSES
from headstart.server.http.app import BODIES

load_all_checks()
CONFIG = Path(__file__).parent / "schemathesis.toml"
CASES = 2 * settings.default.max_examples // 5


def test_every_operation(app, engine):
    engine.vector = [1.0] * 8
    config = schemathesis.Config.from_path(CONFIG)
    api = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    checks = CHECKS.get_all()
    operations = [result.ok() for result in api.get_all_operations()]
    assert {operation.path for operation in operations} >= set(ANSWERS)
    statuses: Counter[int] = Counter()

    def send(case):
        if isinstance(case.body, dict):
            # Any other name is a 404, any other field is ignored, which say little.
            known = BODIES[case.operation.path].model_fields
            if case.meta.generation.mode is GenerationMode.POSITIVE:
                case.body = {name: case.body[name] for name in known if name in case.body}
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
        statuses[case.call_and_validate(checks=checks).status_code] += 1

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue
            settings(
                max_examples=CASES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(operation.as_strategy(generation_mode=mode))(send))()
    print(dict(statuses))
    assert statuses.total() > 15 * CASES
    assert set(statuses) <= {200, *STATUSES}
    assert statuses[200] > CASES // 2


USER = {"role": "user", "content": "hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": None} | fields, USER]}


def parts(*given: Any) -> dict[str, Any]:
    return {"messages": [USER | {"content": list(given)}]}


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        (parts({"type": "text", "text": "a", "cache_control": {}}), True),
        (parts({"type": "refusal", "refusal": "a"}), True),
        (parts({"type": "text"}), False),
        (parts({"type": "text", "text": 1}), False),
        (parts({"type": "image_url", "image_url": {"url": "data:,"}}), False),
        (parts("a"), False),
        (said(tool_calls=[CALL]), True),
        (said(tool_calls=[CALL | {"index": 0, "extra": 1}]), True),
        (said(tool_calls=[CALL | {"id": 1}]), False),
        (said(tool_calls=[CALL | {"function": {"arguments": "{}"}}]), False),
        (said(tool_calls=CALL), False),
        (said(refusal="no", annotations=[], audio=None, function_call=None), True),
        (said(content="a", audio={"id": "a"}), False),
        ({"tools": [], "tool_choice": "none"}, True),
        ({"tools": [{"type": "x"}]}, False),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, False),
        ({"tool_choice": "any"}, False),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, False),
        ({"response_format": {"type": "xml"}}, False),
        ({"structured_outputs": {"choice": ["a"], "structural_tag": None}}, True),
        ({"structured_outputs": {"structural_tag": {}}}, False),
        ({"structured_outputs": {"regex": 1}}, False),
        ({"reasoning": {"effort": "low", "exclude": True}}, True),
        ({"reasoning": "low"}, False),
        ({"documents": [{"title": "a"}]}, False),
        ({"stream_options": None, "n": None, "stop": ["a"] * 20}, True),
    ],
)
async def test_the_document_is_true_of_nested_objects(client, fields, right):
    """What it allows is answered, what it does not is a 400."""
    document = (await client.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/ChatBody", "components": document["components"]}
    body = {"model": "tiny", "messages": [USER]} | fields
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(body))
    assert (not errors) == right, errors
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == (200 if right else 400), response.text
