"""The fields that say how a chat is rendered, wherever a chat may be sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import WithJsonSchema

from headstart.server.api.fields import Ignored
from headstart.server.generation.structure import ObjectField
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Body, body_at
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import ChatTemplate, Ending, Message

DocumentsField = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"title": {"type": "string"}, "text": {"type": "string"}},
                "required": ["text"],
            },
        },
        mode="validation",
    ),
]

OTHERWISE = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of templates that are fields of the body."""


class Document(Body):
    title: str | None = None
    text: str


class ReasoningOptions(Body):
    """OpenRouter's object. ``exclude``: the reasoning is not shown."""

    effort: str | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: Ignored = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ChatRendering(Body):
    """``chat_template_kwargs``: variables of the template, scalars; ``documents``: what it is to
    write of, ``[{"title", "text"}]``; ``reasoning_effort``, ``enable_thinking``: variables with
    fields of their own, which ``reasoning`` may hold, too."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: ObjectField = None
    documents: DocumentsField = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    reasoning: ReasoningOptions | None = None

    def ending(self, messages: list[Message]) -> Ending:
        """How the chat ends; raises APIError."""
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise bad_request(
                    "continue_final_message and add_generation_prompt cannot both be true",
                    "continue_final_message",
                )
            if messages[-1]["role"] != "assistant":
                raise bad_request(
                    "continue_final_message needs a last message that is the assistant's",
                    "continue_final_message",
                )
            return "continued"
        return "closed" if self.add_generation_prompt is False else "opened"

    def variables(self, template: ChatTemplate, settings: ServerSettings) -> dict[str, Any]:
        """What the template gets beside messages and tools; raises APIError. Those that it does not
        read are ignored: they cannot change what it writes."""
        found = self._checked_kwargs(template, settings)
        given = set(found)
        for path, name, value in self._named_variables():
            if name not in template.variables:
                self.notes.ignore(path)
            elif name in given:
                raise bad_request(f"{path} is in chat_template_kwargs, too", path)
            elif name in found:
                self.notes.ignore(path)
            else:
                found[name] = value
        if self.documents is not None and self.documents != []:
            found["documents"] = self._checked_documents(template, settings)
        return found

    def _named_variables(self) -> Iterator[tuple[str, str, Any]]:
        """Path, variable, value of those that have fields of their own; a variable's first one
        counts."""
        asked = self.reasoning or ReasoningOptions()
        for path, name, value in (
            ("reasoning_effort", "reasoning_effort", self.reasoning_effort),
            ("reasoning.effort", "reasoning_effort", asked.effort),
            ("enable_thinking", "enable_thinking", self.enable_thinking),
            ("reasoning.enabled", "enable_thinking", asked.enabled),
        ):
            if value is not None:
                yield path, name, value

    def _checked_kwargs(self, template: ChatTemplate, settings: ServerSettings) -> dict[str, Any]:
        given, name = self.chat_template_kwargs, "chat_template_kwargs"
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise bad_request(f"{name} must be an object", name, "invalid_value")
        read, most = template.variables, settings.max_template_kwarg_chars
        found: dict[str, Any] = {}
        for key, value in given.items():
            path = f"{name}.{key[:80]}"
            if key in OTHERWISE and value is not None:
                raise bad_request(
                    f"{path} is not supported: use the field {key}", path, "unsupported_parameter"
                )
            if key not in read:
                self.notes.ignore(path)
                continue
            if not isinstance(value, str | int | float | None):
                raise bad_request(f"{path} must be a string, a number, a boolean or null", path)
            if len(str(value)) > most:
                raise bad_request(f"{path} is longer than {most} characters", path)
            found[key] = value
        return found

    def _checked_documents(
        self, template: ChatTemplate, settings: ServerSettings
    ) -> list[dict[str, str]]:
        documents = self.documents
        if not template.reads_documents:
            raise bad_request(
                "the model's chat template reads no documents: put them into a message",
                "documents",
                "unsupported_parameter",
            )
        if not isinstance(documents, list):
            raise bad_request("documents must be a list of objects", "documents", "invalid_value")
        if len(documents) > settings.max_documents:
            raise bad_request(
                f"documents has {len(documents)} entries; at most {settings.max_documents} are "
                "allowed",
                "documents",
            )
        found = []
        for i, given in enumerate(documents):
            document = body_at(Document, given, f"documents[{i}]", self.notes)
            title = {} if document.title is None else {"title": document.title}
            found.append({**title, "text": document.text})
        return found
