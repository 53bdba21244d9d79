"""What a command's settings make: the engine's configuration, the server's, keys, a tokenizer."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from headstart.engine.config import EngineConfig
from headstart.engine.errors import ConfigError, ModelError
from headstart.server.cli.commands import Command, Explain, RunBatch, Serve
from headstart.server.cli.flags import UsageError
from headstart.server.generation.defaults import OPENAI, GenerationDefaults
from headstart.server.http.keys import Keys, read_keys
from headstart.server.http.tls import Certificate
from headstart.server.settings import Access, Adapters, Limits, Rank, ServerSettings, SharedLimits
from headstart.server.text.tokenizer import Tokenizer
from headstart.server.values import text_of

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "HEADSTART_RUNAHEAD_SECRET"


def engine_config(options: Command, folder: Path) -> EngineConfig:
    """The engine's share of the settings; raises ConfigError."""
    names = EngineConfig.__struct_fields__
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    given |= {
        "model_path": str(folder),
        "cache_dir": str(options.cache_dir),
        "log_level": getattr(options, "log_level", "warning"),
        "runahead": given.get("runahead") or 1,
        "runahead_hosts": list(given.get("runahead_hosts", ())),
    }
    if isinstance(options, Adapters):
        given["adapters"] = adapters(options)
    if isinstance(options, Rank):
        given["runahead_secret"] = runahead_secret(options)
    return EngineConfig(**given)


def server_settings(options: Serve) -> ServerSettings:
    """The server's share of the settings; raises ConfigError."""
    if options.max_bodies_bytes < options.max_body_bytes:
        raise ConfigError("--max-bodies-size is smaller than --max-body-size")
    given = _given(options)
    given["allowed_hosts"] = (options.host, *(options.allowed_hosts or ()))
    given["otlp_traces_endpoint"] = traces_endpoint(options)
    return ServerSettings(**given, keys=access_keys(options))


def traces_endpoint(options: Serve) -> str | None:
    """Where traces are sent, if anywhere. Raises ConfigError where a flag asks for what there is
    not; of what the environment names, which may be meant for others, the log is told."""
    endpoint = options.otlp_traces_endpoint or _environments_endpoint(os.environ)
    if endpoint is None:
        return None
    lacking = _lacking_for_traces(os.environ)
    if lacking is None:
        return endpoint
    if options.otlp_traces_endpoint is not None:
        raise ConfigError(f"--otlp-traces-endpoint: {lacking}")
    logger.warning("no traces are sent to %s, which the environment names: %s", endpoint, lacking)
    return None


def _environments_endpoint(environment: Mapping[str, str]) -> str | None:
    """As OpenTelemetry's SDK reads it."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if (environment.get("OTEL_TRACES_EXPORTER") or "otlp") != "otlp":
        return None
    if endpoint := environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return endpoint
    if base := environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return f"{base.rstrip('/')}/v1/traces"
    return None


def _lacking_for_traces(environment: Mapping[str, str]) -> str | None:
    """Why traces cannot be sent."""
    general = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or general
    if protocol != "http/protobuf":
        return f"they are sent as http/protobuf, and OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}"
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
        try:
            missing = importlib.util.find_spec(name) is None
        except ModuleNotFoundError:  # what it would be in
            missing = True
        if missing:
            return "OpenTelemetry is not installed: pip install 'headstart[otel]'"
    return None


def batch_settings(options: RunBatch) -> ServerSettings:
    """What decides the answers to a file: limits of all requests together are none."""
    shared: dict[str, Any] = {field.name: sys.maxsize for field in fields(SharedLimits)}
    return ServerSettings(**_given(options), **shared, max_queue=sys.maxsize)


def explain_settings(options: Explain) -> ServerSettings:
    """What decides the prompts of two requests; nothing is refused for its size."""
    classes = (SharedLimits, Limits)
    limits = {field.name: sys.maxsize for one in classes for field in fields(one)}
    times = {"grammar_timeout": 5.0, "template_timeout": 5.0}
    return ServerSettings(**(limits | times | _given(options)))


def _given(options: Command) -> dict[str, Any]:
    names = (field.name for field in fields(ServerSettings))
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def adapters(options: Adapters | Serve | RunBatch) -> dict[str, str]:
    """Name to folder, of ``--lora``; raises UsageError."""
    folders: dict[str, str] = {}
    for name, path in options.lora:
        if name in folders:
            raise UsageError(f"argument --lora: the name {name!r} is given twice")
        if isinstance(options, Serve | RunBatch) and name in model_names(options):
            raise UsageError(f"argument --lora: {name!r} is the model's name")
        folders[name] = str(path)
    if len(folders) > (most := options.max_adapters):
        raise UsageError(f"argument --lora: {len(folders)} adapters, and --max-loras {most}")
    return folders


def access_keys(options: Access) -> Keys:
    """What ``--api-key``, ``--admin-key``, their files and variables name; raises ConfigError."""
    return Keys.of(
        api=read_keys("--api-key", options.api_key, options.api_key_file, "HEADSTART_API_KEY"),
        admin=read_keys(
            "--admin-key", options.admin_key, options.admin_key_file, "HEADSTART_ADMIN_KEY"
        ),
    )


def certificate(options: Access) -> Certificate | None:
    """What ``--ssl-*`` name; raises ConfigError."""
    certfile, keyfile = options.ssl_certfile, options.ssl_keyfile
    password_file = options.ssl_keyfile_password_file
    if certfile is None and keyfile is None and password_file is None:
        return None
    if certfile is None or keyfile is None:
        raise ConfigError("TLS needs both --ssl-certfile and --ssl-keyfile")
    if password_file is None:
        return Certificate(certfile, keyfile, "")
    password = text_of("--ssl-keyfile-password-file", password_file)
    return Certificate(certfile, keyfile, password.rstrip("\r\n"))


def runahead_secret(options: Rank) -> str | None:
    """Raises ConfigError for a file that cannot be read."""
    if (path := options.runahead_secret_file) is None:
        return os.environ.get(SECRET_VARIABLE)
    return text_of("--runahead-secret-file", path).strip()


def generation_defaults(options: Serve | RunBatch | Explain, folder: Path) -> GenerationDefaults:
    """How tokens are chosen where a request does not say. Raises ModelError and ConfigError."""
    asked = options.generation_config
    if asked == "none":
        return OPENAI
    if asked != "auto":
        try:
            return GenerationDefaults.from_file(Path(asked))
        except ModelError as error:
            raise ConfigError(f"--generation-config: {error}") from error
    path = folder / "generation_config.json"
    if not path.is_file():
        return OPENAI
    try:
        return GenerationDefaults.from_file(path)
    except ModelError as error:
        raise ModelError(f"{error}; --generation-config none does without it") from error


def tokenizer_of(options: Serve | RunBatch | Explain, folder: Path) -> Tokenizer:
    """The model's, with the chat template asked for. Raises ConfigError and ModelError."""
    tokenizer = Tokenizer.from_folder(folder)
    if (file := options.chat_template) is not None:
        tokenizer.chat_template = text_of(f"--chat-template {file}", file)
        tokenizer.tool_template = None
    return tokenizer


def model_names(options: Serve | RunBatch | Explain) -> list[str]:
    """What the model is called: as asked for, or by the last part of a path."""
    if options.served_model_name:
        return list(options.served_model_name)
    path = Path(options.model)
    return [path.resolve().name if path.exists() else options.model]
