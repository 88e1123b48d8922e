"""Ctrl-C in scripts: real signals, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.waiting import PATIENCE

BEGIN = """
import os, signal, sys, threading, time
from mlx_engine import SimpleEngine, BatchedEngine, ProcessEngine, EngineState
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.testing import FakeEngine, Gate
LONG = dict(max_tokens=10**4, ignore_eos=True)

def at(ready, number=signal.SIGINT):
    "A signal, once it is so."
    def wait():
        while not ready():
            time.sleep(0.001)
        os.kill(os.getpid(), number)
    threading.Thread(target=wait, daemon=True).start()
"""


def run(script: str, path: Path, code: int = 0) -> str:
    source = BEGIN + f"PATH = {str(path)!r}\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", source],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={**os.environ},
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr if code else done.stdout


@pytest.mark.parametrize("engine", ["SimpleEngine", "BatchedEngine", "ProcessEngine"])
def test_ctrl_c_cancels_a_call_and_the_engine_goes_on(engine: str, tiny_path: Path) -> None:
    told = run(
        f"""
        def is_free():  # the turn of a batch ends a moment after its last request
            return {engine} is BatchedEngine or not mlx_thread.locked
        with {engine}(PATH).sync() as llm:
            for _ in range(2):
                at(lambda: llm.stats().running)
                try:
                    llm.generate("x", **LONG)
                except KeyboardInterrupt:
                    print("interrupted", is_free())
                while llm.stats().running:
                    time.sleep(0.001)
            at(lambda: llm.stats().running)
            try:
                with llm.stream_generate("x", **LONG) as stream:
                    for chunk in stream:
                        pass
            except KeyboardInterrupt:
                print("interrupted", is_free(), stream.result.finish_reason)
            print(len(llm.generate("y", max_tokens=3, ignore_eos=True).tokens))
        print(llm.state, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        print([t.name for t in threading.enumerate() if "sync" in t.name])
        """,
        tiny_path,
    )
    once = "interrupted True"
    assert told.splitlines() == [once, once, f"{once} cancelled", "3", "stopped True", "[]"]


def test_the_call_stays_until_the_work_is_out_however_often(tiny_path: Path) -> None:
    told = run(
        """
        gate = Gate(firm=True)
        with FakeEngine(["a", gate, "b"]).sync() as llm:
            def later():
                while not gate._arrived:
                    time.sleep(0.001)
                for _ in range(5):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.05)
                print("held", mlx_thread.locked)
                gate.open()
            threading.Thread(target=later, daemon=True).start()
            try:
                llm.generate("x")
            except KeyboardInterrupt:
                print("free", not mlx_thread.locked, llm.engine.requests[0].outcome)
        """,
        tiny_path,
    )
    assert told.splitlines() == ["held True", "free True cancelled"]


@pytest.mark.parametrize("moment", ["start", "stop"])
def test_ctrl_c_while_it_starts_or_stops(moment: str, tiny_path: Path) -> None:
    told = run(
        f"""
        gate = Gate()
        load = iter([gate if {moment == "start"} else (), ()])
        engine = FakeEngine(["a", Gate()], load=load)
        llm = engine.sync()
        if {moment == "start"}:
            at(lambda: gate._arrived)
        try:
            with llm:
                threading.Thread(target=lambda: llm.stream_generate("x").collect()).start()
                while not llm.stats().running:
                    time.sleep(0.001)
                at(lambda: llm.state == "draining")
                llm.shutdown(None)
        except KeyboardInterrupt:
            print("interrupted", llm.state)
        with llm:
            print(llm.state)
        """,
        tiny_path,
    )
    state = "created" if moment == "start" else "stopped"
    assert told.splitlines()[-2:] == [f"interrupted {state}", "running"]


def test_other_handlers_are_left_alone_and_what_they_raise_cancels(tiny_path: Path) -> None:
    told = run(
        """
        class Late(Exception):
            pass
        def late(*_):
            raise Late("time is up")
        signal.signal(signal.SIGALRM, late)
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
        with SimpleEngine(PATH).sync() as llm:
            at(lambda: llm.stats().running, signal.SIGALRM)
            try:
                llm.generate("x", **LONG)
            except Late as error:
                print(error, mlx_thread.locked)
            at(lambda: llm.stats().running)
            llm.generate("x", max_tokens=3000, ignore_eos=True)
        print(seen)
        """,
        tiny_path,
    )
    assert told.splitlines() == ["time is up False", "['mine']"]


def test_uncaught_it_ends_the_script_with_its_code(tiny_path: Path) -> None:
    told = run(
        """
        with SimpleEngine(PATH).sync() as llm:
            at(lambda: llm.stats().running)
            llm.generate("x", **LONG)
        """,
        tiny_path,
        code=-signal.SIGINT,
    )
    assert "KeyboardInterrupt" in told
    assert "ResourceWarning" not in told


@pytest.mark.parametrize("engine", ["SimpleEngine", "BatchedEngine", "ProcessEngine"])
@pytest.mark.parametrize("doing", ["nothing", "a stream", "a thread"])
def test_a_forgotten_engine_does_not_hang_the_exit(
    engine: str, doing: str, tiny_path: Path
) -> None:
    told = run(
        f"""
        llm = {engine}(PATH).sync()
        llm.start()
        if {doing == "a stream"}:
            stream = llm.stream_generate("x", **LONG)
            print(len(next(stream).tokens))
        elif {doing == "a thread"}:
            threading.Thread(target=lambda: llm.generate("x", **LONG), daemon=True).start()
            while not llm.stats().running:
                time.sleep(0.001)
        print("end")
        """,
        tiny_path,
    )
    assert told.splitlines()[-1] == "end"


def test_in_a_fork_it_says_why_it_cannot(tiny_path: Path) -> None:
    told = run(
        """
        import warnings
        warnings.simplefilter("ignore")
        with SimpleEngine(PATH).sync() as llm:
            llm.generate("x", max_tokens=1)
            if (child := os.fork()) == 0:
                try:
                    llm.generate("x", max_tokens=1)
                except RuntimeError as error:
                    print("fork" in str(error), flush=True)
                finally:
                    os._exit(0)
            print(os.waitpid(child, 0)[1], len(llm.generate("x", max_tokens=1).tokens))
        """,
        tiny_path,
    )
    assert told.splitlines() == ["True", "0 1"]
