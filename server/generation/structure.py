"""What an answer has to follow: ``response_format`` and vLLM's ``structured_outputs``.

    response_format      text, json_object, json_schema, and regex or grammar
    structured_outputs   json, json_object, regex, choice, grammar
    guided_json, ...     the same by vLLM's older names

Each becomes the text of a grammar, which GrammarChecker tries before a token is computed. A schema
is followed exactly, whether ``strict`` is asked for or not; a keyword that can't be is a 400.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llguidance import LLMatcher, grammar_from
from pydantic import Field, WithJsonSchema

from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Advisory, Body, Refused
from headstart.server.settings import ServerSettings
from headstart.server.text.tool_formats.schemas import WHITESPACE

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
"""In the library's error; where the schema is a part of a grammar there is more around it."""

ObjectField = Annotated[Any, WithJsonSchema({"type": "object"}, mode="validation")]
AnyField = Annotated[Any, WithJsonSchema({}, mode="validation")]


class Structure:
    """A grammar, and the path of the field that asks for it. ``schema``: what it is made of, if
    that is a JSON schema."""

    def __init__(self, grammar: str, path: str, schema: Any = None) -> None:
        self.grammar = grammar
        self.path = path
        self._schema = schema

    def replaced(self, grammar: str) -> Structure:
        """The same with a grammar that has it as its part."""
        return Structure(grammar, self.path, self._schema)

    def explain(self, error: str) -> str:
        """``error`` of the library in the client's words."""
        if found := _UNIMPLEMENTED.search(error):
            keys = json.loads(found[1])
            named = ", ".join(repr(_place(self._schema, key) or key) for key in sorted(keys))
            plural = "s" if len(keys) > 1 else ""
            return f"{self.path}: the keyword{plural} {named} cannot be followed"
        return f"{self.path}: {error}"


class JsonSchemaFormat(Body):
    """``strict``: schemas are followed exactly anyway."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: AnyField = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """``schema``: of ``json_object``, as llama.cpp has it. A field of another type is ignored."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: AnyField = Field(None, alias="schema")
    pattern: str | None = None
    grammar: str | None = None

    def structure(self, path: str, settings: ServerSettings) -> Structure | None:
        """What it asks for; raises APIError."""
        match self.type:
            case "text":
                return None
            case "json_object":
                schema = {"type": "object"} if self.schema_ is None else self.schema_
                return json_structure(schema, path, settings)
            case "json_schema":
                path = f"{path}.json_schema"
                if self.json_schema is None:
                    raise bad_request(f"{path} is required", path, "missing_required_parameter")
                return json_structure(self.json_schema.schema_, f"{path}.schema", settings)
            case "regex":
                return _regex(self.pattern, f"{path}.pattern", settings)
        return _grammar(self.grammar, f"{path}.grammar", settings)


class StructuredOutputs(Body):
    """One of the first five, or none of them."""

    json_: AnyField = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: AnyField = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    disable_fallback: Annotated[Any, Advisory()] = None
    disable_additional_properties: Annotated[
        Any, Refused('say "additionalProperties": false in the schema', harmless=(False,))
    ] = None
    structural_tag: Annotated[Any, Refused("use tools, or a grammar")] = None

    def structures(self, path: str, settings: ServerSettings) -> list[Structure]:
        """What it asks for; raises APIError."""
        whitespace = self.whitespace_pattern
        if whitespace is not None:
            _text(whitespace, f"{path}.whitespace_pattern", settings)
        if self.disable_any_whitespace:
            whitespace = ""
        any_object = {"type": "object"} if self.json_object else None
        return [
            json_structure(schema, f"{path}.{name}", settings, whitespace=whitespace)
            for name, schema in (("json", self.json_), ("json_object", any_object))
            if schema is not None
        ] + [
            guided_structure(name, value, f"{path}.{name}", settings)
            for name in ("regex", "choice", "grammar")
            if (value := getattr(self, name)) is not None
        ]


