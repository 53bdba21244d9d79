"""The `headstart` command."""
