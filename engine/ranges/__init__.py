"""Which KV ranges a step reads: one emitter a file."""
