"""The APIs, a folder or a file per endpoint group."""
