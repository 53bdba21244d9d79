"""Layers as data: the dense layers that a decoder layer has, by number."""

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741
MATRICES = 4
"""Dense layers of a decoder layer that adapters change, in this order: layer i's matrix m is
number i * MATRICES + m of an adapter's weights."""
