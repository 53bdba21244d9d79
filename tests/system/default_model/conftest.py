"""Servers with the default model, large ones: they end with the last test of this folder.

server       every test must leave it as it found it
tool_server  the same model behind a template that writes tools
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

# SmolLM2's own template writes no tools. This one has a variable, too.
TOOL_TEMPLATE = """
{%- if tools %}<|im_start|>system
Tools, called as <tool_call>{...}</tool_call>: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}
{%- for call in message['tool_calls'] or [] %}<tool_call>
{"name": {{ call['function']['name'] | tojson }}, "arguments": {{
    call['function']['arguments'] | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if persona %}As {{ persona }}: {% endif %}{% endif %}"""


@pytest.fixture(scope="package")
def tool_server(
    servers: Any, default_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The default model behind a template that writes tools; it goes by priorities."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "template.jinja").write_text(TOOL_TEMPLATE)
    flags = ["--chat-template", str(folder / "template.jinja"), "--scheduling-policy", "priority"]
    with servers(folder) as start:
        yield start(*default_flags, *flags)


@pytest.fixture(scope="package")
def shared_server(
    servers: Any, default_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    with servers(tmp_path_factory.mktemp("server")) as start:
        yield start(*default_flags)


@pytest.fixture
def server(shared_server: Any) -> Iterator[Any]:
    """The shared server; every test must leave it alive and without work."""
    yield shared_server
    assert shared_server.health() == 200
    shared_server.wait_idle()
