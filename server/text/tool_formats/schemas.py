"""The JSON schemas of functions' arguments: what a call that follows a grammar may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Function = dict[str, Any]
"""``name``, maybe ``parameters``, a JSON schema of an object, and ``strict``."""

Schema = Mapping[str, Any]

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
