"""A command's settings (settings.py, commands.py) from its flags, the environment and a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from headstart.engine.errors import ConfigError
from headstart.server.settings import MIB, Setting, settings_of
from headstart.server.values import byte_size, text_of

C = TypeVar("C")


class UsageError(ConfigError):
    """What is wrong with flags, and not with their values alone."""


CONFIG = "HEADSTART_CONFIG"

SECRETS = {"HEADSTART_API_KEY", "HEADSTART_ADMIN_KEY"}
"""They are read where keys are (http/keys.py): these add to those of flags and files."""

SWITCHED = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False, "false": False, "no": False, "off": False
}  # fmt: skip


def add_settings(parser: argparse.ArgumentParser, command: type[Any]) -> None:
    """The flags of a command, group by group. What is not given is left out of the namespace."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="more settings, in YAML: a flag's name and its value, or a list of them, on each line",
    )
    inherited = [vars(base) for base in reversed(command.__mro__[1:]) if "TITLE" in vars(base)]
    titles = {name: base["TITLE"] for base in inherited for name in base["__annotations__"]}
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field, setting in settings_of(command):
        title = titles.get(field.name)
        place: argparse._ActionsContainer = parser
        if title is not None:
            place = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        _add(place, field, setting)


def _add(place: argparse._ActionsContainer, field: Field[Any], setting: Setting) -> None:
    options: dict[str, Any] = {"help": _help(field, setting), "default": argparse.SUPPRESS}
    if setting.switch is not None:
        options |= {"action": "store_const", "const": setting.switch}
    else:
        options |= {"type": setting.parse, "metavar": setting.metavar}
        options["choices"] = setting.choices or None
    if setting.many:
        options |= {"nargs": "+", "action": "extend"}
    if setting.positional:
        if field.default is not MISSING or field.name == "model":
            options["nargs"] = "?"
        place.add_argument(field.name, **options)
    else:
        place.add_argument(setting.flag_of(field.name), dest=field.name, **options)


def _help(field: Field[Any], setting: Setting) -> str:
    default = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        default = field.default_factory()
    if "(default" in setting.help or setting.switch is not None or default in (None, ()):
        return setting.help
    return f"{setting.help} (default: {_shown(default, setting)})"


def _shown(value: Any, setting: Setting) -> str:
    if setting.parse is byte_size and value % 1024 == 0:
        return f"{value // MIB}MiB" if value % MIB == 0 else f"{value // 1024}KiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_settings(command: type[C], given: Mapping[str, Any], commands: Sequence[type[Any]]) -> C:
    """A command's settings, of its flags and what the environment and a file add.

    ``commands``: all there are; a file may have the settings of any. Raises ConfigError.
    """
    flags = dict(given)
    path = flags.pop("config", None) or os.environ.get(CONFIG)
    of_file = _of_file(Path(path), command, commands) if path else {}
    values = of_file | _of_environment(command) | flags
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    for field, setting in settings_of(command):
        if field.default is field.default_factory is MISSING and field.name not in values:
            name = setting.metavar if setting.positional else setting.flag_of(field.name)
            raise UsageError(f"the following arguments are required: {name}")
    return command(**values)


def _of_environment(command: type[Any]) -> dict[str, Any]:
    found = {}
    for field, setting in settings_of(command):
        name = variable(field, setting)
        text = os.environ.get(name, "").strip()
        # A service that Kubernetes calls headstart leaves its address under the same name.
        if not text or name in SECRETS or (name == "HEADSTART_PORT" and "://" in text):
            continue
        texts = [part.strip() for part in text.split(",")] if setting.many else [text]
        found[field.name] = _value(setting, texts, name)
    return found


def variable(field: Field[Any], setting: Setting) -> str:
    """What the environment calls a setting."""
    return "HEADSTART_" + _key(field.name, setting).replace("-", "_").upper()


def _of_file(path: Path, command: type[Any], commands: Sequence[type[Any]]) -> dict[str, Any]:
    where = f"--config {path}"
    try:
        lines = yaml.safe_load(text_of(where, path))
    except ValueError as error:  # such as a date that is none
        raise ConfigError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    if lines is None:
        return {}
    if not isinstance(lines, dict):
        raise ConfigError(f"{where} is no mapping of settings to values, such as max-n: 4")
    mine = {_key(f.name, s): (f.name, s) for f, s in settings_of(command)}
    known = {_key(f.name, s) for one in commands for f, s in settings_of(one)} | set(mine)
    found = {}
    for name, value in lines.items():
        key = str(name).replace("_", "-")
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; do you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}: there is no setting {str(name)[:80]!r}{hint}")
        if value is None or key not in mine:
            continue
        field, setting = mine[key]
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, list | dict) for one in values) or not values:
            raise ConfigError(f"{where}: {key} is neither a value nor a list of values")
        texts = [_text(one, setting) for one in values]
        found[field] = _value(setting, texts, f"{where}: {key}")
    return found


def _key(field: str, setting: Setting) -> str:
    return setting.flag_of(field).removeprefix("--")


def _text(value: Any, setting: Setting) -> str:
    if isinstance(value, bool):  # YAML's, which on and off are, too
        words = ("off", "on") if "on" in setting.choices else ("false", "true")
        return words[value]
    return str(value)


def _value(setting: Setting, texts: Sequence[str], where: str) -> Any:
    """What a flag with these values would make; raises ConfigError."""
    if len(texts) > 1 and not setting.many:
        raise ConfigError(f"{where}: one value is wanted, not {len(texts)}")
    if setting.switch is not None:
        if (on := SWITCHED.get(texts[0].lower())) is None:
            raise ConfigError(f"{where}: {texts[0]!r} is neither true nor false")
        return setting.switch if on else not setting.switch
    for text in texts:
        if setting.choices and text not in setting.choices:
            choices = ", ".join(setting.choices)
            raise ConfigError(f"{where}: {text!r} is none of {choices}")
    try:
        values = [setting.parse(text) for text in texts]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}") from error
    return values if setting.many else values[0]
