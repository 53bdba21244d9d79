"""The Anthropic API: request and response bodies."""
