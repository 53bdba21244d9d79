"""Models: fetch and convert them once (store, gguf), then read config, RoPE tables and weights.

    store.py    name, hub id or path -> converted folder; the only part that talks to a network
    files/      what is on the disk: safetensors, GGUF, tokenizers
    formats/    what weights are computed in: which one, how it is made, how good it is
    config.py   config.json -> ModelConfig
    rope.py     ModelConfig -> cos and sin tables

Everything that can be wrong with a model is a ModelError of one line.
"""
