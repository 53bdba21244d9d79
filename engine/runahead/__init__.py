"""KV-Runahead (arXiv 2405.05329): one prompt's prefill on several machines.

Each rank of a chain computes one chunk of the prompt and passes keys and values on, layer by layer.
The last rank is the engine that serves: it ends with all of them, and decodes alone.
"""
