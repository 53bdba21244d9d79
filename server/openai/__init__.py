"""The OpenAI API: request bodies, response bodies, one file per endpoint group."""
