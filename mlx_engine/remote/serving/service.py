"""The service of a host: what all of its clients share."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_engine.engine.base import BaseEngine
from mlx_engine.remote.serving.cache_folder import CacheFolder
from mlx_engine.remote.serving.complaints import Complaints
from mlx_engine.remote.serving.heartbeats import Heartbeats
from mlx_engine.remote.serving.round_robin import RoundRobin


@dataclass(frozen=True, slots=True)
class Service:
    """An engine, and how it is served to clients.

    Attributes:
        engine: what is served.
        hello_timeout: seconds in which a client must have said who it is.
        cache_folder: where clients may keep prompt caches; ``None`` is nowhere.
        heartbeats: tell of the engine.
        turns: give clients slices of the event loop.
        complaints: the log of clients that do not behave.
    """

    engine: BaseEngine
    hello_timeout: float
    cache_folder: CacheFolder | None
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    turns: RoundRobin = field(default_factory=RoundRobin)
    complaints: Complaints = field(default_factory=Complaints)
