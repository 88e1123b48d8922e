"""Values that tell who has how much memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from mlx_engine.plain import PlainData

PressureStage = Literal["none", "shrink", "clear", "stop"]
"""What an engine gives up while the system is short of memory; each stage does all before it too.

``none``: nothing. ``shrink``: stored prompts give way, and nothing more is stored. ``clear``:
MLX's free buffers are given back as well. ``stop``: batches take up no more requests beside those
in work; those that wait go on waiting, and one at a time is always served.
"""


@dataclass(frozen=True, slots=True)
class MemoryUse(PlainData):
    """Bytes by what they are for.

    Attributes:
        weights: of the models.
        drafts: of draft models and MTP heads.
        live: KV caches of the requests in work, and what their drafts keep.
        stored: KV caches of earlier prompts.
        processes: parts that engines in other processes may use, whatever they do with them.
        models: weights, drafts and processes: what stays as long as an engine does.
        caches: live and stored: what comes and goes with requests.
        total: all of it.
    """

    weights: int = 0
    drafts: int = 0
    live: int = 0
    stored: int = 0
    processes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.models + self.caches

    @property
    def models(self) -> int:
        """Bytes that stay as long as an engine does."""
        return self.weights + self.drafts + self.processes

    @property
    def caches(self) -> int:
        """Bytes that come and go with requests."""
        return self.live + self.stored

    def __add__(self, other: MemoryUse) -> MemoryUse:
        each = (getattr(self, kind) + getattr(other, kind) for kind in KINDS)
        return MemoryUse(*each)


KINDS = tuple(field.name for field in fields(MemoryUse))


@dataclass(frozen=True, slots=True)
class MemoryOwner(PlainData):
    """An engine that has memory, in the same process or in one of its own.

    Attributes:
        name: of the engine.
        limit: bytes that it may have; ``None`` is no limit of its own.
        use: what it has now.
    """

    name: str
    limit: int | None = None
    use: MemoryUse = MemoryUse()


@dataclass(frozen=True, slots=True)
class MemoryStats(PlainData):
    """A snapshot of the memory of an engine, and of all in its process.

    A tenth of what models leave is for the computing itself, so that ``use`` does not come to
    ``limit``, nor the owners' together to ``total``.

    Attributes:
        total: bytes that all engines of the process may have together; ``None`` if unknown.
        limit: bytes that this engine may have (``memory=``); ``None``: as many as ``total``.
        use: what this engine has now, by what it is for: all is ``use.total`` bytes; of a manager,
            all replicas.
        peak: the most bytes that this engine has had at a time; of a manager, the sum of its
            replicas'.
        refused: how often this engine wanted more than it could get.
        stage: what is given up while the system is short of memory.
        owners: all engines of the process that have memory, this one included.
    """

    _parts: ClassVar = {"use": MemoryUse}

    total: int | None = None
    limit: int | None = None
    use: MemoryUse = MemoryUse()
    peak: int = 0
    refused: int = 0
    stage: PressureStage = "none"
    owners: tuple[MemoryOwner, ...] = ()


NOTHING = MemoryStats()
