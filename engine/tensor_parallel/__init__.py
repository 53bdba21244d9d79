"""Tensor parallelism: N processes with 1/N of each layer compute every batch together.

leader.py is rank 0, the engine's process; follower.py are the others; collective.py is where their
numbers meet; messages.py is what rank 0 tells them.
"""
