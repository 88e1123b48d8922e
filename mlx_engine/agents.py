"""Coding agents, and how each of them is pointed at a server: a table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent, and its settings. In them, at any depth, ``$base`` is the server's address
    without ``/v1``, ``$model`` the model, ``$context`` its tokens, ``$key`` a key and ``$folder``
    the folder of ``files``.

    Attributes:
        command: runs it.
        install: the command that installs it.
        environ: variables of its environment; a mapping goes as JSON.
        arguments: before the user's own.
        files: by their names, as JSON.
    """

    command: str
    install: str
    environ: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)

    def environ_for(self, **places: str) -> dict[str, str]:
        """The variables of its environment.

        Args:
            places: ``base``, ``model``, ``context``, ``key`` and ``folder``.
        """
        made = {name: _filled(value, places) for name, value in self.environ.items()}
        return {n: v if isinstance(v, str) else json.dumps(v) for n, v in made.items()}

    def arguments_for(self, **places: str) -> list[str]:
        """Its arguments; see ``environ_for``."""
        return [_filled(argument, places) for argument in self.arguments]

    def files_for(self, **places: str) -> dict[str, str]:
        """The texts of its files; see ``environ_for``."""
        return {name: json.dumps(_filled(value, places)) for name, value in self.files.items()}

    def commands_for(self, **places: str) -> list[str]:
        """Lines for a shell that run it, with what its files have as comments; see
        ``environ_for``."""
        lines = [f"# {places['folder']}/{n}:\n# {v}" for n, v in self.files_for(**places).items()]
        for name, value in self.environ_for(**places).items():
            lines.append(f"export {name}={shlex.quote(value)}")
        return [*lines, shlex.join([self.command, *self.arguments_for(**places)])]

    def write_files(self, **places: str) -> None:
        """Write its files; see ``environ_for``."""
        for name, text in self.files_for(**places).items():
            Path(places["folder"], name).write_text(text, "utf-8")


_CLAUDE_MODELS = (
    *("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL"),
    *("ANTHROPIC_DEFAULT_HAIKU_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL"),
)
_CODEX_SETTINGS = {
    "model_provider": "mlx-engine",
    "model_context_window": "$context",
    "model_providers.mlx-engine.name": "mlx-engine",
    "model_providers.mlx-engine.base_url": "$base/v1",
    "model_providers.mlx-engine.env_key": "MLX_ENGINE_KEY",
    "model_providers.mlx-engine.wire_api": "responses",
}

AGENTS: dict[str, Agent] = {
    "claude": Agent(
        command="claude",
        install="npm install -g @anthropic-ai/claude-code",
        environ={
            "ANTHROPIC_BASE_URL": "$base",
            "ANTHROPIC_AUTH_TOKEN": "$key",
            "ANTHROPIC_API_KEY": "",  # or it would ask which of the two is meant
            **dict.fromkeys(_CLAUDE_MODELS, "$model"),
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "$context",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
    ),
    "codex": Agent(
        command="codex",
        install="npm install -g @openai/codex",
        environ={"MLX_ENGINE_KEY": "$key"},
        arguments=(
            *(
                word
                for name, value in _CODEX_SETTINGS.items()
                for word in ("-c", f"{name}={value}")
            ),
            *("-m", "$model"),
        ),
    ),
    "pi": Agent(
        command="pi",
        install="npm install -g @mariozechner/pi-coding-agent",
        environ={"PI_CODING_AGENT_DIR": "$folder", "MLX_ENGINE_KEY": "$key"},
        arguments=("--provider", "mlx-engine", "--model", "$model"),
        files={
            "models.json": {
                "providers": {
                    "mlx-engine": {
                        "baseUrl": "$base",
                        "apiKey": "MLX_ENGINE_KEY",
                        "api": "anthropic-messages",
                        "models": [
                            {
                                "id": "$model",
                                "name": "$model",
                                "reasoning": True,
                                "contextWindow": "$context",
                            }
                        ],
                    }
                }
            }
        },
    ),
    "opencode": Agent(
        command="opencode",
        install="npm install -g opencode-ai",
        environ={
            "OPENCODE_CONFIG_CONTENT": {
                "model": "mlx-engine/$model",
                "small_model": "mlx-engine/$model",
                "provider": {
                    "mlx-engine": {
                        "npm": "@ai-sdk/openai-compatible",
                        "options": {"baseURL": "$base/v1", "apiKey": "$key"},
                        "models": {"$model": {"name": "$model"}},
                    }
                },
            }
        },
    ),
    "qwen": Agent(
        command="qwen",
        install="npm install -g @qwen-code/qwen-code",
        environ={
            "OPENAI_BASE_URL": "$base/v1",
            "OPENAI_API_KEY": "$key",
            "OPENAI_MODEL": "$model",
        },
    ),
    "aider": Agent(
        command="aider",
        install="pip install aider-chat",
        environ={"OPENAI_API_BASE": "$base/v1", "OPENAI_API_KEY": "$key"},
        arguments=("--model", "openai/$model", "--no-show-model-warnings"),
    ),
}


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    if value == "$context":
        return int(places["context"])  # a number in JSON
    if isinstance(value, str):
        return Template(value).substitute(places)
    if isinstance(value, Mapping):
        return {_filled(k, places): _filled(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(each, places) for each in value]
    return value
