"""Request fields that several endpoints have, and what they mean to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema
from starlette.types import Scope

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import MAX_LOGPROBS, SamplingParams
from headstart.server.api.choices.shown import Shown
from headstart.server.generation.start import SEED_RANGE, choice_seed
from headstart.server.generation.structure import (
    AnyField,
    ResponseFormat,
    Structure,
    StructuredOutputs,
    guided_structure,
)
from headstart.server.http.access_log import REQUEST_ID_PATTERN, name_request
from headstart.server.http.cache_scope import ExplainedBody
from headstart.server.http.deadline import Watch
from headstart.server.http.errors import ContextLengthError, bad_request
from headstart.server.http.ledger import TimedBody
from headstart.server.http.policy import Advisory, Body, Refused
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.text.assembler import TextOptions
from headstart.server.text.tokenizer import Tokenizer

INT32_MAX = 2**31 - 1

Ignored = Annotated[Any, Advisory()]
"""A field that cannot change which tokens are right."""


class Described(Body):
    """What describes the caller, or asks where and for how much a hosted service computes."""

    metadata: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    session_id: Ignored = None
    user: Ignored = None
    service_tier: Annotated[Any, Advisory(harmless=("auto", "default"))] = None
    store: Annotated[Any, Advisory(harmless=(False,))] = None
    moderation: Ignored = None


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_progress: bool | None = None
    include_obfuscation: Ignored = None


StopField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        mode="validation",
    ),
]
LogitBiasField = Annotated[
    Any,
    WithJsonSchema(
        {"type": "object", "additionalProperties": {"type": "number"}}, mode="validation"
    ),
]
TokenIdsField = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "integer"}}, mode="validation")
]
StringsField = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "string"}}, mode="validation")
]


ContentField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        mode="validation",
    ),
]


NO_LIMIT = -1
"""As ``max_tokens``: as many as there is room for."""
MaxTokens = Annotated[int, Field(ge=NO_LIMIT)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Truncation = Annotated[int, Field(ge=-1, le=INT32_MAX)]


class GenerationBody(Described, TimedBody, ExplainedBody):
    """What chat and text completions have in common. ``null`` always means: the default.

    Fields typed Any are checked here, entry by entry, stopping at the first fault: pydantic would
    collect one error for each of a million entries.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: StopField = None
    stop_token_ids: TokenIdsField = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    bad_words: StringsField = None
    allowed_token_ids: TokenIdsField = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    prompt_logprobs: LogprobCount | None = None
    max_tokens: MaxTokens | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Field(ge=-SEED_RANGE, lt=SEED_RANGE)] | None = None
    logit_bias: LogitBiasField = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: AnyField = None
    guided_regex: str | None = None
    guided_choice: StringsField = None
    guided_grammar: str | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX - 1, le=INT32_MAX)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=f"^{REQUEST_ID_PATTERN}$")] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    ec_transfer_params: Ignored = None
    kv_transfer_params: Ignored = None
    vllm_xargs: Ignored = None
    length_penalty: Annotated[Any, Refused(harmless=(1, 1.0))] = None
    logits_processors: Annotated[Any, Refused("see logit_bias", harmless=([],))] = None
    logprob_token_ids: Annotated[Any, Refused()] = None
    repetition_detection: Annotated[Any, Refused()] = None
    return_prompt_text: Annotated[Any, Refused("see echo", harmless=(False,))] = None
    spaces_between_special_tokens: Annotated[Any, Refused(harmless=(True,))] = None
    truncation_side: Annotated[
        Any, Refused("prompts are cut at their beginning", harmless=("left",))
    ] = None
    use_beam_search: Annotated[Any, Refused("see n and best_of", harmless=(False,))] = None
    watermarking: Annotated[Any, Refused(harmless=(False,))] = None

    def note(self, scope: Scope, settings: ServerSettings) -> None:
        super().note(scope, settings)
        Watch.of(scope).limit(self.timeout)
        if self.request_id is not None:
            name_request(scope, self.request_id)

    def check(self, settings: ServerSettings) -> None:
        """Raise APIError for fields that do not go together, and limits passed."""
        if self.stream_options is not None:
            if not self.stream:
                raise bad_request("stream_options needs stream: true", "stream_options")
            if self.stream_options.continuous_usage_stats and not self.include_usage:
                raise bad_request(
                    "continuous_usage_stats needs include_usage: true",
                    "stream_options.continuous_usage_stats",
                )
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request(
                "prompt_logprobs are not available when stream=True", "prompt_logprobs"
            )
        if (self.n or 1) > settings.max_n:
            raise bad_request(f"n must be at most {settings.max_n}, got {self.n}", "n")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each of the prompt, if any are."""
        return self.prompt_logprobs

    @property
    def shown(self) -> Shown:
        """What of the answer the client asked to see."""
        options = self.stream_options
        return Shown(
            usage=self.include_usage,
            continuous_usage=bool(options and options.continuous_usage_stats),
            token_ids=bool(self.return_token_ids),
            tokens_as_ids=bool(self.return_tokens_as_token_ids),
            request_id=self.request_id,
        )

    def stops(self, settings: ServerSettings) -> tuple[str, ...]:
        """The stop strings; raises APIError."""
        return checked_stops(self.stop, "stop", settings)

    def text_options(self, settings: ServerSettings) -> TextOptions:
        """How tokens become the answer's text; raises APIError."""
        return TextOptions(
            stops=self.stops(settings),
            stop_token_ids=self._stop_token_ids(settings),
            include_stop=bool(self.include_stop_str_in_output),
            min_tokens=self.min_tokens or 0,
            skip_special_tokens=self.skip_special_tokens is not False,
        )

    def truncated(
        self, max_tokens: int | None, model: ModelInfo, token_ids: Sequence[int], spans: bool
    ) -> Sequence[int]:
        """The end of a prompt, if ``truncate_prompt_tokens`` asks for it. -1: as much as leaves
        room for the answer. ``spans``: the prompt has some, whose places would be lost."""
        if self.truncate_prompt_tokens is not None and spans:
            raise bad_request(
                "truncate_prompt_tokens and segment_mask cannot be combined",
                "truncate_prompt_tokens",
            )
        fits = max_tokens is not None and 0 < max_tokens < model.max_model_len
        room = model.max_model_len - (max_tokens if max_tokens and fits else 1)
        return truncated(token_ids, self.truncate_prompt_tokens, room)

    def structure(self, settings: ServerSettings) -> Structure | None:
        """What the answer has to follow; raises APIError."""
        found: list[Structure] = []
        if self.structured_outputs is not None:
            found += self.structured_outputs.structures("structured_outputs", settings)
        if self.response_format is not None:
            asked = self.response_format.structure("response_format", settings)
            found += [asked] if asked else []
        for kind in ("json", "regex", "choice", "grammar"):
            field = f"guided_{kind}"
            if (value := getattr(self, field)) is not None:
                found.append(guided_structure(kind, value, field, settings))
        if len(found) > 1:
            first, second = (structure.path for structure in found[:2])
            raise bad_request(f"{first} and {second} cannot be combined", second)
        return found[0] if found else None

    def sampling_params(
        self,
        max_tokens: int,
        logprobs: int | None,
        model: ModelInfo,
        runtime: Runtime,
        grammar: str | None,
    ) -> SamplingParams:
        """The engine's view of the request; raises RequestError or APIError."""
        settings = runtime.settings
        chosen = runtime.defaults.over(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        params = chosen.params(
            max_tokens=max_tokens,
            presence_penalty=_or_default(self.presence_penalty, 0.0),
            frequency_penalty=_or_default(self.frequency_penalty, 0.0),
            logit_bias=self._logit_bias(settings),
            seed=None if self.seed is None else choice_seed(self.seed, 0),
            logprobs=logprobs,
            prompt_logprobs=self.scored,
            prompt_progress=bool(self.stream_options and self.stream_options.include_progress),
            stop_token_ids=self._stop_token_ids(settings),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            bad_words=self._bad_words(settings, runtime.tokenizer),
            allowed_token_ids=self._token_ids("allowed_token_ids", settings.max_allowed_token_ids),
            grammar=grammar,
        )
        params.validate(model.vocab_size)
        return params

    def _stop_token_ids(self, settings: ServerSettings) -> tuple[int, ...]:
        return self._token_ids("stop_token_ids", settings.max_stop_token_ids) or ()

    def _logit_bias(self, settings: ServerSettings) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, dict):
            raise bad_request("logit_bias must be an object", "logit_bias")
        if len(self.logit_bias) > settings.max_logit_bias:
            raise bad_request(
                f"logit_bias has {len(self.logit_bias)} entries; at most "
                f"{settings.max_logit_bias} are allowed",
                "logit_bias",
            )
        biases: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise bad_request(f"logit_bias: {key[:40]!r} is not a token id", "logit_bias")
            if not is_number(value) or abs(value) > 100:
                path = f"logit_bias.{key}"
                raise bad_request(f"{path} must be a number in [-100, 100]", path)
            biases[int(key)] = float(value)
        return biases or None

    def _token_ids(self, field: str, most: int) -> tuple[int, ...] | None:
        ids = getattr(self, field)
        if ids is None:
            return None
        if isinstance(ids, list) and len(ids) > most:
            raise bad_request(f"{field} has {len(ids)} entries; at most {most} are allowed", field)
        if not isinstance(ids, list) or not all(map(is_token_id, ids)):
            raise bad_request(f"{field} must be a list of token ids", field)
        return tuple(ids)

    def _bad_words(
        self, settings: ServerSettings, tokenizer: Tokenizer
    ) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, as it is at the beginning of a text and behind a space."""
        words = self.bad_words
        if words is None:
            return ()
        if not isinstance(words, list):
            raise bad_request("bad_words must be a list of strings", "bad_words")
        most, chars = settings.max_bad_words, settings.max_bad_word_chars
        if len(words) > most:
            raise bad_request(
                f"bad_words has {len(words)} strings; at most {most} are allowed", "bad_words"
            )
        found: dict[tuple[int, ...], None] = {}
        for i, word in enumerate(words):
            path = f"bad_words[{i}]"
            if not isinstance(word, str):
                raise bad_request(f"{path} must be a string", path)
            if not word.strip() or len(word) > chars:
                raise bad_request(
                    f"{path} must have 1 to {chars} characters that are not all spaces", path
                )
            for form in (word, " " + word.lstrip()):
                found[tuple(tokenizer.encode(form, add_special_tokens=False))] = None
        return tuple(found)


def truncated(token_ids: Sequence[int], most: int | None, room: int) -> Sequence[int]:
    """The last ``most`` of a prompt's ids, of which ``room`` fit; -1: as many as do."""
    if most == 0:
        raise bad_request(
            "truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens"
        )
    return token_ids if most is None else token_ids[-(room if most == -1 else most) :]


