"""NVIDIA GPUs: the operations of Backend in Triton. Nothing here is imported unless asked for."""
