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
from typing import TYPE_CHECKING, Annotated, Any

from llguidance import LLMatcher, grammar_from
from pydantic import WithJsonSchema

from headstart.server.http.errors import bad_request, refuse_extras
from headstart.server.settings import ServerSettings

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r"\r?\n([ ]{0,32}|\t{0,8})|[ ]{1,2}"
"""What may be between two tokens of JSON: an indented line, or a space. It ends: small models
would go on for ever."""

_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
"""In the library's error; where the schema is a part of a grammar there is more around it."""

_ASKED = (
    "json",
    "json_object",
    "regex",
    "choice",
    "grammar",
    "disable_any_whitespace",
    "whitespace_pattern",
)
_FORMATS = ("text", "json_object", "json_schema", "regex", "grammar")

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


def response_structure(value: Any, settings: ServerSettings) -> Structure | None:
    """What ``response_format`` asks for; raises APIError."""
    if value is None:
        return None
    path = "response_format"
    kind = _object(value, path).get("type")
    match kind:
        case "text":
            refuse_extras(value, {}, f"{path}.", known=("type",))
            return None
        case "json_object":
            refuse_extras(value, {}, f"{path}.", known=("type",))
            return json_structure({"type": "object"}, path, settings)
        case "json_schema":
            refuse_extras(value, {}, f"{path}.", known=("type", "json_schema"))
            path = f"{path}.json_schema"
            inner = _object(value.get("json_schema"), path)
            refuse_extras(inner, {}, f"{path}.", known=("name", "description", "schema", "strict"))
            if not isinstance(inner.get("name"), str) or not 1 <= len(inner["name"]) <= 64:
                raise bad_request(f"{path}.name must have 1 to 64 characters", f"{path}.name")
            if inner.get("strict") not in (None, True, False):
                raise bad_request(f"{path}.strict must be true or false", f"{path}.strict")
            if "schema" not in inner:
                raise bad_request(f"{path}.schema is missing", f"{path}.schema")
            return json_structure(inner["schema"], f"{path}.schema", settings)
        case "regex":
            refuse_extras(value, {}, f"{path}.", known=("type", "pattern"))
            return _regex(value.get("pattern"), f"{path}.pattern", settings)
        case "grammar":
            refuse_extras(value, {}, f"{path}.", known=("type", "grammar"))
            return _grammar(value.get("grammar"), f"{path}.grammar", settings)
    named = ", ".join(_FORMATS)
    raise bad_request(
        f"{path}.type must be one of {named}",
        f"{path}.type",
        "unsupported_parameter" if kind == "structural_tag" else "invalid_value",
    )


def asked_structures(value: Any, settings: ServerSettings) -> list[Structure]:
    """What ``structured_outputs`` asks for, one thing or nothing; raises APIError."""
    if value is None:
        return []
    path = "structured_outputs"
    _object(value, path)
    refuse_extras(value, {}, f"{path}.", known=_ASKED)
    compact = value.get("disable_any_whitespace")
    if compact not in (None, True, False):
        raise bad_request(f"{path}.disable_any_whitespace must be true or false", path)
    whitespace = value.get("whitespace_pattern")
    if whitespace is not None:
        _text(whitespace, f"{path}.whitespace_pattern", settings)
    if compact:
        whitespace = ""
    any_object = {"type": "object"} if value.get("json_object") else None
    return [
        json_structure(schema, f"{path}.{name}", settings, whitespace=whitespace)
        for name, schema in (("json", value.get("json")), ("json_object", any_object))
        if schema is not None
    ] + [
        guided_structure(name, value[name], f"{path}.{name}", settings)
        for name in ("regex", "choice", "grammar")
        if value.get(name) is not None
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


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(f"{path} must be an object", path)
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
