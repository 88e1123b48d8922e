"""What people type at the command, and what it says or takes it for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from mlx_engine.cli.options import parse, whole_parser
from mlx_engine.cli.other_words import COMMANDS, FLAGS, SAID, SAID_OF_ALL
from tests.waiting import PATIENCE

# A line, and what is said of it.
TYPED: dict[tuple[str, ...], str] = {
    (): "a command is missing: generate, chat, host, serve, ",
    ("server",): "there is no command 'server': write mlx-engine serve MODEL",
    ("run", "demo"): "there is no command 'run': write mlx-engine chat MODEL",
    ("claude", "-p", "x"): "write mlx-engine launch claude",
    ("generat", "x"): "there is no command 'generat': write mlx-engine generate",
    ("Say hi",): "write mlx-engine generate 'Say hi'",
    ("foo",): "there is no command 'foo': there are generate, chat, ",
    ("--model", "x", "chat"): "a command comes first, then options such as --model: generate, ",
    ("generate", "demo", "Say hi"): "mlx-engine generate 'Say hi' --model demo",
    ("generate", "Say", "hi", "to me"): "in quotes, .* mlx-engine generate 'Say hi to me'",
    ("generate",): "generate needs PROMPT; 'mlx-engine generate --help' tells of it",
    ("generate", "-m", "demo", "x"): "generate has no option -m: write --model MODEL",
    ("generate", "--max-new-tokens", "5"): "no option --max-new-tokens: write --max-tokens N",
    ("generate", "x", "--max_tokens=5"): "no option --max_tokens: write --max-tokens N",
    ("generate", "x", "-n", "5"): "write --max-tokens N",
    ("generate", "x", "--n", "5"): "a command gives one answer",
    ("generate", "--stream", "x"): "no option --stream: answers are streamed anyway",
    ("generate", "--system-prompt", "be brief", "Hi"): "write --system TEXT",
    ("generate", "--prompt", "Hi"): 'mlx-engine generate "PROMPT"',
    ("generate", "x", "--temprature", "1"): "write --temperature N",
    ("generate", "x", "--n-ctx", "1"): "write --context-length N",
    ("generate", "x", "--response-format", "json"): "--schema FILE makes the answer JSON",
    ("generate", "x", "--port", "1"): "it is an option of serve and launch",
    ("generate", "x", "--foo"): "'mlx-engine generate --help' tells of those it has",
    ("generate", "x", "--dtype", "float16"): "mlx_lm.convert",
    ("serve", "--api-key", "k"): r"\$MLX_ENGINE_API_KEY, or into a file: --api-key-file FILE",
    ("serve", "demo", "--api-key=k"): "can be read by everyone on this machine",
    ("launch", "--api-key", "k", "claude"): r"put the key into \$MLX_ENGINE_API_KEY",
    ("serve", "-p", "80"): "write --port N",
    ("serve", "--bind", "::"): "write --host ADDRESS",
    ("serve", "--max-num-seqs", "4"): "write --max-batch-size N",
    ("serve", "--port", "x"): "argument --port: invalid int value: 'x'",
    ("host", "demo"): "host needs --socket PATH; ",
    ("host", "demo", "--uds", "x"): "write --socket PATH",
    ("host", "-p", "80"): "'mlx-engine host --help' tells of those it has",
    ("chat", "demo", "Say hi"): "mlx-engine generate 'Say hi' --model demo",
    ("chat", "a", "--model", "b"): "one model is enough, and there are two: a and b",
    ("info", "a", "b"): "info takes no b; ",
    ("launch", "--foo", "claude"): "launch has no option --foo: ",
    ("extract-mtp", "a"): "extract-mtp needs OUT; ",
}


@pytest.mark.parametrize("line", TYPED, ids=" ".join)
def test_what_is_said(line: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(line)
    out, said = capsys.readouterr()
    assert not out
    assert re.fullmatch(f"mlx-engine: error: [^\n]*{TYPED[line]}[^\n]*\n", said), said
    assert len(said) < 250


def test_a_process_says_it_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_engine", "server"], capture_output=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().count("\n") == 1


@pytest.mark.parametrize("command", ["chat", "info", "selftest", "host --socket s"])
def test_a_model_needs_no_name_and_may_have_it(command: str) -> None:
    assert parse(command.split()).model == "demo"
    assert parse([*command.split(), "a"]).model == "a"
    assert parse([*command.split(), "--model", "a"]).model == "a"


@pytest.mark.parametrize(
    ("line", "models"),
    [
        ("", []),
        ("a", ["a"]),
        ("a x=b", ["a", "x=b"]),
        ("--port 1 a b", ["a", "b"]),
        ("a --port 1 b --quiet c", ["a", "b", "c"]),
        ("a --model b", ["a", "b"]),
        ("--model b --model a", ["b", "a"]),
    ],
)
def test_a_server_has_as_many_models_as_are_given(line: str, models: list[str]) -> None:
    assert parse(["serve", *line.split()]).models == models


def test_what_is_for_an_agent_is_left_to_it() -> None:
    args = parse(["launch", "--port", "1", "claude", "-m", "x", "--api-key", "k", "--port", "2"])
    assert (args.port, args.arguments) == (1, ["-m", "x", "--api-key", "k", "--port", "2"])
    assert parse(["generate", "x", "--seed", "-1"]).seed == -1
    assert parse(["generate", "-"]).prompt == "-"
    assert parse(["generate", "--", "--stream"]).prompt == "--stream"


def test_nobody_is_sent_to_what_there_is_not() -> None:
    commands = whole_parser().commands
    for written in COMMANDS.values():
        assert written == "--version" or written.split()[0] in commands
    flags = {name: parser.flags() for name, parser in commands.items()}
    there = set().union(*flags.values())
    for name, ours in FLAGS.items():
        assert there.issuperset(ours), name
        assert f"--{name}" not in there, name
    for command, name in SAID:
        assert f"--{name}" not in flags[command], name
    for name in SAID_OF_ALL:
        assert f"--{name}" not in there, name
