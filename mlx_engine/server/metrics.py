"""Numbers for Prometheus: of the engines when they are asked for, of the requests as they end."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_engine.memory_stats import KINDS, MemoryStats
from mlx_engine.server.models import Models

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# Fields of ``EngineStats``, and what they are; those that only grow are counters.
_GAUGES = {
    "running": "requests in work",
    "waiting": "requests in the queue",
    "batch_size": "requests that decode together",
    "kv_bytes": "bytes in the KV caches of the requests in work",
}
_COUNTERS = {
    "finished": "requests that came to their own end",
    "cancelled": "requests that were cancelled",
    "failed": "requests that failed",
    "rejected": "requests that found the engine busy",
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that the prompt cache had",
    "completion_tokens": "tokens generated",
    "draft_tokens": "tokens proposed by a draft model or MTP head",
    "accepted_tokens": "proposed tokens that were accepted",
    "preemptions": "times that a request was paused for want of memory",
    "prefill_seconds": "seconds of prefill",
    "decode_seconds": "seconds of decode",
}
_BOUNDS = {  # fields of ``MemoryStats``; without a number where there is no bound
    "total": "bytes that all engines in its process may have together",
    "limit": "bytes that it may have",
    "peak": "the most bytes that it has had",
}


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models))
        self._requests = Counter(
            "mlx_engine_http_requests",
            "requests, by how they ended: a status, or that the client was gone",
            ["endpoint", "ending"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mlx_engine_http_request_seconds",
            "seconds from a request to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def count(self, endpoint: str, ending: str, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(endpoint, ending).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


def _memory(stats: Mapping[str, MemoryStats]) -> Iterator[Metric]:
    """Who has how much memory, by model."""
    has = GaugeMetricFamily(
        "mlx_engine_memory_bytes", "bytes that it has, by kind", labels=["model", "kind"]
    )
    owned = GaugeMetricFamily(
        "mlx_engine_memory_owner_bytes",
        "bytes that each engine in its process has",
        labels=["model", "owner"],
    )
    bounds = {
        name: GaugeMetricFamily(f"mlx_engine_memory_{name}_bytes", help, labels=["model"])
        for name, help in _BOUNDS.items()
    }
    refused = CounterMetricFamily(
        "mlx_engine_memory_refused", "times that it could not get more", labels=["model"]
    )
    for model, each in stats.items():
        for kind in KINDS:
            has.add_metric([model, kind], getattr(each.use, kind))
        owners: Counts[str] = Counts()
        for owner in each.owners:  # two may be named alike
            owners[owner.name] += owner.use.total
        for name, nbytes in owners.items():
            owned.add_metric([model, name], nbytes)
        for name, family in bounds.items():
            if (bound := getattr(each, name)) is not None:
                family.add_metric([model], bound)
        refused.add_metric([model], each.refused)
    yield from (has, owned, *bounds.values(), refused)


class _Engines(Collector):
    """Statistics of the engines that are there."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Metrics of now."""
        there = {model.name: model.engine for model in self._models}
        stats = {name: engine.stats() for name, engine in there.items() if engine is not None}
        for kind, fields in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, help in fields.items():
                family = kind(f"mlx_engine_{field}", help, labels=["model"])
                for name, each in stats.items():
                    family.add_metric([name], getattr(each, field))
                yield family
        yield from _memory({name: each.memory for name, each in stats.items()})
        loaded = GaugeMetricFamily("mlx_engine_loaded", "whether it is there", labels=["model"])
        held = GaugeMetricFamily(
            "mlx_engine_http_waiting", "requests that wait for a turn", labels=["model"]
        )
        for model in self._models:
            loaded.add_metric([model.name], model.name in stats)
            held.add_metric([model.name], model.turns.waiting)
        yield from (loaded, held)
