"""``mlx-engine launch``: a coding agent on a local model.

A server that is there already is used; else one is started, and stopped behind the agent. Exit
codes are the agent's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from mlx_engine.agents import AGENTS, Agent
from mlx_engine.cli.output import say
from mlx_engine.cli.serve_options import DEFAULT_HOST, KEYS_VARIABLE
from mlx_engine.errors import InvalidRequest, MLXEngineError

_ANY_KEY = "local"  # for a server that wants none; agents want one
_CONTEXT = "131072"  # tokens, of a model that does not say how many
_PATIENCE = 5.0  # seconds for a server to end, before it is told again
_LOOK = 0.2  # seconds between two looks at a server that is being started


def run(args: argparse.Namespace) -> int:
    """Run an agent, or say how that is done; its exit code."""
    agent = AGENTS[args.agent]
    base = f"http://{DEFAULT_HOST}:{args.port}"
    key = os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split() or [_ANY_KEY]
    if args.print_only or shutil.which(agent.command) is None:
        there = _contexts(_models(base, key[0])) or {args.model or "MODEL": _CONTEXT}
        model = args.model if args.model in there else next(iter(there))
        places = {"base": base, "key": key[0], "folder": "FOLDER"}
        _explain(agent, model=model, context=there[model], **places)
        return 0 if args.print_only else 1
    # What Ctrl-C and the like end here is a server as well, which is in a session of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="mlx-engine-") as folder:
        places = {"base": base, "key": key[0], "folder": folder}
        with _served(args, base, key[0]) as (model, context):
            return _run(agent, args.arguments, model=model, context=context, **places)


def _run(agent: Agent, arguments: list[str], **places: str) -> int:
    agent.write_files(**places)
    process = subprocess.Popen(
        [agent.command, *agent.arguments_for(**places), *arguments],
        env={**os.environ, **agent.environ_for(**places)},
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the agent's now
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()


@contextlib.contextmanager
def _served(args: argparse.Namespace, base: str, key: str) -> Iterator[tuple[str, str]]:
    """The model of a server at ``base``, which is started if there is none, and its tokens.

    Raises:
        InvalidRequest: there is one, without the model that was asked for.
        MLXEngineError: it did not start.
    """
    if models := _models(base, key):
        if args.model is not None and args.model not in models:
            raise InvalidRequest(
                "model",
                f"the server at {base} has {', '.join(models)}; take another --port, or stop it",
            )
        model = args.model or next(iter(models))
        if not _is_loaded(models[model]):
            say(f"waiting for {model} to be loaded")
            _load(base, key, model)
        yield model, _contexts(_models(base, key))[model]
        return
    chosen = [] if args.model is None else ["--model", args.model]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_engine", "serve", "--port", str(args.port), "--quiet", *chosen],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not any(map(_is_loaded, (models := _models(base, key)).values())):
            if server.poll() is not None:
                raise MLXEngineError("the server did not start")
            time.sleep(_LOOK)
        yield next(iter(_contexts(models).items()))
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for end in (server.terminate, server.terminate, server.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_PATIENCE)
            return


def _models(base: str, key: str) -> dict[str, dict[str, Any]]:
    """The models of the server that is there, by their names.

    Raises:
        InvalidRequest: what is there is no such server, or does not take the key.
    """
    try:
        told: Any = _ask(base, key, "/v1/models", timeout=_PATIENCE)
        return {str(model["id"]): dict(model) for model in told["data"]}
    except HTTPError as error:
        said = f"{base} is taken by a server that says {error.code}; its key goes in "
        raise InvalidRequest("port", f"{said}${KEYS_VARIABLE}") from error
    except URLError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidRequest("port", f"{base} is taken by something else") from error


def _load(base: str, key: str, model: str) -> None:
    """Have a server load a model, however long that takes.

    Raises:
        MLXEngineError: it cannot.
    """
    body = {"model": model, "messages": [{"role": "user", "content": "."}]}
    try:
        _ask(base, key, "/v1/messages/count_tokens", json.dumps(body).encode())
    except HTTPError as error:
        raise MLXEngineError(f"{model}: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise MLXEngineError(f"the server at {base} has gone: {error}") from error


def _ask(
    base: str, key: str, path: str, body: bytes | None = None, timeout: float | None = None
) -> Any:
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    asked = Request(base + path, body, headers)
    with build_opener(ProxyHandler({})).open(asked, timeout=timeout) as answer:
        return json.load(answer)


def _is_loaded(model: dict[str, Any]) -> bool:
    return bool(model.get("state", "running") == "running")


def _contexts(models: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tokens of their contexts."""
    return {name: str(one.get("context_length") or _CONTEXT) for name, one in models.items()}


def _explain(agent: Agent, **places: str) -> None:
    """Print the commands that a user can give instead."""
    if shutil.which(agent.command) is None:
        say(f"{agent.command} is not there: {agent.install}")
    print("\n".join(agent.commands_for(**places)))  # noqa: T201 - what was asked for
