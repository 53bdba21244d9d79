"""The JSON schemas of functions' arguments: what a call that follows a grammar may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Function = dict[str, Any]
"""``name``, maybe ``parameters``, a JSON schema of an object, and ``strict``."""

Schema = Mapping[str, Any]

WHITESPACE = r"\r?\n([ ]{0,32}|\t{0,8})|[ ]{1,2}"
"""What may be between two tokens of JSON: an indented line, or a space. It ends: small models
would go on for ever."""

MAX_DEPTH = 64
_ONE = ("items", "additionalProperties")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"}


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments; without one it takes none.

    Objects that name their properties have no others, unless they say so.
    """
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"additionalProperties": False}
    schema = {"type": "object"} | parameters
    # An object put together of several would be closed to what the others allow.
    return schema if any(map(_combines, _schemas(schema))) else _closed(schema, 0)


def _combines(schema: Schema) -> bool:
    several = isinstance(found := schema.get("allOf"), list) and len(found) > 1
    return several or ("properties" in schema and not _COMBINING.isdisjoint(schema))


def _schemas(schema: Schema) -> Iterator[Schema]:
    """A schema and those within."""
    waiting: list[Any] = [schema]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, Mapping):
            continue
        yield item
        waiting += [item[key] for key in _ONE if key in item]
        for key in _LISTED:
            listed = item.get(key)
            waiting += listed if isinstance(listed, list) else ()
        for key in _NAMED:
            named = item.get(key)
            waiting += named.values() if isinstance(named, Mapping) else ()


def _closed(schema: Any, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return schema
    found = dict(schema)
    for key, value in schema.items():
        if key in _ONE:
            found[key] = _closed(value, depth + 1)
        elif key in _LISTED and isinstance(value, list):
            found[key] = [_closed(item, depth + 1) for item in value]
        elif key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: _closed(item, depth + 1) for name, item in value.items()}
    if found.get("properties") and "unevaluatedProperties" not in found:
        found.setdefault("additionalProperties", False)
    return found


def kinds(schema: Any, root: Schema) -> set[str]:
    """The types that a value may have, by JSON schema's names; empty if that is not said."""
    found: set[str] = set()
    waiting, followed = [schema], set[str]()
    while waiting:
        item = waiting.pop()
        if not isinstance(item, Mapping):
            return set()
        listed = next((item[key] for key in _LISTED[:3] if isinstance(item.get(key), list)), None)
        match item:
            case {"$ref": str(ref)}:
                if ref not in followed:
                    followed.add(ref)
                    waiting.append(_at(root, ref))
            case {"const": value}:
                found.add(kind(value))
            case {"enum": list(values)}:
                found.update(map(kind, values))
            case {"type": str(name)}:
                found.add(name)
            case {"type": list(names)}:
                found.update(map(str, names))
            case _ if listed:
                waiting += listed
            case _:
                return set()
    return found


def kind(value: Any) -> str:
    """The type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _at(root: Schema, ref: str) -> Any:
    """What a reference within a schema, ``#/$defs/a``, stands for."""
    found: Any = root
    for key in ref.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
