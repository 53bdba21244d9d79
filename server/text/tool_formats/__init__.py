"""How models write calls of tools: one file per format, all read as the text grows."""

from headstart.server.text.tool_formats.format import ToolFormat
from headstart.server.text.tool_formats.hermes import Hermes
from headstart.server.text.tool_formats.llama3_json import Llama3Json
from headstart.server.text.tool_formats.mistral import Mistral
from headstart.server.text.tool_formats.pythonic import Pythonic

FORMATS: dict[str, type[ToolFormat]] = {
    kind.name: kind for kind in (Hermes, Llama3Json, Mistral, Pythonic)
}

__all__ = ["FORMATS", "ToolFormat"]
