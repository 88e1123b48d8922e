"""The application, as all of its endpoints share it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mlx_engine.params import SamplingParams
from mlx_engine.server.access import Access
from mlx_engine.server.body import Bodies
from mlx_engine.server.metrics import Metrics
from mlx_engine.server.models import Models


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An application's models and limits.

    Attributes:
        models: what is served.
        access: who may ask.
        metrics: what is counted.
        defaults: sampling parameters for what a request leaves open.
        bodies: that are on their way.
        keep_alive_seconds: of silence, after which a stream gets a sign of life.
        patience_seconds: for which a client may read nothing of what is sent to it.
        steady_prompts: whether ``volatile`` text is taken out of prompts.
        created: when this was made, in seconds since 1970.
    """

    models: Models
    access: Access
    metrics: Metrics
    defaults: SamplingParams
    bodies: Bodies
    keep_alive_seconds: float
    patience_seconds: float
    steady_prompts: bool
    created: int = field(default_factory=lambda: int(time.time()))
