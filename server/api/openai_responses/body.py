"""The bodies of /v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.fields import (
    Described,
    Ignored,
    LogprobCount,
    StreamOptions,
    fit_max_tokens,
)
from headstart.server.api.openai_responses.tools import ToolChoiceField
from headstart.server.api.tools import ToolsField
from headstart.server.generation.defaults import GenerationDefaults
from headstart.server.generation.structure import Structure, json_structure
from headstart.server.http.cache_scope import ExplainedBody
from headstart.server.http.ledger import TimedBody
from headstart.server.http.policy import Advisory, Body, Notes, Refused, body_at
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import ChatTemplate

LOGPROBS = "message.output_text.logprobs"

InputField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        mode="validation",
    ),
]
ConversationField = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}, mode="validation"),
]


def _few(value: Any) -> Any:
    # Before they are looked at: there would be an error for each of a million.
    if isinstance(value, dict) and len(value) > 16:
        raise ValueError(f"there are {len(value)} entries; at most 16 are allowed")
    return value


Metadata = Annotated[
    dict[str, Annotated[str, Field(max_length=512)]], BeforeValidator(_few), Field(max_length=16)
]


class ReasoningBody(Body):
    """``effort`` is the template's variable ``reasoning_effort``."""

    effort: str | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Annotated[Any, Advisory(harmless=("auto",))] = None
    mode: Annotated[Any, Advisory(harmless=("standard",))] = None


class FormatBody(Body):
    """What the answer's text has to follow."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Any = Field(default=None, alias="schema")
    strict: bool | None = None


class TextBody(Body):
    format: FormatBody | None = None
    verbosity: Annotated[Any, Advisory(harmless=("medium",))] = None


class ConversationBody(Body):
    id: str


class PromptBody(Body):
    """What a prompt is made of. ``input`` may be missing where there is a conversation to answer.
    ``truncation``: "auto" drops the oldest turns of a prompt that does not fit."""

    input: InputField = None
    instructions: str | None = None
    tools: ToolsField = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    previous_response_id: str | None = None
    conversation: ConversationField = None
    truncation: Literal["auto", "disabled"] | None = None

    def structure(self, settings: ServerSettings) -> Structure | None:
        """What the answer has to follow; raises APIError."""
        asked, path = self.text.format if self.text is not None else None, "text.format"
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return json_structure({"type": "object"}, path, settings)
        return json_structure(asked.schema_, f"{path}.schema", settings)

    def variables(self, template: ChatTemplate) -> dict[str, Any]:
        """What the template gets beside messages and tools."""
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is None:
            return {}
        if "reasoning_effort" not in template.variables:
            self.notes.ignore("reasoning.effort")
            return {}
        return {"reasoning_effort": effort}

    def conversation_id(self) -> str | None:
        """Raises APIError."""
        if self.conversation is None or isinstance(self.conversation, str):
            return self.conversation
        return body_at(ConversationBody, self.conversation, "conversation", self.notes).id


class CountBody(PromptBody):
    model: str | None = None
    personality: Ignored = None


class ResponsesBody(PromptBody, Described, TimedBody, ExplainedBody):
    """``include``: log-probabilities are shown, and the rest is ignored."""

    model: str
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: LogprobCount | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    access_programs: Ignored = None
    background_options: Ignored = None
    client_metadata: Ignored = None
    context_management: Ignored = None
    image: Ignored = None
    max_tool_calls: Ignored = None
    background: Annotated[
        Any, Refused("leave it out, and wait for the answer or stream it", harmless=(False,))
    ] = None
    prompt: Annotated[Any, Refused("send its text as instructions and input")] = None

    def settle(self, notes: Notes, prefix: str = "") -> None:
        super().settle(notes, prefix)
        for name in self.include or ():
            if name != LOGPROBS:
                notes.ignore(f"include={name[:80]}")
        if self.top_logprobs and not self.shows_logprobs:
            notes.ignore("top_logprobs")

    @property
    def shows_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def chosen(self, defaults: GenerationDefaults) -> GenerationDefaults:
        """How tokens are chosen: as asked for, else by ``defaults``."""
        return defaults.over(temperature=self.temperature, top_p=self.top_p)

    def params(
        self, defaults: GenerationDefaults, model: ModelInfo, num_prompt: int, grammar: str | None
    ) -> SamplingParams:
        """The engine's view of the request; raises RequestError."""
        params = self.chosen(defaults).params(
            max_tokens=fit_max_tokens(
                num_prompt,
                self.max_output_tokens,
                model,
                param="max_output_tokens",
                prompt_param="input",
                default=defaults.max_tokens,
            ),
            logprobs=(self.top_logprobs or 0) if self.shows_logprobs else None,
            grammar=grammar,
        )
        params.validate(model.vocab_size)
        return params

    def head(self, model: str, defaults: GenerationDefaults) -> dict[str, Any]:
        """The fields of the answer that are known before it, most of them the request's."""
        reasoning, chosen, conversation = self.reasoning, self.chosen(defaults), self.conversation
        text = self.text.model_dump(by_alias=True, exclude_unset=True) if self.text else {}
        head = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "model": model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.store is not False,
            "temperature": chosen.temperature,
            "text": text | {"format": text.get("format") or {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if chosen.top_p is None else chosen.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }
        if conversation is not None:
            head["conversation"] = {"id": self.conversation_id()}
        return head
