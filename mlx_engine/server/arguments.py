"""Arguments that ``create_app`` does not have, and what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mlx_engine.checks import unknown_option
from mlx_engine.errors import InvalidRequest
from mlx_engine.other_names import OF_SAMPLING, same

P = ParamSpec("P")
T = TypeVar("T")

_OF_THE_SERVER = (
    *("host", "port", "uds", "fd", "reload", "workers", "root_path", "proxy_headers"),
    *("log_level", "access_log", "ssl_keyfile", "ssl_certfile"),
    *("timeout_keep_alive", "limit_concurrency"),
)

_INSTEAD = {
    **dict.fromkeys(("api_key", "key", "keys", "token", "tokens"), "write api_keys=[...]"),
    **dict.fromkeys(("allowed_hosts", "allow_hosts", "trusted_hosts"), "write hosts=[...]"),
    **dict.fromkeys(
        ("model", "models", "engines", "model_path", "model_name"),
        "the first argument is the engine, or a mapping of names to engines",
    ),
    **dict.fromkeys(
        _OF_THE_SERVER, "that is the server's, not the application's: uvicorn.run(app, {}=...)"
    ),
    **dict.fromkeys(OF_SAMPLING, "write defaults=SamplingParams({}=...)"),
}


def no_others(function: Callable[P, T]) -> Callable[P, T]:
    """A decorator: arguments of other names are refused, with what to write instead."""
    known = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        for name in options:
            if name not in known:
                said = _INSTEAD.get(name) or _INSTEAD.get(same(name))
                if said is None:
                    raise unknown_option(name, known, f" of {function.__name__}()")
                raise InvalidRequest(name, f"there is no such option; {said.format(same(name))}")
        return function(*args, **options)

    return checked
