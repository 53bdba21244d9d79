"""The tables of request fields leave nothing out that OpenAI's client or vLLM can send."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from headstart.server.api.field_table import SECTIONS

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
    [(_, body, refused, descriptive)] = [each for each in SECTIONS if each[0] == title]
    return {*body.model_fields, *refused, *descriptive}


def of_client(params: Any) -> set[str]:
    return set(typing.get_type_hints(params))


@pytest.mark.parametrize(
    ("title", "params"),
    [
        ("/v1/chat/completions", chat_create_params.CompletionCreateParamsStreaming),
        ("/v1/completions", completion_create_params.CompletionCreateParamsStreaming),
        ("/v1/embeddings", embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_every_field_of_the_official_client(title: str, params: Any) -> None:
    assert of_client(params) - in_table(title) == set()


@pytest.mark.parametrize(
    ("title", "fields"),
    [
        ("/v1/chat/completions", (VLLM_IN_BOTH + VLLM_IN_CHAT).split()),
        ("/v1/completions", (VLLM_IN_BOTH + VLLM_IN_COMPLETIONS).split()),
    ],
)
def test_every_field_of_vllm(title: str, fields: list[str]) -> None:
    assert set(fields) - in_table(title) == set()
