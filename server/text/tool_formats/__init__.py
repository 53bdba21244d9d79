"""How models write calls of tools: one file per format, all read as the text grows."""

from headstart.server.text.tool_formats.deepseek import DeepSeekV3, DeepSeekV31
from headstart.server.text.tool_formats.format import ToolFormat
from headstart.server.text.tool_formats.glm import Glm
from headstart.server.text.tool_formats.harmony import Harmony
from headstart.server.text.tool_formats.hermes import Hermes
from headstart.server.text.tool_formats.llama3_json import Llama3Json
from headstart.server.text.tool_formats.mistral import Mistral
from headstart.server.text.tool_formats.phi4 import Granite, Phi4
from headstart.server.text.tool_formats.pythonic import Pythonic
from headstart.server.text.tool_formats.qwen3_coder import Qwen3Coder
from headstart.server.text.tool_formats.tool_code import ToolCode

FORMATS: dict[str, type[ToolFormat]] = {
    kind.name: kind
    for kind in (
        *(Hermes, Llama3Json, Mistral, Pythonic, Qwen3Coder, Glm, DeepSeekV3, DeepSeekV31),
        *(Phi4, Granite, ToolCode, Harmony),
    )
}

__all__ = ["FORMATS", "ToolFormat"]
