"""JSON schemas by the hundred: an answer of the real model validates, or the schema is a 400.

The schemas are the groups of JSON-Schema-Test-Suite for draft 2020-12 that every implementation
has to pass, as the source distribution of ``jsonschema`` carries them, and schemas as
applications write them. ``jsonschema`` is the judge.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

SUITE = "jsonschema==4.26.0"
FOLDER = "json/tests/draft2020-12/"
AT_ONCE = 16

# What ends strings, objects, arrays and answers is made likely: the model would ramble otherwise.
ENDS = {'"': 14, '"}': 14, '"]': 14, "}": 5, "]": 5, "@": 6, "<|im_end|>": 12}

WRITTEN: dict[str, Any] = {
    "an extraction": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": 40},
            "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
            "rating": {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
            "genres": {
                "type": "array",
                "items": {"enum": ["drama", "comedy", "thriller"]},
                "minItems": 1,
                "maxItems": 3,
            },
            "seen": {"type": ["boolean", "null"]},
        },
        "required": ["title", "year", "rating", "genres", "seen"],
        "additionalProperties": False,
    },
    "a union by a tag": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "radius": {"type": "number"}},
                "required": ["kind", "radius"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "square"}, "side": {"type": "number"}},
                "required": ["kind", "side"],
                "additionalProperties": False,
            },
        ]
    },
    "a tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/node"},
                        "maxItems": 2,
                    },
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "patterns and formats": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "on": {"type": "string", "format": "date"},
            "at": {"type": "string", "format": "date-time"},
            "phone": {"type": "string", "pattern": "^\\+[0-9]{2} [0-9]{3}-[0-9]{4}$"},
            "code": {"type": "string", "pattern": "^[A-Z]{3}\\d{2}$"},
            "address": {"type": "string", "format": "ipv4"},
        },
        "required": ["id", "on", "at", "phone", "code", "address"],
        "additionalProperties": False,
    },
    "a tuple": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "keys that are not known": {
        "type": "object",
        "additionalProperties": {"type": "integer", "multipleOf": 5},
        "minProperties": 1,
        "maxProperties": 3,
    },
    "optional keys": {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 3} for name in "abcdefgh"},
        "required": ["c", "f"],
        "additionalProperties": False,
    },
    "other letters": {"enum": ["é", "日本", "\u2028", '"', "\\", "\n", "😀", ""]},
    "a number in between": {"type": "number", "exclusiveMinimum": 0.25, "maximum": 0.375},
    "all of several": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
}


@pytest.fixture(scope="module")
def schemas(cache_folder: Path) -> dict[str, Any]:
    """Name to schema; the suite is fetched from PyPI once."""
    folder = cache_folder / "downloads"
    name, _, version = SUITE.partition("==")
    archive = folder / f"{name}-{version}.tar.gz"
    if not archive.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name,
             "--dest", str(folder), SUITE],
            check=True,
            timeout=300,
        )  # fmt: skip
    found = dict(WRITTEN)
    with tarfile.open(archive) as suite:
        for member in sorted(suite.getnames()):
            path = member.partition("/")[2]
            if path.startswith(FOLDER) and path.count("/") == FOLDER.count("/"):
                file = suite.extractfile(member)
                assert file is not None
                for group in json.load(file):
                    where = path.removeprefix(FOLDER)
                    found[f"{where}: {group['description']}"] = group["schema"]
    assert len(found) > 370
    return found


def test_every_schema_is_followed_or_refused(server: Any, schemas: dict[str, Any]) -> None:
    bias = {}
    for text, strength in ENDS.items():
        body = {"prompt": text, "add_special_tokens": False}
        [token_id] = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
        bias[str(token_id)] = strength
    wrong, outcomes = asyncio.run(_ask_all(server, schemas, bias))
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
    # A refusal is honest, but too many would help nobody. The suite is half of what nobody writes.
    assert outcomes["followed"] >= 150, outcomes
    refused = [name for name in WRITTEN if outcomes[name] == 400]
    assert refused == []


async def _ask_all(
    server: Any, schemas: dict[str, Any], bias: dict[str, int]
) -> tuple[dict[str, str], Counter[str]]:
    """What is wrong, by schema; and how many were followed and refused."""
    wrong: dict[str, str] = {}
    outcomes: Counter[str] = Counter()
    turn = asyncio.Semaphore(AT_ONCE)

    async def ask(client: httpx.AsyncClient, name: str, schema: Any) -> None:
        body = {
            "model": server.model,
            "messages": [{"role": "user", "content": f"Some short JSON about {name}"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": schema, "strict": True},
            },
            "max_tokens": 600,
            "temperature": 0.8,
            "seed": 1,
            "logit_bias": bias,
            "frequency_penalty": 0.5,
        }
        async with turn:
            reply = await client.post("/v1/chat/completions", json=body)
        answer = reply.json()
        if reply.status_code == 400:
            outcomes["refused"] += 1
            outcomes[name] = 400
            message = answer["error"]["message"]
            if not message.startswith("response_format.json_schema.schema"):
                wrong[name] = message
            return
        if reply.status_code != 200:
            wrong[name] = reply.text
            return
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        try:
            assert choice["finish_reason"] == "stop", "cut off"
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            outcomes["followed"] += 1
        except (AssertionError, ValueError, jsonschema.ValidationError) as error:
            wrong[name] = f"{error}: {text[:300]}"

    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        await asyncio.gather(*(ask(client, *item) for item in schemas.items()))
    return wrong, outcomes
