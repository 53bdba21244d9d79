"""The tables of request fields leave nothing out that OpenAI's client or vLLM can send."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartRefusalParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionCustomToolParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageCustomToolCallParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_custom_tool_param import Custom
from openai.types.shared_params import (
    FunctionDefinition,
    ResponseFormatJSONSchema,
    ResponseFormatText,
)
from openai.types.shared_params.response_format_json_schema import JSONSchema

from headstart.server.api.field_table import SECTIONS
from headstart.server.http.policy import field_names

# vLLM's StructuredOutputsParams.
VLLM_STRUCTURED = """
    json regex choice grammar json_object disable_fallback disable_any_whitespace
    disable_additional_properties whitespace_pattern structural_tag
"""
# vLLM's ChatCompletionRequest and CompletionRequest, as of the autumn of 2026.
VLLM_IN_BOTH = """
    add_special_tokens allowed_token_ids bad_words cache_salt echo frequency_penalty ignore_eos
    include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids
    logprobs max_tokens min_p min_tokens model n presence_penalty priority prompt_logprobs
    repetition_detection repetition_penalty request_id response_format return_token_ids
    return_tokens_as_token_ids seed session_id skip_special_tokens spaces_between_special_tokens
    stop stop_token_ids stream stream_options structured_outputs temperature top_k top_p
    truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
"""
VLLM_IN_CHAT = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents
    include_reasoning max_completion_tokens media_io_kwargs messages mm_processor_kwargs
    parallel_tool_calls reasoning_effort return_prompt_text thinking_token_budget tool_choice tools
    top_logprobs
"""
VLLM_IN_COMPLETIONS = "prompt prompt_embeds suffix"


def in_table(title: str) -> set[str]:
    [body] = [body for name, body in SECTIONS if name == title]
    return set(field_names(body))


def of_client(params: Any) -> set[str]:
    return set(typing.get_type_hints(params))


@pytest.mark.parametrize(
    ("title", "params"),
    [
        ("/v1/chat/completions", chat_create_params.CompletionCreateParamsStreaming),
        ("/v1/completions", completion_create_params.CompletionCreateParamsStreaming),
        ("/v1/embeddings", embedding_create_params.EmbeddingCreateParams),
        ("messages[]", ChatCompletionUserMessageParam),
        ("messages[]", ChatCompletionAssistantMessageParam),
        ("messages[]", ChatCompletionToolMessageParam),
        ("messages[].content[], text", ChatCompletionContentPartTextParam),
        ("messages[].content[], refusal", ChatCompletionContentPartRefusalParam),
        ("messages[].tool_calls[]", ChatCompletionMessageFunctionToolCallParam),
        ("messages[].tool_calls[]", ChatCompletionMessageCustomToolCallParam),
        ("tools[]", ChatCompletionFunctionToolParam),
        ("tools[]", ChatCompletionCustomToolParam),
        ("tools[].function", FunctionDefinition),
        ("tools[].custom", Custom),
        ("response_format", ResponseFormatText),
        ("response_format", ResponseFormatJSONSchema),
        ("response_format.json_schema", JSONSchema),
    ],
)
def test_every_field_of_the_official_client(title: str, params: Any) -> None:
    assert of_client(params) - in_table(title) == set()


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("/v1/chat/completions", (VLLM_IN_BOTH + VLLM_IN_CHAT).split()),
        ("/v1/completions", (VLLM_IN_BOTH + VLLM_IN_COMPLETIONS).split()),
        ("structured_outputs", VLLM_STRUCTURED.split()),
    ],
)
def test_every_field_of_vllm(title: str, fields: list[str]) -> None:
    assert set(fields) - in_table(title) == set()
