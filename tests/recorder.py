"""Calls in files of the package, recorded on all threads of a process for a while.

In a process that ``tests.way`` starts, ``children/sitecustomize.py`` calls ``follow``: SIGUSR2
begins a record, the next one writes it into the file that the environment names.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent
VARIABLE = "MLX_ENGINE_TEST_WAY"
_PACKAGE = f"{ROOT / 'mlx_engine'}{os.sep}"

OnCall = Callable[[FrameType, str], object]  # is given the frame, and its file in the package


def file_of(frame: FrameType) -> str | None:
    """The name of its file within the package; ``None`` if it is in none, or is an import."""
    file = frame.f_code.co_filename
    if not file.startswith(_PACKAGE) or frame.f_code.co_name == "<module>":
        return None
    return file.removeprefix(_PACKAGE)


def profile(on_call: OnCall | None) -> None:
    """Have each call in the package told from now on, on every thread; ``None`` ends that.

    From the main thread. A coroutine or generator that goes on is told as well.
    """
    from mlx_engine.core.mlx_thread import mlx_thread
    from mlx_engine.remote.io_thread import io_thread

    def note(frame: FrameType, event: str, _: object) -> None:
        if on_call is not None and event == "call" and (file := file_of(frame)) is not None:
            on_call(frame, file)

    def begin() -> None:
        sys.setprofile(None if on_call is None else note)
        there.set()

    threading.setprofile(None if on_call is None else note)
    there = threading.Event()
    mlx_thread.post(begin)
    there.wait(1.0)  # nobody is there if no engine has been
    if io_thread._loop is not None:
        there = threading.Event()
        io_thread._loop.call_soon_threadsafe(begin)
        there.wait()
    begin()


def follow() -> None:
    """Do what the signals of ``tests.way`` ask for."""
    file = Path(os.environ[VARIABLE])
    files: dict[str, None] = {}
    under_way = False

    def turn(*_: object) -> None:
        nonlocal under_way
        under_way = not under_way
        if under_way:
            files.clear()
            profile(lambda _, name: files.setdefault(name))
            file.write_text("")
            return
        profile(None)
        draft = file.with_suffix(".draft")
        draft.write_text("\n".join(files))
        draft.replace(file)

    signal.signal(signal.SIGUSR2, turn)
