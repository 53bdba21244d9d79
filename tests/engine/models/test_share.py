"""Shares of a model put together are the model."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.engine.models.config import ModelConfig, RopeConfig
from headstart.engine.models.parameters import AnyMatrix, LayerParameters, Matrix, Parameters
from headstart.engine.models.share import WHOLE, Share
from headstart.kernels.packing import pack_int8


def config_of(heads: int, kv_heads: int, inner: int, vocab: int) -> ModelConfig:
    fields = {field.name: None for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(
        **{  # type: ignore[arg-type]
            **fields,
            "vocab_size": vocab,
            "hidden_size": 8,
            "intermediate_size": inner,
            "num_layers": 2,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": 4,
            "rope": RopeConfig("default", 1e4, {}, 64),
        }
    )


def matrix(rows: int, columns: int, biased: bool, int8: bool) -> AnyMatrix:
    weight = torch.randn(rows, columns)
    bias = torch.randn(rows) if biased else None
    if int8:
        rounded = (weight * 40).clamp(-127, 127).to(torch.int8)
        return pack_int8(rounded, torch.rand(rows), bias)
    return Matrix(weight, bias)


def field_of(matrix: AnyMatrix, name: str) -> torch.Tensor | None:
    """Its weight, bias or scales as if it were not packed."""
    if isinstance(matrix, Matrix):
        return None if name == "scale" else getattr(matrix, name)
    if name == "scale":
        return matrix.scale[: matrix.out_features]
    return matrix.weight() if name == "weight" else matrix.bias


def parameters_of(config: ModelConfig, biased: bool, int8: bool) -> Parameters:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = [
        LayerParameters(
            torch.randn(hidden),
            matrix(q + 2 * kv, hidden, biased, int8),
            torch.randn(config.head_dim),
            torch.randn(config.head_dim),
            matrix(hidden, q, biased, int8),
            torch.randn(hidden),
            matrix(2 * inner, hidden, biased, int8),
            matrix(hidden, inner, biased, int8),
        )
        for _ in range(config.num_layers)
    ]
    embedding = torch.randn(config.vocab_size, hidden)
    head = matrix(config.vocab_size, hidden, False, int8)
    return Parameters(embedding, iter(layers), torch.randn(hidden), head)


@settings(max_examples=3 * settings.default.max_examples // 5)
@given(
    ranks=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    inner=st.integers(1, 4),
    vocab=st.integers(5, 23),
    biased=st.booleans(),
    int8=st.booleans(),
)
def test_shares_reassemble(
    ranks: int, kv_heads: int, group: int, inner: int, vocab: int, biased: bool, int8: bool
) -> None:
    inner *= 4 if int8 else 1  # what a rank reads is whole words
    config = config_of(ranks * kv_heads * group, ranks * kv_heads, ranks * inner, vocab)
    whole = parameters_of(config, biased, int8)
    layers = list(whole.layers)
    shares = [Share(rank, ranks) for rank in range(ranks)]
    parts = [
        share.parameters(dataclasses.replace(whole, layers=iter(layers)), config)
        for share in shares
    ]
    for share, part in zip(shares, parts, strict=True):
        own = share.config(config)
        assert (own.num_heads, own.num_kv_heads) == (kv_heads * group, kv_heads)
        assert part.embedding is whole.embedding
        assert len(field_of(part.head, "weight")) in (vocab // ranks, -(-vocab // ranks))
    heads = [field_of(part.head, "weight") for part in parts]
    assert torch.equal(torch.cat(heads), field_of(whole.head, "weight"))
    for layer, *pieces in zip(layers, *(part.layers for part in parts), strict=True):
        own = shares[0].config(config)
        q, kv = own.num_heads * own.head_dim, own.num_kv_heads * own.head_dim
        sizes = {"qkv": [q, kv, kv], "gate_up": [own.intermediate_size] * 2}
        for name, rows in sizes.items():
            for field in ("weight", "bias", "scale"):
                expected = field_of(getattr(layer, name), field)
                found = [field_of(getattr(piece, name), field) for piece in pieces]
                if expected is None:
                    assert found == [None] * ranks
                    continue
                splits = [torch.split(one, rows) for one in found]
                again = torch.cat([torch.cat(same) for same in zip(*splits, strict=True)])
                assert torch.equal(again, expected), (name, field)
        for name in ("o", "down"):
            expected = getattr(layer, name)
            found = [getattr(piece, name) for piece in pieces]
            columns = torch.cat([field_of(m, "weight") for m in found], dim=1)
            assert torch.equal(columns, field_of(expected, "weight"))
            if int8:
                scale = field_of(expected, "scale")
                assert all(torch.equal(field_of(m, "scale"), scale) for m in found)
            # The bias is added once.
            assert [m.bias is not None for m in found] == [biased] + [False] * (ranks - 1)
            assert not biased or torch.equal(found[0].bias, expected.bias)
        for name in ("input_norm", "q_norm", "k_norm", "post_norm"):
            assert all(getattr(piece, name) is getattr(layer, name) for piece in pieces)


def test_the_whole_is_not_copied() -> None:
    whole = parameters_of(config_of(4, 2, 8, 10), True, False)
    assert WHOLE.parameters(whole, config_of(4, 2, 8, 10)) is whole


def test_terms_of_a_sum() -> None:
    """What the decoder does with the pieces: rows through up and down, of two ranks and of one."""
    up, down, x = torch.randn(12, 8), torch.randn(8, 12), torch.randn(3, 8)
    bias = torch.randn(8)
    parts = []
    for rank in range(3):
        share = Share(rank, 3)
        piece = share.columns(Matrix(down, bias))
        y = x @ share.rows(Matrix(up), 12).weight.T @ piece.weight.T
        parts.append(y if piece.bias is None else y + piece.bias)
    torch.testing.assert_close(sum(parts), x @ up.T @ down.T + bias)


def test_spans_cover_everything_once() -> None:
    for size in range(12):
        for ranks in range(1, 8):
            ends = [Share(rank, ranks).span(size) for rank in range(ranks)]
            assert [i for first, end in ends for i in range(first, end)] == list(range(size))
