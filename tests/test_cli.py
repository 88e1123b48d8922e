"""The command: real processes on a tiny model, and a terminal where one is needed."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_engine.cli.flags import spelled
from mlx_engine.cli.options import engine_options, parse, sampling_params
from mlx_engine.cli.output import AnswerPrinter, ProgressBar
from mlx_engine.config import ModelConfig
from mlx_engine.errors import InvalidRequest
from mlx_engine.models.info import count_parameters
from mlx_engine.outputs import GenerationChunk, Progress, ToolCallDelta
from mlx_engine.params import SamplingParams
from mlx_engine.strategies import MTP, DraftModel, SpecPrefill
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO
from tests.stuck import StuckModel
from tests.waiting import PATIENCE, until_now

COMMAND = [sys.executable, "-m", "mlx_engine"]
SAYS_A = ["--logit-bias", "64=100"]  # the tiny model's token 64 is "a"
ENDLESS = [*SAYS_A, "--max-tokens", "16000"]
TWELVE = [*SAYS_A, "--max-tokens", "12"]
CUT = "mlx-engine: note: cut after 12 tokens, by --max-tokens or the end of the context"
LONG = "long " * 100

# Makes its standard input the controlling terminal, so that ^C on it is a signal.
IN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def finish(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run a command to its end: exit code, standard output, standard error."""
    done = subprocess.run([*COMMAND, *args], input=stdin, capture_output=True, timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@contextmanager
def started(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [*COMMAND, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Terminal:
    """The command in a terminal of its own, and what it has shown there."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        launcher = [sys.executable, "-c", IN_TERMINAL, *COMMAND, *args]
        self._process = subprocess.Popen(
            launcher, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.shown = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, timeout: float = PATIENCE) -> None:
        """Until ``pattern`` is shown, after what was waited for before."""
        deadline = time.monotonic() + timeout
        while not (match := re.compile(pattern).search(self.shown, self._seen)):
            assert self._read(deadline), f"{pattern!r} is not in {self.shown[self._seen :]!r}"
        self._seen = match.end()

    def press_until(self, keys: str, pattern: str) -> None:
        """As people do: once more if it had no effect.

        Between showing its prompt and waiting for a key, ``input()`` is deaf to signals.
        """
        for _ in range(60):
            self.press(keys)
            with suppress(AssertionError):
                self.wait_for(pattern, timeout=1)
                return
        pytest.fail(f"{pattern!r} is not in {self.shown[self._seen :]!r}")

    def exit_code(self, timeout: float = PATIENCE) -> int:
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self._process.wait(max(1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        left = max(0, deadline - time.monotonic())
        if not select.select([self._master], [], [], left)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says so when the other side is closed, macOS reads nothing
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


# ── generate ────────────────────────────────────────────────────────────────────────────────


def test_an_answer_has_as_many_seconds_as_it_is_given(tiny_path: Path) -> None:
    model = ["--model", str(tiny_path)]
    code, text, errors = finish("generate", "hi", *model, *ENDLESS, "--timeout", "0.2")
    assert code == 0
    assert set(text) == {"a", "\n"}
    cut = re.fullmatch(r"mlx-engine: note: cut after (\d+) tokens, by --timeout\n", errors)
    assert cut is not None
    assert int(cut[1]) == len(text) - 1
    for command in (["generate", "hi"], ["chat"]):
        code, text, errors = finish(*command, *model, "--timeout", "0")
        assert (code, text) == (2, "")
        assert "argument --timeout: must be seconds of work, above 0" in errors


def test_generate_reads_stdin_and_json_has_the_same_answer(tiny_path: Path) -> None:
    model = ["--model", str(tiny_path)]
    code, text, errors = finish(
        "generate", "-", *model, *TWELVE, "--prefill-step-size", "64", stdin=f"{LONG}\n".encode()
    )
    assert (code, errors) == (0, f"{CUT}\n"), (
        "no progress bar and no remarks of libraries in a pipe"
    )
    assert text == f"{'a' * 12}\n"

    code, output, errors = finish(
        "generate", LONG, *model, *TWELVE, "--json", "--logprobs", "2", "--verbose"
    )
    assert code == 0
    result = json.loads(output)
    assert result["text"] == "a" * 12
    assert result["finish_reason"] == "length"
    assert len(result["tokens"]) == result["usage"]["completion_tokens"] == 12
    assert len(result["logprobs"][0]["top"]) == 2
    assert re.fullmatch(r"mlx-engine: \d+ prompt tokens .* finish reason \w+\n", errors)


def test_a_model_without_chat_template_gets_the_raw_prompt_and_a_note(
    tiny_path: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_path, tmp_path / "no_template")
    (model / "chat_template.jinja").unlink()
    code, output, errors = finish("generate", "hello", "--model", str(model), *TWELVE, "--json")
    assert code == 0
    assert json.loads(output)["usage"]["prompt_tokens"] == len("hello")
    assert "no chat template" in errors
    assert errors.count("\n") == 1


def test_an_option_out_of_range_is_a_usage_error_with_its_name() -> None:
    code, output, errors = finish("generate", "hello", "--top-p", "3")
    assert (code, output) == (2, "")
    assert re.fullmatch(r"mlx-engine: error: argument --top-p: must be [^\n]*\n", errors)


def test_options_of_chats_reach_the_engine(tiny_path: Path) -> None:
    line = ("generate", "hello", "--model", str(tiny_path), "--max-tokens", "2", "--json")
    code, output, _ = finish(*line, "--no-thinking")
    assert code == 0
    assert any("thinking" in note for note in json.loads(output)["notes"]), output
    code, _, errors = finish(*line, "--max-reasoning-tokens", "-3")
    assert code == 2
    assert "argument --max-reasoning-tokens: must be" in errors


def test_a_missing_model_is_one_line_and_exit_code_1() -> None:
    code, output, errors = finish("generate", "hello", "--model", "./there/is/none")
    assert (code, output) == (1, "")
    assert re.fullmatch(r"mlx-engine: error: ./there/is/none: [^\n]*\n", errors)


def test_ctrl_c_during_an_answer_keeps_what_was_printed(tiny_path: Path) -> None:
    with started("generate", "hello", "--model", str(tiny_path), *ENDLESS) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert re.fullmatch(b"a+\n", first + output)
    assert errors == b""


def test_a_second_ctrl_c_leaves_while_the_load_is_stuck(tiny_path: Path, tmp_path: Path) -> None:
    model = StuckModel(tiny_path, tmp_path / "stuck")
    with started("generate", "hello", "--model", str(model.path)) as process:
        until_now(lambda: model.is_read)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)
            _ends_within(process, 0.3)  # two signals at once would be one
        assert _ends_within(process, 0)
        model.close()
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == b""


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_a_reader_that_goes_away_ends_the_command_quietly(tiny_path: Path) -> None:
    with started("generate", "hello", "--model", str(tiny_path), *ENDLESS) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 141
    assert errors == b""


def test_a_terminal_gets_progress_bars_and_the_answer_after_them(tiny_path: Path) -> None:
    command = ["generate", LONG, "--model", str(tiny_path), "--raw", *TWELVE]
    with Terminal(*command, "--prefill-step-size", "64") as terminal:
        assert terminal.exit_code() == 0
    assert "load:" in terminal.shown
    assert "prefill:" in terminal.shown
    answer = f" \r{'a' * 12}\r\n{CUT}\r\n"
    assert terminal.shown.endswith(answer), "the bar was cleared before it"


@pytest.mark.demo
@pytest.mark.timeout(600)
def test_the_demo_knows_the_capital_of_france() -> None:
    done = subprocess.run(
        [*COMMAND, "generate", "What is the capital of France?", "--temperature", "0"],
        capture_output=True,
        timeout=590,
    )
    assert done.returncode == 0
    assert b"Paris" in done.stdout


# ── chat ────────────────────────────────────────────────────────────────────────────────────


def test_chat_survives_ctrl_c_and_ends_with_ctrl_d(tiny_path: Path) -> None:
    with Terminal("chat", "--model", str(tiny_path), *ENDLESS) as terminal:
        terminal.wait_for("Ctrl-D")
        terminal.wait_for("> ")
        terminal.press_until("\x03", r"Ctrl-D[^\n]*\n[^\n]*> ")
        terminal.press("hello\r")
        terminal.wait_for(r"hello\r\n")
        terminal.wait_for("aaa")
        terminal.press("\x03")
        terminal.wait_for(r"\n[^\n]*> ")
        terminal.press("/reset\r")
        terminal.wait_for(r"forgotten\r\n[^\n]*> ")
        terminal.press("\x04")
        assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.shown


def test_chat_forgets_its_oldest_turns_when_they_no_longer_fit(tiny_path: Path) -> None:
    code, output, errors = finish(
        "chat",
        *("--model", str(tiny_path), "--context-length", "120", *TWELVE),
        stdin=b"first " * 5 + b"\n" + b"second " * 5 + b"\n" + b"third " * 100 + b"\n",
    )
    assert code == 0
    assert output == f"{'a' * 12}\n" * 2
    assert errors.count("its oldest part is forgotten") == 1
    assert "do not fit" in errors, "a question that is too long alone is refused, not cut"


# ── info, version ───────────────────────────────────────────────────────────────────────────


def test_info_describes_a_model(tiny_path: Path) -> None:
    code, output, errors = finish("info", str(tiny_path), "--json")
    assert (code, errors) == (0, "")
    info = json.loads(output)
    assert info["path"] == str(tiny_path)
    assert info["model_type"] == "llama"
    assert info["context_length"] == 16384
    assert info["chat_template"] is True
    assert (info["tool_calls"], info["thinking"]) == (True, True)
    assert info["format_by"] == "template"
    code, output, errors = finish("info", str(tiny_path), "--tool-format", "none")
    assert re.search(r"^answer format +\S+ \(by option\)$", output, re.MULTILINE)
    assert re.search(r"^tool calls +no$", output, re.MULTILINE)
    assert info["bytes_on_disk"] > info["parameters"] * 4 > 0


def test_info_tells_what_fits_into_memory(tiny_path: Path) -> None:
    code, output, errors = finish(
        "info", str(tiny_path), "--json", "--memory", "--memory-bytes", "20000000"
    )
    assert (code, errors) == (0, "")
    memory = json.loads(output)["memory"]
    assert memory["machine"] == 20_000_000
    assert 0 < memory["weights"] < 1_000_000
    assert memory["longest_context"]["full"] == 16384
    fits = {row["batch"]: row["fits"] for row in memory["rows"] if row["context"] == 16384}
    assert fits == {1: True, 4: False, 16: False, 32: False}
    for row in memory["rows"]:
        assert row["bytes"] - row["kv_bytes"] == memory["weights"]
        assert row["kv_bytes"] == row["batch"] * row["context"] * 512
    code, output, errors = finish("info", str(tiny_path), "--memory", "--memory-bytes", "20000000")
    assert (code, errors) == (0, "")
    assert re.search(r"^memory +20\.0 MB$", output, re.MULTILINE)
    assert re.search(r"^fits, full +16384 tokens of one request$", output, re.MULTILINE)
    assert re.search(r"^16384 +full +8\.\d MB +\d+\.\d MB\*", output, re.MULTILINE)
    assert "This model's KV cache cannot be quantised." in output
    code, output, errors = finish("info", str(tiny_path), "--memory")
    assert code == 0
    assert re.search(r"^16384 +full +8\.\d MB", output, re.MULTILINE)
    code, output, errors = finish("info", str(tiny_path), "--memory", "--memory-bytes", "0")
    assert (code, output) == (2, "")
    assert "argument --memory-bytes: must be an integer, 1 or more" in errors


def test_quantised_weights_are_counted_one_by_one() -> None:
    shapes = {
        "norm.weight": [64],
        "a.weight": [8, 8],  # 8 x 64 weights of 4 bits
        "a.scales": [8, 2],
        "a.biases": [8, 2],
        "a.bias": [8],
        "b.weight": [8, 16],  # 8 x 64 weights of 8 bits
        "b.scales": [8, 1],
        "b.biases": [8, 1],
    }
    header = {name: {"shape": shape} for name, shape in shapes.items()}
    quantization = {"group_size": 32, "bits": 4, "b": {"group_size": 64, "bits": 8}}
    assert count_parameters(header, quantization) == 64 + 512 + 8 + 512


def test_the_version_comes_without_mlx() -> None:
    code = (
        "import sys\nfrom mlx_engine.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit as e: assert e.code == 0\n"
        "print([m for m in ('mlx', 'mlx_lm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE)
    assert re.fullmatch(rb"mlx-engine \d+\.\d+\.\d+\S*\n\[\]\n", done.stdout)


# ── arguments ───────────────────────────────────────────────────────────────────────────────

EVERY_SAMPLING_OPTION = """--max-tokens 5 --temp 1 --top-p 0.5 --top-k 3 --min-p 0.1
--xtc-probability 0.1 --xtc-threshold 0.2 --repetition-penalty 1.1 --presence-penalty 0.1
--frequency-penalty 0.2 --logit-bias 3=-1.5 --logit-bias 4=2 --seed 7 --stop a --stop b
--stop-token-id 1 --stop-token-id 2 --ignore-eos --logprobs 3 --json"""
EVERY_ENGINE_OPTION = """--model m --revision r --adapter-path a --trust-remote-code
--context-length 10 --max-kv-size 8 --kv-bits 4 --kv-group-size 32 --quantized-kv-start 5
--prefill-step-size 3 --memory 8GB --prompt-cache-bytes 0
--tool-format hermes --reasoning-format none"""


def test_every_sampling_parameter_has_an_option() -> None:
    args = parse(["generate", "x", *EVERY_SAMPLING_OPTION.split()])
    assert sampling_params(args) == SamplingParams(
        max_tokens=5,
        temperature=1,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        xtc_probability=0.1,
        xtc_threshold=0.2,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={3: -1.5, 4: 2},
        seed=7,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logprobs=3,
    )
    names = {field.name for field in fields(SamplingParams)}
    assert names - vars(args).keys() == {"logits_processors", "constraint"}


def test_every_engine_option_is_passed_on_and_only_if_given() -> None:
    args = parse(["generate", "x", *EVERY_ENGINE_OPTION.split()])
    assert engine_options(args).keys() == {field.name for field in fields(ModelConfig)}
    args = parse(["chat", "--max-tokens", "none"])
    assert engine_options(args) == {"model": "demo"}
    assert sampling_params(args) == SamplingParams(max_tokens=None)


def test_the_options_of_the_fast_paths_become_strategies() -> None:
    def of(line: str) -> dict[str, object]:
        options = engine_options(parse(["generate", "x", *line.split()]))
        assert options.pop("model") == "demo"
        return options

    assert of("") == {}
    assert of("--mtp") == {"decode": MTP()}
    assert of("--mtp 3 --mtp-head f") == {"decode": MTP(3, head="f")}
    assert of("--draft-model d") == {"decode": DraftModel("d")}
    assert of("--draft-model d --num-draft-tokens 5") == {"decode": DraftModel("d", 5)}
    assert of("--prefill-draft d --prefill-keep .3 --prefill-threshold 9 --mtp auto") == {
        "prefill": SpecPrefill("d", keep=0.3, threshold=9),
        "decode": MTP(),
    }


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("generate x --mtp many", "--mtp"),
        ("generate x --mtp --draft-model d", "--mtp"),
        ("generate x --mtp-head f", "--mtp-head"),
        ("generate x --num-draft-tokens 3", "--num-draft-tokens"),
        ("chat --prefill-keep 0.5", "--prefill-keep"),
        ("generate x --top-k many", "--top-k"),
        ("generate x --logit-bias 3", "--logit-bias"),
        ("generate x --max-tokens lots", "--max-tokens"),
        ("generate x --raw --system s", "--system"),
        ("generate x --raw --no-thinking", "--thinking"),
        ("generate x --raw --max-reasoning-tokens 3", "--max-reasoning-tokens"),
        ("chat --max-reasoning-tokens few", "--max-reasoning-tokens"),
        ("generate x --logprobs 1", "--logprobs"),
        ("chat --logprobs 1", "--logprobs"),
        ("generate x --tempe 1", "--tempe"),
        ("info --kv-bits 4", "--kv-bits"),
        ("info --memory-bytes 4", "--memory-bytes"),
        ("info --memory --memory-bytes lots", "--memory-bytes"),
        ("serve --context-length long", "--context-length"),
        ("", "command"),
    ],
)
def test_arguments_that_cannot_be_are_named(
    line: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(line.split())
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_errors_of_the_library_name_the_option_as_it_is_spelled_here() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(stop_token_ids=[-1])
    assert spelled(caught.value).startswith("argument --stop-token-id: must be")
    assert spelled(InvalidRequest("messages", "no")) == "messages: no"


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("--mtp 5", "--mtp"),
        ("--draft-model d --num-draft-tokens 0", "--num-draft-tokens"),
        ("--prefill-draft d --prefill-keep 1.5", "--prefill-keep"),
        ("--prefill-draft d --prefill-threshold -1", "--prefill-threshold"),
    ],
)
def test_so_do_those_of_the_strategies(line: str, option: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine_options(parse(["generate", "x", *line.split()]))
    assert spelled(caught.value).startswith(f"argument {option}: must be")


# ── the fast paths ──────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_a_head_is_extracted_and_decodes(tmp_path: Path) -> None:
    folder = await made(MIMO, tmp_path / "model")
    head = folder / "mtp.safetensors"
    head.unlink()
    code, out, _ = finish(
        *("extract-mtp", str(tmp_path / "model" / "checkpoint"), str(folder)),
        *("--q-bits", "4", "--q-group-size", "32"),
    )
    assert code == 0
    assert out.startswith(f"{head}: MTP head of the mimo family")
    asked = ["generate", "--model", str(folder), "--raw", "hello", "--verbose"]
    code, plain, _ = finish(*asked)
    assert code == 0
    code, answer, said = finish(*asked, "--mtp", "2")
    assert code == 0
    assert answer == plain
    assert re.search(r"\d+ of \d+ proposed tokens were accepted", said)


def test_a_checkpoint_without_a_head_and_a_bad_option_are_told(
    tmp_path: Path, tiny_path: Path
) -> None:
    code, out, said = finish("extract-mtp", str(tiny_path), str(tmp_path))
    assert (code, out) == (2, "")
    assert "llama" in said
    code, out, said = finish("extract-mtp", str(tiny_path), str(tmp_path), "--q-bits", "7")
    assert (code, out) == (2, "")
    assert "argument --q-bits" in said
    assert list(tmp_path.iterdir()) == []


def test_a_draft_model_and_spec_prefill_on_the_command_line(tiny_path: Path) -> None:
    asked = ["generate", "--model", str(tiny_path), "--raw", LONG, "--verbose", *TWELVE]
    code, answer, said = finish(
        *(*asked, "--draft-model", str(tiny_path), "--num-draft-tokens", "3"),
        *("--prefill-draft", str(tiny_path), "--prefill-keep", "0.5", "--prefill-threshold", "9"),
    )
    assert code == 0
    assert answer == "a" * 12 + "\n"
    assert "proposed tokens were accepted" in said
    assert "prompt tokens were prefilled" in said


# ── output ──────────────────────────────────────────────────────────────────────────────────


def test_a_prefill_in_one_chunk_has_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = ProgressBar()
    bar(Progress("load", 5, 5))
    bar(Progress("prefill", 9, 10))
    bar(Progress("prefill", 10, 10))
    shown = capsys.readouterr().err
    assert "load" in shown
    assert shown.endswith("\r"), "the bar before it is cleared"
    assert "prefill" not in shown
    bar(Progress("prefill", 4, 10))
    bar.clear()
    assert "prefill" in capsys.readouterr().err


THOUGHT = (
    GenerationChunk("hm", segment="reasoning"),
    GenerationChunk("", (3,)),
    GenerationChunk("yes"),
)


def test_reasoning_stays_out_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    printer = AnswerPrinter(ProgressBar())
    for chunk in THOUGHT:
        printer(chunk)
    printer.end()
    assert capsys.readouterr().out == "yes\n"
    assert printer.text == "yes"


def test_reasoning_is_dimmed_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printer = AnswerPrinter(ProgressBar())
    for chunk in THOUGHT:
        printer(chunk)
    printer.end()
    printer.end()
    assert capsys.readouterr().out == "\x1b[2mhm\n\x1b[0myes\n"


CALLS = (
    GenerationChunk("hm", segment="reasoning"),
    GenerationChunk("<call>", segment="tool_call", tool_call=ToolCallDelta(0, "1", "weather")),
    GenerationChunk("x", segment="tool_call", tool_call=ToolCallDelta(0, arguments='{"city": ')),
    GenerationChunk("y", segment="tool_call", tool_call=ToolCallDelta(0, arguments='"Paris"}')),
    GenerationChunk("</call>", segment="tool_call"),
    GenerationChunk("<ca", segment="tool_call", tool_call=ToolCallDelta(1, "2", error="cut off")),
)


def test_calls_are_shown_in_a_terminal_by_name_and_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal, shown in (
        (True, '\x1b[2mhm\nweather {"city": "Paris"}\n [cut off]\n\x1b[0m'),
        (False, ""),
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        printer = AnswerPrinter(ProgressBar())
        for chunk in CALLS:
            printer(chunk)
        printer.end()
        assert capsys.readouterr().out == shown
        assert printer.text == ""
