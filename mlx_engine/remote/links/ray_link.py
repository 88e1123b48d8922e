"""A link to a child on another machine: Ray places an actor there, which relays its frames.

Ray is only a transport. The actor hosts the link to a child process and passes frames on without
a look inside, so a client speaks with a child over there as with one here::

    client -- RayLink -- (Ray) -- Relay -- ProcessLink -- child

Towards the child, batches of frames are calls of the actor's ``forward``, numbered, since Ray may
start them in any order. From the child they are answers: a call of ``receive`` is always waiting
there. An ``Ending`` is its last answer; an error of Ray instead of that is a crash.

Ray has streams of answers too, but whoever waits for one when ``ray.shutdown()`` is called is
ended without a word: ``try_read_next_object_ref_stream`` then calls ``_exit(1)`` (2.60).

Every node needs mlx-engine and this version of Ray; nothing is shipped by Ray, and no runtime
environment is needed. On macOS every node needs ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1``. The
driver has to be a part of the cluster: Ray Client (``ray://``) is not supported.
"""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Final

from mlx_engine.core.threads import in_thread
from mlx_engine.errors import MLXEngineError
from mlx_engine.extras import installing
from mlx_engine.remote.links.link import Ending, Link
from mlx_engine.remote.links.process_link import ProcessLink
from mlx_engine.remote.links.relay import Place, Relay, batches
from mlx_engine.remote.wire.frames import FrameSplitter, framed

STACKS_TIME: Final = 0.5  # seconds: 0.2 for the child to write them, 0.3 for the way
KILL_TIME: Final = 0.5  # seconds for the actor to end the child and to tell how that went


