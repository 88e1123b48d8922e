"""Logits processors that tests name, to be imported in the engine's process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from itertools import count
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import llama

from tests.tiny import make_tokenizer
from tests.waiting import until_now

EOS = 257
GATE = "MLX_ENGINE_TEST_GATE"  # environment: the folder of the gate's files


class _Saying:
    """Leaves one token possible: the next of ``text``, then EOS."""

    text = ""

    def __init__(self) -> None:
        self._script = iter(
            [*make_tokenizer().encode(self.text, add_special_tokens=False), *[EOS] * 3]
        )

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == next(self._script), 0.0, -mx.inf)[None]


class SayToolCall(_Saying):
    text = (
        "<think>easy 🙂</think>I shall add."
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    )


class SayBadToolCall(_Saying):
    text = "Well.<tool_call>{nonsense</tool_call>"


class SayHugeCall(_Saying):
    text = '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 30 + "}}</tool_call>"


class SayStop(_Saying):
    text = "one two STOP three"


def fail(tokens: mx.array, logits: mx.array) -> mx.array:
    raise LookupError("the processor has failed")


def fail_oddly(tokens: mx.array, logits: mx.array) -> mx.array:
    raise ValueError("bad \ud800 text")


def lose_the_device(tokens: mx.array, logits: mx.array) -> mx.array:
    def lost(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the device is lost")

    llama.Model.__call__ = lost
    return logits


def exit_3(tokens: mx.array, logits: mx.array) -> mx.array:
    raise SystemExit(3)


def make_noise(tokens: mx.array, logits: mx.array) -> mx.array:
    subprocess.Popen(["timeout", "60", "yes"], stdout=2)
    raise LookupError("it writes now")


def very_slow(tokens: mx.array, logits: mx.array) -> mx.array:
    time.sleep(0.3)
    return logits


def slow(tokens: mx.array, logits: mx.array) -> mx.array:
    time.sleep(0.005)
    return logits


class Gate:
    """Stops the MLX thread at its third token until the test lets it go."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._calls += 1
        if self._calls == 3:
            folder = Path(os.environ[GATE])
            (folder / "inside").touch()
            until_now((folder / "go").exists)
            (folder / "out").touch()
        return logits


def _tell() -> None:
    """That this is where the MLX thread is, if there is a folder for it."""
    if folder := os.environ.get(GATE):
        (Path(folder) / "inside").touch()


def park(tokens: mx.array, logits: mx.array) -> mx.array:
    """In native code, for ever, without the GIL."""
    _tell()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return logits


def hold_the_gil(tokens: mx.array, logits: mx.array) -> mx.array:
    """In native code, for ever, with the GIL."""
    _tell()
    ctypes.PyDLL(None).sleep(1000)
    return logits


def abort(tokens: mx.array, logits: mx.array) -> mx.array:
    os.abort()


def leave(tokens: mx.array, logits: mx.array) -> mx.array:
    os._exit(7)


class SlowDisk:
    """Has each array of a prompt cache that is saved wait until the test lets it be written."""

    def __init__(self) -> None:
        from mlx_engine.generation.cache import array_bytes
        from mlx_engine.generation.cache.entry_file import EntryWriter

        array_bytes._SLICE = 1
        folder, write, writes = Path(os.environ[GATE]), EntryWriter.write, count()

        def slowly(writer: EntryWriter, data: memoryview) -> None:
            number = next(writes)
            (folder / f"write {number}").touch()
            until_now((folder / f"go {number}").exists)
            write(writer, data)

        EntryWriter.write = slowly  # type: ignore[method-assign]

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return logits
