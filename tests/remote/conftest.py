"""Fixtures: a host and a client of it, and a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mlx_engine import BaseEngine, EngineHost, RemoteEngine
from tests.conftest import ROOT
from tests.remote.hosting import client, hosted

STORE = 80 * 2**20  # bytes of Ray's object store on each node; 78 MiB is the least


@pytest.fixture
async def host(engine: BaseEngine) -> AsyncIterator[EngineHost]:
    async with hosted(engine) as host:
        yield host


@pytest.fixture
async def remote(host: EngineHost) -> AsyncIterator[RemoteEngine]:
    async with client(host) as remote:
        yield remote


@dataclass
class RayCluster:
    """Two nodes, and more if need be; this process is a driver on the first one."""

    cluster: Any

    def add_node(self, resource: str) -> Any:
        """A node that can be told from the others by this resource.

        Each test has a name of its own for it: Ray places actors on a node that has been removed
        until it has missed its heartbeats, for 15 seconds or so.
        """
        return self.cluster.add_node(
            num_cpus=2, object_store_memory=STORE, resources={resource: 100}
        )

    def remove_node(self, node: Any) -> None:
        """Let a node go as if its power had failed."""
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster with the nodes ``node_a`` and ``node_b``: resources to place an actor with."""
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        # What the nodes start inherits it: they have this clone, and the tests, installed.
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = cluster_utils.Cluster()
        try:
            running = RayCluster(cluster)
            cluster.add_node(
                num_cpus=2,
                object_store_memory=STORE,
                resources={"node_a": 100},
                include_dashboard=False,
            )
            running.add_node("node_b")
            ray.init(address=cluster.address, log_to_driver=False)
            yield running
        finally:
            ray.shutdown()
            cluster.shutdown()