def guided_structure(kind: str, value: Any, path: str, settings: ServerSettings) -> Structure:
    """What vLLM's ``guided_`` fields ask for; raises APIError. ``kind``: json, regex, choice or
    grammar."""
    match kind:
        case "json":
            return json_structure(value, path, settings)
        case "regex":
            return _regex(value, path, settings)
        case "choice":
            return _choice(value, path, settings)
    return _grammar(value, path, settings)


def json_structure(
    schema: Any, path: str, settings: ServerSettings, *, whitespace: str | None = None
) -> Structure:
    """JSON that validates against ``schema``, a value or its text. ``whitespace``: a pattern of
    what may be between tokens; "" is nothing. Raises APIError."""
    most = settings.max_schema_chars
    if isinstance(schema, str):
        _text(schema, path, settings)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise bad_request(f"{path} is not JSON", path) from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise bad_request(f"{path} must be a JSON schema: an object", path)
    depth, size = _walked(schema, most)
    if size > most:  # without writing it
        raise bad_request(f"{path} has more than {most} characters; no more are allowed", path)
    if depth > settings.max_schema_depth:
        raise bad_request(
            f"{path} is {depth} levels deep; at most {settings.max_schema_depth} are allowed", path
        )
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > most:
        raise bad_request(f"{path} has {len(text)} characters; at most {most} are allowed", path)
    if place := _place(schema, "x-guidance"):  # it would say what is not to be followed
        raise bad_request(f"{path}: the keyword {place!r} is not supported", path)
    options: JsonCompileOptions = {"lenient": False}
    if whitespace == "":
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = whitespace or WHITESPACE
    try:
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
    except ValueError as error:
        raise bad_request(f"{path}: {error}", path) from error
    return Structure(grammar, path, schema)


def _regex(value: Any, path: str, settings: ServerSettings) -> Structure:
    return Structure(LLMatcher.grammar_from_regex(_text(value, path, settings)), path)


def _grammar(value: Any, path: str, settings: ServerSettings) -> Structure:
    """Lark, or GBNF as llama.cpp has it."""
    text = _text(value, path, settings)
    try:
        return Structure(grammar_from("grammar", text), path)
    except ValueError as error:
        raise bad_request(f"{path}: {error}", path) from error


def _choice(value: Any, path: str, settings: ServerSettings) -> Structure:
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a list of strings", path)
    if len(value) > settings.max_choice:
        raise bad_request(
            f"{path} has {len(value)} strings; at most {settings.max_choice} are allowed", path
        )
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text:
            raise bad_request(f"{path}[{i}] must be a string that is not empty", f"{path}[{i}]")
    if (size := sum(map(len, value))) > settings.max_schema_chars:
        raise bad_request(
            f"{path} has {size} characters; at most {settings.max_schema_chars} are allowed", path
        )
    return Structure(grammar_from("choice", json.dumps(value)), path)


def _text(value: Any, path: str, settings: ServerSettings) -> str:
    most = settings.max_schema_chars
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise bad_request(f"{path} must be a string of 1 to {most} characters", path)
    return value


def _walked(value: Any, most: int) -> tuple[int, int]:
    """The levels of a value, and how many characters it has at least, if no more than ``most``."""
    deepest, size, waiting = 0, 0, [(value, 1)]
    while waiting and size <= most:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict | list):
            size += len(item) * (len('"":0,') if isinstance(item, dict) else len("0,"))
            if size <= most:
                children = item.values() if isinstance(item, dict) else item
                waiting += [(child, depth + 1) for child in children]
    return deepest, size


def _place(schema: Any, keyword: str) -> str | None:
    """Where ``keyword`` is first in a schema, as ``properties.a.not``."""
    for path, item in _objects(schema, ""):
        if keyword in item:
            return f"{path}{keyword}"
    return None


def _objects(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    waiting = [(path, value)]
    while waiting:
        path, item = waiting.pop(0)
        if isinstance(item, dict):
            yield path, item
            waiting += [(f"{path}{key[:80]}.", child) for key, child in item.items()]
        elif isinstance(item, list):
            waiting += [(f"{path}{i}.", child) for i, child in enumerate(item)]
