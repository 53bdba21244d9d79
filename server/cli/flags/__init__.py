"""The flags of the ``headstart`` command, a file per topic; ``settings`` is what they make."""
