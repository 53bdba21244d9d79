"""cos and sin tables of rotary position embeddings, for every variant transformers knows here.

Frequencies come from transformers' own functions, so that they are equal to the last bit; cosines
and sines are the nearest float32 numbers, on every machine. One table serves the whole life of an
engine, because keys stay in the cache already rotated:

longrope  has two sets of factors. transformers picks one per forward pass by the longest sequence
          in it, long when that exceeds the original length, and so reads keys rotated with the
          short factors through long ones once a sequence grows past the border. Here the choice
          is made once, by ``max_len``: what transformers does for a sequence of that length.
          (vLLM decides in the same way.) Start the engine with max_model_len at most the
          original length to get the short factors.
dynamic   rescales all frequencies as a sequence grows, which cached keys cannot follow. Up to
          ``max_position_embeddings`` it equals "default"; beyond, it is refused.
"""

from typing import Any

import torch

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig, RopeConfig


def rope_tables(config: ModelConfig, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0 to max_len - 1: float32 [max_len, head_dim / 2] each.

    Both include the attention scaling of yarn and longrope. Element i of a row belongs to the
    pair of dimensions (i, i + head_dim / 2). Raises ModelError for settings that cannot work.
    """
    rope = config.rope
    if rope.type == "dynamic" and max_len > rope.max_position_embeddings:
        raise ModelError(
            f"dynamic RoPE scaling beyond {rope.max_position_embeddings} tokens is not supported: "
            f"lower the maximum model length from {max_len}"
        )
    if rope.type in ("default", "dynamic"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        # In float64 and rounded, as the cosines below: torch's float32 ones depend on the
        # instruction set in the last bit.
        inv_freq, scaling = 1.0 / (rope.theta ** exponents.double()).float(), 1.0
    else:
        inv_freq, scaling = _scaled_frequencies(config, rope, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
    cos, sin = (table.float() for table in (angles.double().cos(), angles.double().sin()))
    return cos * scaling, sin * scaling


def _scaled_frequencies(
    config: ModelConfig, rope: RopeConfig, max_len: int
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] and attention scaling by transformers' function."""
    # Only scaled variants pay for this import (1 s).
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings: dict[str, Any] = {"rope_type": rope.type, **rope.parameters}
    try:
        # The older spelling is understood by transformers 4 and 5.
        hf_config = LlamaConfig(
            hidden_size=config.head_dim * config.num_heads,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=rope.max_position_embeddings,
            rope_theta=rope.theta,
            rope_scaling=settings,
        )
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope.type](
            hf_config, torch.device("cpu"), seq_len=max_len
        )
    except Exception as error:  # transformers checks settings with exceptions of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"RoPE settings of type {rope.type} cannot be used: {reason}") from error
    if inv_freq.shape != (config.head_dim // 2,) or not bool(inv_freq.isfinite().all()):
        raise ModelError(
            f"RoPE settings of type {rope.type} do not give {config.head_dim // 2} frequencies"
        )
    return inv_freq.float(), float(scaling)