def checked_stops(value: Any, name: str, settings: ServerSettings) -> tuple[str, ...]:
    """The stop strings of the field ``name``; raises APIError."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise bad_request(f"{name} must be a string or a list of strings", name)
    if len(stops) > settings.max_stop:
        raise bad_request(
            f"{name} has {len(stops)} strings; at most {settings.max_stop} are allowed", name
        )
    for i, stop in enumerate(stops):
        path = name if isinstance(value, str) else f"{name}[{i}]"
        if not isinstance(stop, str):
            raise bad_request(f"{path} must be a string", path)
        if not 1 <= len(stop) <= settings.max_stop_chars:
            raise bad_request(
                f"{path} must have 1 to {settings.max_stop_chars} characters, not {len(stop)}",
                path,
            )
    return tuple(stops)


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= INT32_MAX


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


def fit_max_tokens(
    num_prompt: int,
    max_tokens: int | None,
    model: ModelInfo,
    *,
    param: str,
    prompt_param: str,
    default: int | None = None,
) -> int:
    """``max_tokens``, or all the room that is left when that is less. None and -1 are ``default``.
    Raises APIError when there is no room at all, and for no tokens."""
    if max_tokens is not None and max_tokens < 1 and max_tokens != NO_LIMIT:
        raise bad_request(
            f"{param} must be at least 1, or -1 for as many as there is room for", param
        )
    room = model.max_model_len - num_prompt
    if room < 1:
        raise ContextLengthError(num_prompt, model.max_model_len, prompt_param)
    wanted = default if max_tokens in (None, NO_LIMIT) else max_tokens
    return room if wanted is None else min(room, wanted)
