"""How long do a host's streams stand still because of what one client sends at once?

Some streams run in a batch that is hosted on a socket, and their readers note when each chunk is
there. A client in a process of its own then sends one message of at most 8 MiB:

    text          a prompt of about a million tokens, which just fits into the context
    too much      8 MB of text, which does not
    token ids     a million of them
    messages      a chat of 9,000, too long for the context
    options       500,000 biases of tokens, more than a message may have

The client gives up after 3 seconds, if it was not refused before: what fits would be prefilled for
minutes. Measured for each: the longest gap of all streams, from the message to the client's end,
by the readers' clock, and the *step*, which is the median gap before. With a prefill chunk of 16
tokens, so that the gap is not one of prefill, which ``benchmarks.join_stall`` measures.

The control is the longest gap in as much time without a client.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.drawing import draw_dots, log_scale, new_figure
from benchmarks.joining import Plan, Running
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import ROOT, Setting, parse_setting, random_model, rotated
from benchmarks.spread import Record, Spread
from mlx_engine import BatchedEngine, MLXEngineError, RemoteEngine
from mlx_engine.remote.serving.host import EngineHost

NOBODY = "no client"
NEWS = ("text", "too much", "token ids", "messages", "options")
_CONTEXT = 2**20  # tokens, each of which is a byte
_GIVES_UP = 3.0  # seconds
_STREAMS = 4


@dataclass(slots=True)
class Measured:
    """In seconds; an entry a round."""

    gaps: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in (*NEWS, NOBODY)})
    steps: list[float] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)


# The client, in a process of its own


def asked(engine: RemoteEngine, what: str) -> Any:
    """What is awaited."""
    words = "hello world "
    match what:
        case "text":
            return engine.generate(words * ((_CONTEXT - 1000) // len(words)), max_tokens=1)
        case "too much":
            return engine.generate(words * (8_000_000 // len(words)), max_tokens=1)
        case "token ids":
            return engine.generate([5] * 1_000_000, max_tokens=1)
        case "messages":
            messages: list[dict[str, Any]] = [{"role": "user", "content": words * 40}] * 9000
            return engine.chat(messages, max_tokens=1)
    return engine.generate("a", max_tokens=1, logit_bias=dict.fromkeys(range(500_000), 1.0))


async def ask(path: str, what: str) -> str:
    """Send it, and say what came of it."""
    async with RemoteEngine(path) as engine:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        try:
            async with asyncio.timeout(_GIVES_UP):
                await asked(engine, what)
        except TimeoutError:
            return "taken, and given up"
        except MLXEngineError as error:
            return type(error).__name__
        return "answered"


# The host


async def beside(
    engine: BatchedEngine, host: EngineHost, what: str
) -> tuple[float, list[float], str]:
    """The longest gap, the gaps before, and what the client was told."""
    async with Running(engine, Plan(_STREAMS, 0, 0)) as running:
        if what == NOBODY:
            return await running.beside(asyncio.sleep(_GIVES_UP, ""))
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.outsiders", "--ask", str(host.path), what),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdout is not None
        await client.stdout.readline()  # it is ready
        return await running.beside(_let_ask(client))


async def _let_ask(client: asyncio.subprocess.Process) -> str:
    """Let a client send what it has to send; what it was told."""
    said, _ = await client.communicate(b"\n")
    return said.decode().strip()


async def measure_all(model: str, setting: Setting) -> Measured:
    measured = Measured()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the path of a socket is short
        async with (
            BatchedEngine(model, prefill_step_size=16, prompt_cache_bytes=0) as engine,
            EngineHost(engine, Path(folder, "socket")) as host,
        ):
            for turn in range(setting.repeats):
                for what in rotated([*NEWS, NOBODY], turn):
                    gap, before, answer = await beside(engine, host, what)
                    measured.gaps[what].append(gap)
                    measured.steps.append(statistics.median(before))
                    measured.answers[what] = answer
    return measured


def tables(measured: Measured) -> list[str]:
    rows = [
        [name, Spread.of(gaps).text(1, 1e3), measured.answers[name]]
        for name, gaps in measured.gaps.items()
    ]
    return [
        markdown_table(["one client sends", "longest gap ms", "it was"], rows),
        f"A step takes {Spread.of(measured.steps).text(2, 1e3)} ms.",
    ]


def record_of(measured: Measured) -> Record:
    return {
        "longest_gap_seconds": {n: Spread.of(v).record() for n, v in measured.gaps.items()},
        "step_seconds": Spread.of(measured.steps).record(),
        "answers": measured.answers,
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 1, 2.2)
    if made is None:
        return None
    figure, (place,) = made
    gaps = {n: Spread.read(v) for n, v in record["longest_gap_seconds"].items()}
    draw_dots(place, gaps, "longest gap of a stream, ms", 1e3)
    log_scale(place, "x")
    return figure


async def measure(setting: Setting, model: str) -> None:
    about = f"{_STREAMS} running streams, one client, {setting.repeats} rounds"
    report = Report(setting, f"{about}. {INTERVAL}")
    measured = await measure_all(model, setting)
    for table in tables(measured):
        report.add(table)
    report.finish(
        {"rounds": setting.repeats, "streams": _STREAMS, **record_of(measured)},
        draw,
    )


def main() -> None:
    if sys.argv[1:2] == ["--ask"]:
        print(asyncio.run(ask(*sys.argv[2:4])))
        return
    setting = parse_setting("outsiders", __doc__, repeats=5, quick_repeats=2, layers=None)
    with random_model(2, max_position_embeddings=_CONTEXT) as model:
        asyncio.run(measure(setting, model))


if __name__ == "__main__":
    main()
