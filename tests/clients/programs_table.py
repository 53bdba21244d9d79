"""The client programs: packages, settings, and what is asked of each. Versions are pinned here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from scripted_model import SUCCESS, Call

DEFAULT = "smollm2-135m"
SCRIPTED = "scripted"
QUESTION = "What does notes.txt say?"
CALLS = [
    Call("Bash", {"command": "cat notes.txt", "description": "Read the notes"}),
    Call("exec_command", {"cmd": "cat notes.txt"}),
    Call("bash", {"command": "cat notes.txt", "description": "Read the notes"}),
    Call("grep_search", {"pattern": "forty"}),
]
"""Of Claude Code, Codex, OpenCode and Qwen Code."""


@dataclass(frozen=True, slots=True)
class Client:
    """A program and what it is run with.

    ``$url``, ``$model``, ``$home``, ``$folder`` (where its packages are), ``$site`` (those of
    Python) and ``$programs`` in its texts stand for what they are once it is run. ``runs``: what is
    started, one after the other in the same home. ``says``: what has to be in what each prints.
    """

    name: str
    kind: Literal["npm", "pypi"]
    packages: tuple[str, ...]
    done: str
    runs: tuple[tuple[str, ...], ...]
    model: str = DEFAULT
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    says: str = ""

    @property
    def folder(self) -> str:
        return "-".join(self.name.partition(",")[0].lower().replace("'", "").split())

    @property
    def version(self) -> str:
        name, _, version = self.packages[0].replace("==", "@").rpartition("@")
        return f"{name} {version}"


OPENAI = {
    "MODEL": "$model",
    "OPENAI_API_KEY": "none",
    "OPENAI_BASE_URL": "$url/v1",
    "ANTHROPIC_BASE_URL": "$url",
}
LOOP = "a tool's loop at its default settings, then a second turn"
SHORT = "You are a helpful assistant. Answer in one sentence."
PARIS = "What is the capital of France?"

CLAUDE = "$folder/node_modules/.bin/claude"
CLAUDE_PACKAGES = ("@anthropic-ai/claude-code@2.1.332",)
CLAUDE_SETTINGS = {
    "ANTHROPIC_BASE_URL": "$url",
    "ANTHROPIC_AUTH_TOKEN": "none",
    "ANTHROPIC_MODEL": "$model",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "$model",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}

CODEX = ("$folder/node_modules/.bin/codex", "exec", "--skip-git-repo-check")
CODEX_PACKAGES = ("@openai/codex@0.171.0",)
CODEX_CONFIG = """\
model = "$model"
model_provider = "headstart"
check_for_update_on_startup = false

[model_providers.headstart]
name = "headstart"
base_url = "$url/v1"
wire_api = "responses"
env_key = "HEADSTART_API_KEY"

[analytics]
enabled = false

