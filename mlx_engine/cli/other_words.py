"""Words that other commands have for what this one does, and what to write here."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Mapping, Sequence

from mlx_engine import other_names
from mlx_engine.agents import AGENTS
from mlx_engine.cli.flags import flag_of
from mlx_engine.cli.serve_options import KEYS_VARIABLE

_LONGEST = 64  # characters of a word to look at, and to show
_ALIKE = 0.75  # of two options, one of which may be a slip

# What is done here by a command of another name.
COMMANDS: dict[str, str] = {
    **dict.fromkeys(("server", "start", "up", "api", "openai", "http", "web"), "serve MODEL"),
    **dict.fromkeys(("run", "talk", "repl", "interactive", "shell"), "chat MODEL"),
    **dict.fromkeys(
        ("gen", "ask", "complete", "completion", "completions", "prompt", "query", "answer"),
        'generate "PROMPT" --model MODEL',
    ),
    **dict.fromkeys(("show", "describe", "inspect", "pull", "download", "fetch"), "info MODEL"),
    **dict.fromkeys(("memory", "fit", "size"), "info MODEL --memory"),
    **dict.fromkeys(("daemon", "share", "socket"), "host MODEL --socket PATH"),
    **dict.fromkeys(("agent", "agents", "code"), "launch AGENT"),
    **dict.fromkeys(("test", "check", "doctor", "verify"), "selftest MODEL"),
    **dict.fromkeys(("guide", "docs", "doc", "man", "topics", "manual"), "help TOPIC"),
    **dict.fromkeys(("mtp", "extract"), "extract-mtp CHECKPOINT OUT"),
    "version": "--version",
    **{agent: f"launch {agent}" for agent in AGENTS},
}

# Options of other commands, and those of ours that do the same: the first that a command has.
FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("-m", "model-path", "model-id", "model-name", "models", "hf-repo", "repo", "-hf"),
        ("--model",),
    ),
    "-n": ("--max-tokens",),
    **dict.fromkeys(("-t", "-T"), ("--temperature",)),
    **dict.fromkeys(("-s", "system-prompt", "instructions"), ("--system",)),
    "-p": ("--port",),
    "-k": ("--top-k",),
    "-j": ("--json",),
    **dict.fromkeys(("-v", "debug", "log-level", "stats", "timings"), ("--verbose",)),
    **dict.fromkeys(("-q", "silent", "no-log", "disable-log-requests"), ("--quiet",)),
    **dict.fromkeys(("-H", "bind", "address", "listen", "hostname", "ip"), ("--host", "--socket")),
    **dict.fromkeys(("unix-socket", "uds", "sock", "path"), ("--socket",)),
    **dict.fromkeys(("-c", "ctx-size", "ctx"), ("--context-length",)),
    **dict.fromkeys(("draft", "model-draft", "-md", "speculative"), ("--draft-model",)),
    "num-draft": ("--num-draft-tokens",),
    **dict.fromkeys(("guided-regex", "pattern"), ("--regex",)),
    **dict.fromkeys(("guided-choice", "choices"), ("--choice",)),
    **dict.fromkeys(("guided-grammar", "grammar-file"), ("--grammar",)),
    **dict.fromkeys(
        ("json-schema", "json-schema-file", "guided-json", "schema-file"), ("--schema",)
    ),
    **dict.fromkeys(("workers", "parallel", "-np", "concurrency"), ("--max-batch-size",)),
    **dict.fromkeys(("served-model-name", "alias", "name"), ("--served-name",)),
    **dict.fromkeys(("allowed-hosts", "allowed-host", "allow-hosts"), ("--allow-host",)),
    **dict.fromkeys(("memory-limit", "max-memory", "ram"), ("--memory",)),
    **dict.fromkeys(("ttl", "keep-alive"), ("--idle-timeout",)),
    **dict.fromkeys(("grace", "shutdown-timeout", "timeout-graceful-shutdown"), ("--drain",)),
}

_KEY = (
    "what stands on a command line can be read by everyone on this machine; put the key into "
    f"${KEYS_VARIABLE}, or into a file: --api-key-file FILE"
)
_ONE_PROMPT = 'the prompt is written without a name: mlx-engine generate "PROMPT"'
_JSON = "--schema FILE makes the answer JSON; --json prints the whole result as JSON"
_LOG_IN = "log in with 'hf auth login'"
_FILES = "the model's files say that: convert it with mlx_lm.convert"

# What is done in another way; by a command alone, or by all.
SAID: dict[tuple[str, str], str] = {
    **{("serve", name): _KEY for name in ("api-key", "api-keys", "key", "token", "auth")},
    **{("launch", name): _KEY for name in ("api-key", "key")},
    **{("generate", name): _ONE_PROMPT for name in ("-p", "prompt", "input", "text", "query")},
    **{("generate", name): _JSON for name in ("output", "format", "response-format", "-o")},
}
SAID_OF_ALL: dict[str, str] = {
    **dict.fromkeys(("stream", "streaming"), "answers are streamed anyway"),
    **dict.fromkeys(("no-stream", "nostream"), "--json prints the whole result at its end"),
    **dict.fromkeys(("n", "best-of"), "a command gives one answer"),
    **dict.fromkeys(("hf-token", "token", "api-key"), _LOG_IN),
    **dict.fromkeys(("dtype", "quantization", "quantize", "load-in-4bit"), _FILES),
    **dict.fromkeys(("device", "n-gpu-layers", "-ngl", "gpu-layers"), "MLX chooses the device"),
    **dict.fromkeys(
        ("ssl-keyfile", "ssl-certfile", "tls", "https"), "a proxy does that: mlx-engine help server"
    ),
    **dict.fromkeys(("version", "-V"), "write mlx-engine --version"),
}


def no_command(args: Sequence[str], commands: Collection[str]) -> str | None:
    """The error of arguments that do not begin with a command; ``None`` if they do."""
    listed = ", ".join(commands)
    if not args:
        return f"a command is missing: {listed} ('mlx-engine --help' tells of them)"
    word = args[0]
    if word in commands or word in ("-h", "--help", "--version"):
        return None
    if word.startswith("-"):
        return f"a command comes first, then options such as {word[:_LONGEST]}: {listed}"
    found = f"there is no command {word[:_LONGEST]!r}: "
    if (ours := COMMANDS.get(word.lower())) is not None:
        return f"{found}write mlx-engine {ours}"
    if close := difflib.get_close_matches(word[:_LONGEST].lower(), commands, n=1):
        return f"{found}write mlx-engine {close[0]}"
    if " " in word.strip():
        return f"{found}write mlx-engine generate {shlex.quote(word[:_LONGEST])}"
    return f"{found}there are {listed}"


def no_option(
    option: str, command: str, flags: Mapping[str, str], others: Mapping[str, Mapping[str, str]]
) -> str:
    """An option that a command does not have, and what to write instead.

    Args:
        option: as it was given, its value perhaps with it.
        flags: those that the command has, and how they are written.
        others: those of all commands.
    """
    shown = option.partition("=")[0][:_LONGEST]
    name = shown.lower() if shown.startswith("--") else shown
    name = name.removeprefix("--").replace("_", "-")
    meant = [f"--{name.lstrip('-')}", *FLAGS.get(name, ())]
    meant.append(flag_of(other_names.same(name.lstrip("-").replace("-", "_"))))
    said = SAID.get((command, name))
    if said is None and (flag := next((one for one in meant if one in flags), None)) is not None:
        said = f"write {flags[flag]}"
    said = said or SAID_OF_ALL.get(name)
    close = difflib.get_close_matches(meant[0], flags, n=1, cutoff=_ALIKE)
    if said is None and close and len(name.lstrip("-")) > 1:
        said = f"write {flags[close[0]]}"
    if said is None and (have := [one for one, theirs in others.items() if meant[0] in theirs]):
        said = f"it is an option of {' and '.join(have)}"
    if said is None:
        said = f"'mlx-engine {command} --help' tells of those it has"
    return f"{shown}: {said}"


def too_many(command: str, taken: Sequence[str], left: Sequence[str]) -> str:
    """The error of words that a command does not take.

    Args:
        taken: the words that it has taken.
    """
    words = [word[:_LONGEST] for word in (*taken, *left)]
    if command == "generate":
        told = "generate takes one PROMPT, in quotes, and a model by --model: mlx-engine generate "
        if len(words) == 2 and " " not in words[0]:
            return f"{told}{shlex.quote(words[1])} --model {shlex.quote(words[0])}"
        return told + shlex.quote(" ".join(words))
    if command == "chat":
        return "chat takes a MODEL; what is said comes later, or: mlx-engine generate " + (
            f"{shlex.quote(' '.join(words[1:]))} --model {shlex.quote(words[0])}"
        )
    return (
        f"{command} takes no {shlex.join(words[len(taken) :])}; 'mlx-engine {command} --help' "
        "tells what it takes"
    )
