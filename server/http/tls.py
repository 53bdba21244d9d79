"""Certificate: what makes the server speak HTTPS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from headstart.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files, and the password of the private key ("" when it has none).

    Raises ConfigError for files that cannot be read, do not match or need another password.
    """

    certfile: Path
    keyfile: Path
    password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        try:
            # A password is always given: OpenSSL would ask the terminal for one.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.certfile, self.keyfile, lambda: self.password
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--ssl-certfile {self.certfile}, --ssl-keyfile {self.keyfile}: {error}"
            ) from error