[features]
plugins = false
apps = false
"""

OPENCODE = ("$folder/node_modules/.bin/opencode", "run")
OPENCODE_CONFIG: dict[str, Any] = {
    "model": "headstart/$model",
    "small_model": "headstart/$model",
    "autoupdate": False,
    "share": "disabled",
    "provider": {
        "headstart": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "$url/v1", "apiKey": "none"},
            "models": {"$model": {"limit": {"context": 131072, "output": 1024}}},
        }
    },
}

QWEN = ("node", "$folder/node_modules/.bin/qwen", "--auth-type", "openai")
QWEN_PACKAGES = ("@qwen-code/qwen-code@0.24.4",)
QWEN_SETTINGS = {
    "OPENAI_BASE_URL": "$url/v1",
    "OPENAI_API_KEY": "none",
    "OPENAI_MODEL": "$model",
}
QWEN_FILES = {
    ".qwen/settings.json": json.dumps(
        {"privacy": {"usageStatisticsEnabled": False}, "general": {"enableAutoUpdate": False}}
    )
}

CLIENTS = [
    Client(
        name="Claude Code",
        kind="npm",
        packages=CLAUDE_PACKAGES,
        done=LOOP,
        runs=((CLAUDE, "-p", QUESTION), (CLAUDE, "-p", "--continue", "Say it again.")),
        model=SCRIPTED,
        environment=CLAUDE_SETTINGS,
        says=SUCCESS,
    ),
    Client(
        name="Claude Code, no tools",
        kind="npm",
        packages=CLAUDE_PACKAGES,
        done="a question, with a system prompt of its own and no tools",
        runs=((CLAUDE, "-p", PARIS, "--tools", "", "--system-prompt", SHORT),),
        environment=CLAUDE_SETTINGS | {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "256"},
    ),
    Client(
        name="Codex",
        kind="npm",
        packages=CODEX_PACKAGES,
        done=LOOP,
        runs=((*CODEX, QUESTION), (*CODEX, "resume", "--last", "Say it again.")),
        model=SCRIPTED,
        environment={"HEADSTART_API_KEY": "none"},
        files={".codex/config.toml": CODEX_CONFIG},
        says=SUCCESS,
    ),
    Client(
        name="Codex, short prompt",
        kind="npm",
        packages=CODEX_PACKAGES,
        done="a question, with instructions of its own and all of its tools",
        runs=((*CODEX, PARIS),),
        environment={"HEADSTART_API_KEY": "none"},
        files={
            ".codex/config.toml": f'model_instructions_file = "$home/short.md"\n{CODEX_CONFIG}',
            "short.md": SHORT,
        },
        says="Paris",
    ),
    Client(
        name="OpenCode",
        kind="npm",
        packages=("opencode-ai@1.18.33",),
        done=LOOP,
        runs=((*OPENCODE, QUESTION), (*OPENCODE, "--continue", "Say it again.")),
        model=SCRIPTED,
        environment={"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"},
        files={".config/opencode/opencode.json": json.dumps(OPENCODE_CONFIG)},
        says=SUCCESS,
    ),
    Client(
        name="Qwen Code",
        kind="npm",
        packages=QWEN_PACKAGES,
        done=LOOP,
        runs=((*QWEN, QUESTION), (*QWEN, "--continue", "Say it again.")),
        model=SCRIPTED,
        environment=QWEN_SETTINGS,
        files=QWEN_FILES,
        says=SUCCESS,
    ),
    Client(
        name="Qwen Code, short prompt",
        kind="npm",
        packages=QWEN_PACKAGES,
        done="a question, with a system prompt of its own and few tools",
        runs=((*QWEN, "--bare", "--system-prompt", SHORT, PARIS),),
        environment=QWEN_SETTINGS,
        files=QWEN_FILES,
        says="Paris",
    ),
    Client(
        name="Agents SDK",
        kind="pypi",
        packages=("openai-agents==0.24.0",),
        done="a tool's loop over Responses and chats, whole and streamed",
        runs=(("$folder/bin/python", "$programs/agents_sdk.py"),),
        environment=OPENAI | {"OPENAI_AGENTS_DISABLE_TRACING": "1"},
    ),
    Client(
        name="LangChain",
        kind="pypi",
        # llama-index-core brings the files of tiktoken, which are fetched otherwise.
        packages=("langchain-openai==1.7.4", "llama-index-core==0.14.25"),
        done="a tool's loop over chats and Responses; embeddings, of ids and of texts",
        runs=(("$folder/bin/python", "$programs/langchain_chat.py"),),
        environment=OPENAI
        | {"TIKTOKEN_CACHE_DIR": "$site/llama_index/core/_static/tiktoken_cache"},
    ),
    Client(
        name="LlamaIndex",
        kind="pypi",
        packages=(
            "llama-index-llms-openai-like==0.8.1",
            "llama-index-embeddings-openai-like==0.4.0",
            "llama-index-core==0.14.25",
        ),
        done="a tool's loop over chats, a completion, embeddings",
        runs=(("$folder/bin/python", "$programs/llama_index_chat.py"),),
        environment=OPENAI,
    ),
    Client(
        name="Vercel AI SDK",
        kind="npm",
        packages=(
            "ai@7.0.173",
            "@ai-sdk/openai@4.0.118",
            "@ai-sdk/openai-compatible@3.0.92",
            "zod@4.6.7",
        ),
        done="tools' loops over Responses and chats, whole and streamed; embeddings",
        runs=(("node", "$folder/vercel_ai.mjs"),),
        environment=OPENAI,
    ),
    Client(
        name="LiteLLM",
        kind="pypi",
        packages=("litellm==1.110.2",),
        done="a tool's loop over chats; Responses, Messages, embeddings",
        runs=(("$folder/bin/python", "$programs/litellm_chat.py"),),
        environment=OPENAI | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
]
