"""Token ids in, token ids out: scheduling, KV cache, model execution. Never text, never JSON."""
