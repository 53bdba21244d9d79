"""A model that answers with what it was given to say, so that an agent's loop of tools can be run.

A small model does not call the tools of an agent, and its context is too short for an agent's
prompt. This one is a Llama like any other, of one layer that adds nothing: each text that it may
say is one token of its vocabulary, and its weights say which token follows which. Its chat template
ends a prompt with the cue of a text: of a call if there is a tool that it may call, else of the
answer to what that tool said.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN = 256
INNER = 256
CONTEXT = 131072
CERTAIN = 8.0
"""Weight by which a token follows: with any temperature and filters, nothing else does."""

SUCCESS = "The file says forty-two."
FAILURE = "The file could not be read."
GREETING = "There is nothing to call."
NOTE = "forty-two"
"""What a file has to say, and a tool that reads it."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool that an agent is known by."""

    tool: str
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        call = {"name": self.tool, "arguments": self.arguments}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


TEMPLATE = """\
{%- if tools %}<|im_start|>system
Functions: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}A call is written <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% set results = messages | selectattr("role", "equalto", "tool") | list %}
{%- if results %}{{ SUCCESS if NOTE in results[-1].content else FAILURE }}
{%- else %}
{%- set cue = namespace(text=GREETING) %}
{%- for tool in tools or [] if tool.function.name in CALLS %}
{%- set cue.text = CALLS[tool.function.name] %}{% endfor %}{{ cue.text }}
{%- endif %}{% endif %}"""


def write_model(source: Path, target: Path, calls: list[Call]) -> None:
    """Write the folder of a model with ``source``'s tokenizer that makes these calls."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer_config.json", target / "tokenizer_config.json")
    kept = json.loads((source / "config.json").read_text())
    texts = [SUCCESS, FAILURE, GREETING, *(call.text for call in calls)]
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    cues = [f"<|cue_{i}|>" for i in range(len(texts))]
    tokenizer["added_tokens"] += [
        _added(first + i, token, special=i < len(cues)) for i, token in enumerate([*cues, *texts])
    ]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {call.tool: cue for call, cue in zip(calls, cues[3:], strict=True)}
    known = dict(zip(("SUCCESS", "FAILURE", "GREETING"), cues, strict=False))
    known |= {"NOTE": NOTE, "CALLS": names}
    head = "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in known.items())
    (target / "chat_template.jinja").write_text(head + TEMPLATE)
    vocabulary = -(-(first + 2 * len(texts)) // 64) * 64
    (target / "config.json").write_text(json.dumps(_config(kept, vocabulary)))
    follows = [(first + i, first + len(texts) + i) for i in range(len(texts))]
    follows += [(text, kept["eos_token_id"][0]) for _, text in follows]
    save_file(_tensors(vocabulary, follows), target / "model.safetensors")


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def _config(kept: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": INNER,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rope_theta": 1e5,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": kept["bos_token_id"],
        "eos_token_id": kept["eos_token_id"],
    }


def _tensors(vocabulary: int, follows: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Weights by which the second token of each pair follows the first; the layer adds nothing."""
    embedding, head = (np.zeros((vocabulary, HIDDEN), np.float32) for _ in range(2))
    for dimension, (token, following) in enumerate(follows):
        embedding[token, dimension] = 1
        head[following, dimension] = CERTAIN
    sizes = {
        "self_attn.q_proj": (256, HIDDEN),
        "self_attn.k_proj": (128, HIDDEN),
        "self_attn.v_proj": (128, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 256),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    layer = {f"model.layers.0.{name}.weight": np.zeros(x, np.float32) for name, x in sizes.items()}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    ones = {f"model.{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    return layer | ones | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
