"""The fields that say how a chat is rendered, wherever a chat may be sent."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from headstart.server.generation.structure import ObjectField
from headstart.server.http.errors import APIError, bad_request, refuse_extras
from headstart.server.http.policy import Body
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import ChatTemplate, Ending, Message

ObjectsField = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "object"}}, mode="validation")
]


class ChatRendering(Body):
    """``chat_template_kwargs``: variables of the template, scalars; ``documents``: what it is to
    write of, ``[{"title", "text"}]``; ``reasoning_effort``: a variable with a field of its own."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: ObjectField = None
    documents: ObjectsField = None
    reasoning_effort: str | None = None

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
        """What the template gets beside messages and tools; raises APIError for what it does not
        read, so that nothing is ignored."""
        found = self._checked_kwargs(template, settings)
        if self.reasoning_effort is not None:
            if "reasoning_effort" in found:
                raise bad_request(
                    "reasoning_effort is in chat_template_kwargs, too", "reasoning_effort"
                )
            if "reasoning_effort" not in template.variables:
                raise _not_read("reasoning_effort", "reasoning_effort", template)
            found["reasoning_effort"] = self.reasoning_effort
        if self.documents is not None and self.documents != []:
            found["documents"] = self._checked_documents(template, settings)
        return found

    def _checked_kwargs(self, template: ChatTemplate, settings: ServerSettings) -> dict[str, Any]:
        given, name = self.chat_template_kwargs, "chat_template_kwargs"
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise bad_request(f"{name} must be an object", name, "invalid_value")
        allowed, most = template.variables, settings.max_template_kwarg_chars
        for key, value in given.items():
            path = f"{name}.{key[:80]}"
            if key not in allowed:
                raise _not_read(key[:80], path, template)
            if not isinstance(value, str | int | float | None):
                raise bad_request(f"{path} must be a string, a number, a boolean or null", path)
            if len(str(value)) > most:
                raise bad_request(f"{path} is longer than {most} characters", path)
        return dict(given)

    def _checked_documents(
        self, template: ChatTemplate, settings: ServerSettings
    ) -> list[dict[str, str]]:
        documents = self.documents
        if not template.reads_documents:
            raise bad_request(
                "the model's chat template reads no documents", "documents", "unsupported_parameter"
            )
        if not isinstance(documents, list):
            raise bad_request("documents must be a list of objects", "documents", "invalid_value")
        if len(documents) > settings.max_documents:
            raise bad_request(
                f"documents has {len(documents)} entries; at most {settings.max_documents} are "
                "allowed",
                "documents",
            )
        for i, document in enumerate(documents):
            path = f"documents[{i}]"
            if not isinstance(document, dict) or not all(
                isinstance(value, str) for value in document.values()
            ):
                raise bad_request(f"{path} must be an object of strings", path, "invalid_value")
            refuse_extras(document, {}, f"{path}.", known=("title", "text"))
            if "text" not in document:
                raise bad_request(f"{path}.text is required", f"{path}.text")
        return documents


def _not_read(name: str, path: str, template: ChatTemplate) -> APIError:
    names = ", ".join(map(repr, template.variables))
    return bad_request(
        f"the model's chat template does not read {name!r}; "
        + (f"it reads {names}" if names else "it reads no variables"),
        path,
        "unsupported_parameter",
    )
