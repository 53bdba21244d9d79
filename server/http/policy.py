"""What becomes of a request's fields: each is supported, advisory or refused.

Supported
    A plain field of a body.
Advisory
    It cannot change which tokens are right (hints, metadata, marks of caches, betas). Any value is
    accepted, and ``x-headstart-ignored`` names the field.
Refused
    Ignoring it would give another answer than asked for: a 400 that names all such fields at once,
    each with what to do instead. The values that ask for nothing are accepted.

A field that no body knows is advisory, or refused with ``--unknown-fields refuse``. Null asks for
nothing, wherever it stands.

    class ChatBody(Body):
        store: Annotated[Any, Advisory()] = None
        modalities: Annotated[Any, Refused("this model writes text", harmless=(["text"],))] = None
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from starlette.types import Scope

from headstart.server.http.errors import APIError, bad_request, from_validation
from headstart.server.settings import ServerSettings

MAX_NAMED = 32
"""Fields that a header or an error names."""
MAX_NAME_CHARS = 120
MAX_BODIES = 65536
"""Objects in one request whose fields are looked at one by one."""

OTHER = "other"
"""What metrics call a field that no body knows."""


@dataclass(frozen=True, slots=True)
class Advisory:
    """``harmless``: values, beside null, of which nothing has to be said."""

    harmless: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """``remedy``: what to do instead. ``harmless``: the values, beside null, that are accepted."""

    remedy: str = ""
    harmless: tuple[Any, ...] = ()

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self.harmless]}


@dataclass(slots=True)
class Notes:
    """What the fields of one request gave. ``strict``: unknown ones are refused.

    ``ignored``: paths without indices, ``messages[].cache_control``, in the order found; and what
    the metrics call them, the same but for fields that no body knows.
    """

    strict: bool = False
    ignored: dict[str, str] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _unknown: dict[str, None] = field(default_factory=dict)
    _objects: int = 0

    def count(self, path: str) -> None:
        """One more object is looked at; raises a 400 when they are too many."""
        self._objects += 1
        if self._objects > MAX_BODIES:
            raise bad_request(
                f"{path}: the request has more than {MAX_BODIES} objects", path, "invalid_value"
            )

    def ignore(self, path: str) -> None:
        """The field has no effect."""
        if len(self.ignored) <= MAX_NAMED:
            name = _without_indices(path)
            self.ignored[name] = name

    def refuse(self, path: str, remedy: str = "") -> None:
        """The field asks for what there is not."""
        if len(self._refused) <= MAX_NAMED:
            self._refused[path] = remedy

    def unknown(self, path: str) -> None:
        """No body has such a field."""
        if not self.strict:
            if len(self.ignored) <= MAX_NAMED:
                self.ignored[_without_indices(path)] = OTHER
        elif len(self._unknown) <= MAX_NAMED:
            self._unknown[path] = None

    def check(self) -> None:
        """Raise a 400 that names every field refused."""
        if error := self._error():
            raise error

    def _error(self) -> APIError | None:
        if not self._refused and not self._unknown:
            return None
        said = [
            f"{path} is not supported" + (f": {remedy}" if remedy else "")
            for path, remedy in self._refused.items()
        ]
        said += [f"{path} is not a known field" for path in self._unknown]
        first = next(iter((*self._refused, *self._unknown)))
        code = "unsupported_parameter" if self._refused else "unknown_parameter"
        return bad_request("; ".join(said), first, code)

    def names(self) -> dict[str, str]:
        """The names of what is ignored, in printable ASCII without commas, and in the metrics."""
        return {_printable(path): _printable(name) for path, name in self.ignored.items()}

    def header(self) -> str:
        """``x-headstart-ignored``; empty when nothing was."""
        names = list(self.names())
        return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


class Body(BaseModel):
    """Strict: a string is no number. Bodies in bodies are settled with them."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )
    # A slot: pydantic's private attributes double the time that a small body takes to be made.
    __slots__ = ("_notes",)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Whatever may be left out may be null."""
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        properties |= {
            name: _or_null(value)
            for name, value in properties.items()
            if value.get("default", ...) is None
        }
        return found

    @property
    def notes(self) -> Notes:
        """What is ignored of the request that this is the body, or a part, of: once settled."""
        notes: Notes = object.__getattribute__(self, "_notes")
        return notes

    def settle(self, notes: Notes, prefix: str = "") -> None:
        """Tell ``notes`` of the fields that are ignored or refused. ``prefix``: before their names,
        as ``messages[0].``."""
        object.__setattr__(self, "_notes", notes)  # pydantic's own looks for a field first
        notes.count(prefix[:-1])
        names, special = _names(type(self)), policies(type(self))
        inner: list[tuple[str, Body]] = []
        values, sent = self.__dict__, self.model_fields_set
        for attribute, name in names.items():
            if attribute not in sent or (value := values[attribute]) is None:
                continue
            policy = special.get(name)
            if policy is None:
                if isinstance(value, Body | list):
                    inner += _bodies(value, prefix + name)
            elif any(_same(value, other) for other in policy.harmless):
                continue
            elif isinstance(policy, Refused):
                notes.refuse(prefix + name, policy.remedy)
            else:
                notes.ignore(prefix + name)
        for name, value in (self.__pydantic_extra__ or {}).items():
            if value is not None:
                notes.unknown(prefix + name[:80])
        for path, part in inner:
            part.settle(notes, f"{path}.")

    def note(self, scope: Scope, settings: ServerSettings) -> None:
        """Leave what the body says of its request itself, in its scope, for those who serve it."""


B = TypeVar("B", bound=Body)


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a field, null allowed."""
    about = {name: schema[name] for name in ("default", "title", "description") if name in schema}
    rest = {name: value for name, value in schema.items() if name not in about}
    null = {"type": "null"}
    choices = rest["anyOf"] if rest.keys() == {"anyOf"} else [rest]
    if not rest or any(choice == null or None in choice.get("enum", ()) for choice in choices):
        return schema
    return about | {"anyOf": [*choices, null]}


def _without_indices(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def _printable(path: str) -> str:
    return re.sub(r"[^!-~]|,", "?", path[:MAX_NAME_CHARS])


def _bodies(value: Any, path: str) -> Iterator[tuple[str, Body]]:
    if isinstance(value, Body):
        yield path, value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, Body):
                yield f"{path}[{i}]", item
            else:
                return  # a list of other things: there may be a million of them


def _same(value: Any, other: Any) -> bool:
    """By type too: 1 == True, but ``n: true`` is not ``n: 1``."""
    return type(value) is type(other) and bool(value == other)


@cache
def _names(body: type[Body]) -> dict[str, str]:
    """Attributes to the names that JSON has for them."""
    return {name: info.alias or name for name, info in body.model_fields.items()}


def field_names(body: type[Body]) -> list[str]:
    """The names of a body's fields, as JSON has them."""
    return list(_names(body).values())


@cache
def policies(body: type[Body]) -> dict[str, Advisory | Refused]:
    """The fields of a body that are not simply supported."""
    return {
        _names(body)[name]: policy
        for name, info in body.model_fields.items()
        for policy in info.metadata
        if isinstance(policy, Advisory | Refused)
    }


def body_at(kind: type[B], value: Any, path: str, notes: Notes) -> B:
    """One of a body's parts that is checked by hand, as ``kind``; raises APIError with ``path``."""
    if not isinstance(value, dict):
        raise bad_request(f"{path} must be an object", path, "invalid_value")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, path) from error
    body.settle(notes, f"{path}.")
    return body
