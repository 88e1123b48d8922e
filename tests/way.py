"""Follows one ``generate()`` through the package: ``python -m tests.way``.

Told for each kind of engine that runs already:

    files    with a call in them, on all threads, and in the engine's process, too
    frames   of coroutines between the caller and the drain, ``wait_shielded``
    calls    on the MLX thread down to the model
    twice    files of the frames, or of the calls, that are entered from more than one other file on
             that way: whoever reads along leaves them and comes back. To make an object is not to
             enter its file.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mlx_lm.models import llama

from mlx_engine import BaseEngine, BatchedEngine, ProcessEngine, SimpleEngine
from mlx_engine.core.mlx_thread import mlx_thread
from tests.conftest import make_tiny
from tests.processes import children
from tests.recorder import ROOT, VARIABLE, file_of, profile
from tests.waiting import until

KINDS: dict[str, Callable[..., BaseEngine]] = {
    "SimpleEngine": SimpleEngine,
    "BatchedEngine": BatchedEngine,
    "ProcessEngine": ProcessEngine,
}
_ROUNDS = 5  # of which the shortest counts: now and then something else is done meanwhile
_DRAIN = "wait_shielded"


@dataclass
class Way:
    """The way of one ``generate()``; see above. ``calls`` are none if MLX is elsewhere."""

    files: list[str]
    frames: list[str]
    calls: list[str]
    twice: dict[str, list[str]]


async def follow(engine: BaseEngine, child: Path) -> Way:
    """The way in one engine; ``child`` is where the engine's process writes its part."""
    await _generate(engine, 0)
    files = [await _files(engine, number, child) for number in range(1, _ROUNDS + 1)]
    way_in = _WayIn()
    frames = await way_in.follow(_generate(engine, _ROUNDS + 1))
    twice = _twice(frames, way_in.to_drain) | _twice(way_in.calls, way_in.to_model)
    return Way(min(files, key=len), frames, way_in.calls, twice)


def _twice(way: list[str], entries: list[tuple[str, str]]) -> dict[str, list[str]]:
    callers: dict[str, set[str]] = {at.partition(":")[0]: set() for at in way}
    for caller, file in entries:
        if file in callers:
            callers[file].add(caller)
    return {file: sorted(those) for file, those in callers.items() if len(those) > 1}


async def _generate(engine: BaseEngine, number: int) -> None:
    await engine.generate(f"{number} is the number of this prompt", max_tokens=16, ignore_eos=True)


async def _files(engine: BaseEngine, number: int, child: Path) -> list[str]:
    files: dict[str, None] = {}
    pids = [int(line.split()[0]) for line in children()]
    child.unlink(missing_ok=True)
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
        await until(child.exists, "it does not record")
    profile(lambda _, file: files.setdefault(file))
    await _generate(engine, number)
    profile(None)
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
        await until(child.read_text, "it does not tell")
        files.update(dict.fromkeys(child.read_text().splitlines()))
    return [*files]


class _WayIn:
    """What is called on the way to the drain, and on the MLX thread to the model.

    Attributes:
        to_drain: each file that is entered, behind the one from which it is.
        to_model: the same on the MLX thread.
        calls: there, down to the model.
    """

    def __init__(self) -> None:
        self.to_drain: list[tuple[str, str]] = []
        self.to_model: list[tuple[str, str]] = []
        self.calls: list[str] = []
        self._begun: dict[int, FrameType] = {}
        self._in_drain = False

    async def follow(self, work: Any) -> list[str]:
        """The frames of coroutines, from the caller's down to the drain, which is left out."""
        call = llama.Model.__call__

        def model(*args: Any, **named: Any) -> Any:
            self.calls = self.calls or _names(sys._getframe())
            return call(*args, **named)

        llama.Model.__call__ = model
        profile(self._note)
        task = asyncio.ensure_future(work)
        frames = None
        while frames is None:
            assert not task.done(), "it has not been seen in the drain"
            await asyncio.sleep(0)
            frames = _frames_to_drain(task.get_coro())
        await task
        profile(None)
        llama.Model.__call__ = call
        return frames

    def _note(self, frame: FrameType, file: str) -> None:
        name = frame.f_code.co_name
        if id(frame) in self._begun or name == "__init__":
            return  # it goes on, or an object is made
        self._begun[id(frame)] = frame
        if threading.current_thread() is threading.main_thread():
            self._in_drain = self._in_drain or name == _DRAIN
            entries, over = self.to_drain, self._in_drain
        else:
            entries, over = self.to_model, bool(self.calls) or not mlx_thread.is_current()
        caller = next((file_of(at) for at in _stack(frame.f_back)), None) or ""
        if caller != file and not over:
            entries.append((caller, file))


def _frames_to_drain(waiting: Any) -> list[str] | None:
    names = []
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is None:
            return None
        if frame.f_code.co_name == _DRAIN:
            return names
        if (file := file_of(frame)) is not None:
            names.append(f"{file}:{frame.f_code.co_name}")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return None


def _stack(frame: FrameType | None) -> list[FrameType]:
    """The frames of the package, from this one up."""
    frames = []
    while frame is not None:
        if file_of(frame) is not None:
            frames.append(frame)
        frame = frame.f_back
    return frames


def _names(frame: FrameType) -> list[str]:
    return [f"{file_of(at)}:{at.f_code.co_name}" for at in reversed(_stack(frame))]


async def follow_all() -> dict[str, Way]:
    """The way in each kind of engine."""
    ways = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, child = make_tiny(folder / "model", "0"), folder / "child"
        os.environ[VARIABLE] = str(child)
        paths = [str(ROOT / "tests" / "children"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        for kind, make in KINDS.items():
            async with make(model) as engine:
                ways[kind] = await follow(engine, child)
    return ways


def main() -> None:
    """Print the ways; with ``--json``, for a program."""
    ways = asyncio.run(follow_all())
    if "--json" in sys.argv[1:]:
        print(json.dumps({kind: asdict(way) for kind, way in ways.items()}))
        return
    for kind, way in ways.items():
        print(f"{kind}: {len(way.files)} files, {len(way.frames)} frames, {len(way.twice)} twice")
        print("  files", *way.files, sep="\n    ")
        print("  frames", *way.frames, sep="\n    ")
        print("  calls", *way.calls, sep="\n    ")
        twice = (f"{file}, from {', '.join(callers)}" for file, callers in way.twice.items())
        print("  twice", *twice, sep="\n    ")


if __name__ == "__main__":
    main()
