"""The exceptions headstart raises on purpose.

HeadstartError                 message is one line a user can act on; the CLI prints it and exits 1
├── ConfigError                a flag or setting that cannot work
├── ModelError                 a model that cannot be fetched, read or run
├── RankError                  a process that computes with this one ended; neither can go on
├── RequestError               this request cannot be served (HTTP 400); others are unaffected
└── EngineDeadError            the engine process ended while the request was running (HTTP 503)
"""


class HeadstartError(Exception):
    """Base of every error headstart raises on purpose; its message is one line."""


class ConfigError(HeadstartError):
    """A flag or setting that cannot work on this machine or with this model."""


class ModelError(HeadstartError):
    """A model that cannot be fetched, read or run; the message names the file or tensor."""


class RankError(HeadstartError):
    """A process of --tensor-parallel ended, hangs or cannot start: this one has to end as well."""


class RequestError(HeadstartError):
    """A request that cannot be served as asked.

    ``param`` is the name of the API field at fault, when there is one. ``quote``: the end of the
    message, where it may repeat the request's text; ``message`` is what comes before, for logs.
    """

    def __init__(self, message: str, param: str | None = None, *, quote: str = "") -> None:
        super().__init__(message + quote)
        self.param = param
        self.message = message


class EngineDeadError(HeadstartError):
    """The engine process ended while this request was running."""
