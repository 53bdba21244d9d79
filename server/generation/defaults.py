"""GenerationDefaults: how tokens are chosen where a request does not say.

The makers of a model put what they recommend into its ``generation_config.json``:

    temperature  top_k  top_p  min_p  repetition_penalty  max_new_tokens

A request's own fields stand above these. Other fields of the file change nothing here, but for
``eos_token_id``, which the engine reads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from headstart.engine.errors import ModelError, RequestError
from headstart.engine.models.config import read_json
from headstart.engine.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """OpenAI's, unless a model says otherwise. ``max_tokens``: None is all the room left."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Those of a ``generation_config.json``; raises ModelError naming file and field."""
        raw = read_json(path)
        found: dict[str, Any] = {}
        for field in (one.name for one in fields(cls)):
            name = "max_new_tokens" if field == "max_tokens" else field
            value = raw.get(name)
            if value is None:
                continue
            whole = field in ("top_k", "max_tokens")
            if type(value) is not int and (whole or type(value) is not float):
                kind = "an integer" if whole else "a number"
                raise ModelError(f"{path}: {name} must be {kind}, got {value!r}")
            found[field] = value
        defaults = cls().over(**found)
        try:
            defaults.params(max_tokens=found.get("max_tokens", 1)).validate(vocab_size=0)
        except RequestError as error:
            raise ModelError(f"{path}: {error}") from error
        if defaults.max_tokens == 0:
            raise ModelError(f"{path}: max_new_tokens must be at least 1")
        return defaults

    def over(self, **given: Any) -> Self:
        """With what is given in place of it; None is not given, a ``top_k`` below 1 none, and
        a ``top_p`` of 0 greedy."""
        changed = {name: value for name, value in given.items() if value is not None}
        if changed.get("top_k", 1) < 1:
            changed["top_k"] = None
        if changed.get("top_p") == 0:  # nothing but the likeliest token
            changed |= {"temperature": 0.0, "top_p": None}
        return replace(self, **changed)

    def params(self, *, max_tokens: int, **others: Any) -> SamplingParams:
        """For the engine; ``others``: further fields of it."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            **others,
        )

    def __str__(self) -> str:
        neutral = asdict(OPENAI)
        own = {name: value for name, value in asdict(self).items() if value != neutral[name]}
        return ", ".join(f"{name} {value}" for name, value in own.items()) or "OpenAI's"


OPENAI = GenerationDefaults()
