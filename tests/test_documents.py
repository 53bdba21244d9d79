"""What README.md and the pages of docs/ say is true: links, flags, commands, the first request."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import headstart
from headstart.server.api.field_table import field_tables
from headstart.server.cli.main import build_parser
from headstart.server.http.app import BODIES

ROOT = (Path(headstart.__file__).parent / "server").resolve().parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("server", "engine", "kernels", "deploy")),
]
ALL_PAGES = [
    *PAGES,
    *(ROOT / folder / "README.md" for folder in ("bench", "bench/results", "kernels/gpu", "tests")),
]
OF_OTHERS = {
    "--cpus",  # docker's
    "--memory",
    "--rm",
    "--time",
    "--gpus",
    "--target",
    "--build",
    "--build-arg",
    "--nnodes",  # torchrun's
    "--nproc-per-node",
    "--no-python",
    "--install",  # xcode-select's
    "--no-build-isolation",  # pip's
    "--torch-backend",  # uv's
    "--check",  # headstart.kernels.gpu.compile's
    "--tools",  # agents'
    "--system-prompt",
    "--auth-type",
    "--bare",
    "--roofline",  # headstart.bench.gpu's
    "--enable-per-request-metrics",  # vLLM's
}


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def spoken(text: str) -> str:
    """What a page says in code: between backquotes, and indented blocks."""
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*lines, *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("path", ALL_PAGES, ids=page)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_flags_are_flags(path: Path) -> None:
    flags = {flag for parser in parsers(build_parser()) for flag in parser._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", spoken(path.read_text())))
    assert named - flags - OF_OTHERS == set()


@pytest.mark.parametrize("path", ALL_PAGES, ids=page)
def test_commands_are_commands(path: Path) -> None:
    text = spoken(path.read_text())
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^(?: {4})?(?:sudo )?make ([a-z][a-z0-9-]*)", text, re.MULTILINE)
    assert set(named) - targets == set()
    for module in re.findall(r"python -m (headstart[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, module
    [commands] = [
        set(action.choices)
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    named = re.findall(r"(?:^ {4}|^|no-python )headstart ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) - commands == set()


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_requests_are_taken(path: Path) -> None:
    """Each curl with a body: its path exists, its body is valid."""
    text = path.read_text().replace("\\\n", " ")
    for command in re.findall(r"^ {4}(curl [^\n]*-d '[^']*')", text, re.MULTILINE):
        words = shlex.split(command)
        url = next(word for word in words if word.startswith("http://127.0.0.1:8000"))
        body = BODIES[url.removeprefix("http://127.0.0.1:8000")]
        body.model_validate_json(words[words.index("-d") + 1])


def test_the_first_page_asks_something() -> None:
    text = (ROOT / "README.md").read_text()
    [body] = re.findall(r"-d '([^']*)'", text)
    assert json.loads(body)["model"] == "smollm2-135m"


def test_request_fields_are_those_of_the_server() -> None:
    assert (ROOT / "docs" / "request-fields.md").read_text() == field_tables()


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent in (ROOT, ROOT / "docs")], ids=page)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(
        r"`((?:\.\./)?[\w/-]+/[\w-]+\.(?:py|sh|md|csv|yaml))`", path.read_text()
    ):
        assert (ROOT / name.removeprefix("../")).exists(), name
