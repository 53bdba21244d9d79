"""Models: fetch and convert them once (store, gguf), then read config, RoPE tables and weights.

    store.py    name, hub id or path -> converted folder; the only part that talks to a network
    gguf.py     GGUF file -> tensors with Hugging Face names, and config.json
    config.py   config.json -> ModelConfig
    rope.py     ModelConfig -> cos and sin tables
    weights.py  safetensors -> tensors, each checked and each taken once

Everything that can be wrong with a model is a ModelError of one line.
"""