class RayLink(Link):
    """A link to a child that an actor of a Ray cluster hosts.

    The actor is this link's alone. It is never restarted, and nothing is ever asked of it twice:
    the second half of a stream must not come from another child than the first.

    Ray does not notice an actor that is stopped (SIGSTOP) or a machine that is cut off; whoever
    uses the link has to, by the child's heartbeats. ``kill()`` works then as well.

    Args:
        name: of the engine, for messages.
        num_cpus: CPUs that Ray sets aside for it on its node. Ray also sets ``OMP_NUM_THREADS``
            to this number there; ``env_vars`` overrules that.
        resources: Ray's custom resources that the node must have, e.g. ``{"mac_studio": 1}``.
        scheduling_strategy: passed on to Ray.
        env_vars: environment variables for the core.

    Attributes:
        place: where the actor runs; ``None`` until it is placed.
    """

    # What the actor hosts.
    hosted: ClassVar[type[Link]] = ProcessLink

    def __init__(
        self,
        name: str,
        *,
        num_cpus: float = 1,
        resources: Mapping[str, float] | None = None,
        scheduling_strategy: Any = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.place: Place | None = None
        self._name = name
        self._env_vars = dict(env_vars or {})
        self._options: dict[str, Any] = {"num_cpus": num_cpus, "resources": dict(resources or {})}
        if scheduling_strategy is not None:
            self._options["scheduling_strategy"] = scheduling_strategy
        self._loop = asyncio.get_running_loop()
        self._ray: Any = None
        self._actor: Any = None
        self._follower: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()
        self._outgoing: list[bytes] = []
        self._number = 0

    async def open(self) -> None:
        """Place the actor and have it start the core.

        An actor that cannot be placed is waited for without end, as nodes may still join:
        give this a time limit. Joins the cluster that runs on this machine, or that
        ``RAY_ADDRESS`` names, unless ``ray.init()`` has been called.

        Cancellation: the actor is killed, or its request withdrawn.

        Raises:
            MLXEngineError: Ray is missing, there is no cluster, or Ray refuses the options.
            EngineDead: the actor or its child has ended before the child was there.
        """
        # It may join a cluster, for seconds, and a thread cannot be cancelled. Whatever actor it
        # makes then ends at once, as nobody has a handle of it.
        creating = in_thread(self._create, "mlx-engine ray")
        try:
            self._actor = await asyncio.shield(creating)
            self.gone.add_done_callback(lambda _: self._opened.set())
            self._follower = asyncio.create_task(self._follow())
            await self._opened.wait()
        except asyncio.CancelledError:
            self._end(Ending(self._unfinished()))
            raise
        except MLXEngineError as error:
            self._end(Ending(str(error)))
            raise
        if self.gone.done():
            self._release()  # it may have been killed before there was an actor
            ending = self.gone.result()
            raise ending.error(f"{self._name} cannot be started: {ending.detail}")

    def _create(self) -> Any:
        """Join the cluster and ask for an actor; any thread."""
        self._ray = _ray()
        _join(self._ray)
        # Concurrency is 1,000 calls unless told otherwise, as its methods are async.
        try:
            kind = self._ray.remote(max_restarts=0, max_task_retries=0, **self._options)(Relay)
            return kind.remote(self._name, self.hosted, self._env_vars)
        except (ValueError, TypeError, self._ray.exceptions.RayError) as error:
            raise MLXEngineError(f"Ray refuses to make an actor: {error}") from error

    def _unfinished(self) -> str:
        """The reason why ``open()`` had not returned yet."""
        if self.place is not None:
            return f"its process had not started in the actor on {self.place.host}"
        asked = {"CPU": self._options["num_cpus"], **self._options["resources"]}
        return f"Ray had not placed its actor, which asks for {asked}"

    async def _follow(self) -> None:
        """Wait for the actor, then for its child, and then for all that comes from there."""
        ending = Ending("the link to its actor was dropped")
        try:
            self.place = await self._ask("place")
            if (refusal := await self._ask("open")) is not None:
                ending = refusal
                return
            self._opened.set()
            ending = await self._receive()
        except self._ray.exceptions.RayError as error:
            ending = Ending(f"its Ray actor{self._whereabouts} is gone: {_one_line(error)}")
        finally:
            self._end(ending)

    async def _receive(self) -> Ending:
        splitter = FrameSplitter()
        while isinstance(item := await self._ask("receive"), bytes):
            for frame in splitter.feed(item):
                self.on_frame(frame)
        ending: Ending = item
        return ending

    async def _ask(self, method: str) -> Any:
        """The answer to a call."""
        answer = self._call(method, answer=True)
        if answer is None:
            raise asyncio.CancelledError("the link has ended")
        return await answer

    @property
    def _whereabouts(self) -> str:
        return f" (process {self.place.pid} on {self.place.host})" if self.place else ""

    def send(self, frame: bytes) -> None:
        """Send a frame, together with others of this turn of the event loop."""
        if self.gone.done():
            return
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(framed(frame))

    def _flush(self) -> None:
        frames, self._outgoing = self._outgoing, []
        for batch in batches(frames):
            self._call("forward", self._number, batch)
            self._number += 1

    async def dump_stacks(self) -> None:
        """Have the child write its stacks; they come with the ``Ending``.

        Returns when they are written, or after 0.5 s: a stopped actor never answers.
        """
        if (answer := self._call("dump_stacks", answer=True)) is None:
            return
        try:
            async with asyncio.timeout(STACKS_TIME):
                await answer
        except (TimeoutError, self._ray.exceptions.RayError):
            pass

    def terminate(self) -> None:
        """Ask the child to end (SIGTERM)."""
        self._call("terminate")

    def kill(self) -> None:
        """End the child (SIGKILL), and its actor.

        ``gone`` is done in 0.5 s at most, whether or not the actor answers. Ray ends one that
        is stopped about 5 s later, and the child ends with it.
        """
        if self.gone.done():
            return
        # An actor that is well tells the child's last words.
        self._call("kill")
        where = self._whereabouts
        ending = Ending(f"it was killed; its Ray actor{where} did not answer")
        self._loop.call_later(KILL_TIME if self._opened.is_set() else 0, self._end, ending)

    def _call(self, method: str, *args: Any, answer: bool = False) -> Any:
        """Call a method of the actor; takes 0.3 ms.

        Returns a reference to its answer, or ``None`` if none is asked for or comes.
        """
        if self._actor is None or self.gone.done():
            return None
        if not self._ray.is_initialized():  # a call would start a cluster
            self._end(Ending(f"Ray was shut down; its actor{self._whereabouts} ended with it"))
            return None
        try:
            bound = getattr(self._actor, method).options(num_returns=1 if answer else 0)
            return bound.remote(*args)
        except Exception as error:  # noqa: BLE001 - Ray raises just that for an unknown actor
            self._end(Ending(f"its Ray actor cannot be reached: {_one_line(error)}"))
            return None

    def _end(self, ending: Ending) -> None:
        """Be over, for this reason unless it was before."""
        if self.gone.done():
            return
        self.gone.set_result(ending)
        self._release()
        if self._follower is not None and self._follower is not asyncio.current_task():
            self._follower.cancel()

    def _release(self) -> None:
        """End the actor. Ray ends its children with it, be they stuck or stopped.

        An actor that is asked to end itself (``exit_actor``, ``__ray_terminate__``) does not
        while any of its methods is pending.
        """
        if self._actor is None or not self._ray.is_initialized():
            return
        try:
            self._ray.kill(self._actor, no_restart=True)
        except (self._ray.exceptions.RayError, ValueError):
            pass  # Ray was shut down, and started anew: that has ended its actors


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise MLXEngineError(f"Ray is not installed: {installing('ray')}") from error


def _join(ray: Any) -> None:
    """Make this process a part of the cluster that there is. Never starts one."""
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MLXEngineError(
            f"there is no Ray cluster to use, call ray.init() first: {error}"
        ) from error


def _one_line(error: Exception) -> str:
    """The words of Ray, without the particulars and the advice that it adds."""
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    if getattr(error, "actor_init_failed", False):
        lines = lines[-1:]  # the last line of a traceback
    said = " ".join(lines).partition(" Some common causes include")[0]
    return textwrap.shorten(f"{type(error).__name__}: {said}", 300)
