"""Text and token ids: tokenizer, templates, turns, the parts of an answer."""
