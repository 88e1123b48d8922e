"""The application, as all of its endpoints share it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from mlx_engine.engine.interface import Engine
from mlx_engine.errors import InvalidRequest
from mlx_engine.params import SamplingParams
from mlx_engine.server.access import Access
from mlx_engine.server.failures import Failure
from mlx_engine.server.metrics import Metrics

_UNNAMED = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An application's engines and limits.

    Attributes:
        engines: by the names of the models that clients ask for.
        access: who may ask.
        metrics: what is counted.
        defaults: sampling parameters for what a request leaves open.
        max_body_bytes: of a request.
        body_seconds: that a body may take to come.
        keep_alive_seconds: of silence, after which a stream gets a sign of life.
        patience_seconds: for which a client may read nothing of what is sent to it.
        steady_prompts: whether ``volatile`` text is taken out of prompts.
        created: when this was made, in seconds since 1970.
    """

    engines: Mapping[str, Engine]
    access: Access
    metrics: Metrics
    defaults: SamplingParams
    max_body_bytes: int
    body_seconds: float
    keep_alive_seconds: float
    patience_seconds: float
    steady_prompts: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def engine(self, model: str) -> tuple[str, Engine]:
        """The engine of a model, and the model's name; without a name, that of the only one.

        Raises:
            Failure: there is no such model here.
        """
        if not model and len(set(map(id, self.engines.values()))) == 1:
            return next(iter(self.engines.items()))
        if (found := self.engines.get(model)) is None:
            known = ", ".join(map(repr, self.engines))
            said = f"there is no model {model[:200]!r} here; there are {known}"
            raise Failure("not_found", said, option="model")
        return model, found


def by_name(engines: Engine | Mapping[str, Engine]) -> dict[str, Engine]:
    """Engines by the names of their models; a folder's name is the last part of its path.

    Raises:
        InvalidRequest: there are none.
    """
    if isinstance(engines, Mapping):
        if not engines:
            raise InvalidRequest("engine", "must not be an empty mapping")
        return dict(engines)
    name = engines.model or _UNNAMED
    path = PurePath(name)
    return {(path.name or _UNNAMED) if path.is_absolute() or name[0] == "." else name: engines}
