"""What the command takes as a constraint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_engine.cli import generate
from mlx_engine.cli.flags import spelled
from mlx_engine.cli.options import parse, sampling_params
from mlx_engine.constraints import Choice, Grammar, JSONSchema, Regex
from mlx_engine.errors import InvalidRequest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


def constraint(*args: str) -> Any:
    return sampling_params(parse(["generate", "x", *args])).constraint


def test_each_argument_is_a_constraint(file: Path) -> None:
    assert constraint() is None
    assert constraint("--regex", r"\d+") == Regex(r"\d+")
    assert constraint("--choice", "yes", "--choice", "no") == Choice(["yes", "no"])
    file.write_text('{"type": "object"}')
    assert constraint("--schema", str(file)) == JSONSchema({"type": "object"})
    file.write_text('start: "é"', "utf-8")
    assert constraint("--grammar", str(file)) == Grammar('start: "é"')


def test_there_is_one_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        constraint("--regex", "a", "--choice", "b")
    said = capsys.readouterr().err.splitlines()[-1]
    assert "argument --choice: not allowed with argument --regex" in said


@pytest.mark.parametrize("option", ["schema", "grammar"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot read .*: No such file or directory"),
        (b"\xff", "is not UTF-8 text"),
        (b" " * (2**24 + 1), "has more than 16777216 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    file: Path, option: str, data: bytes | None, words: str
) -> None:
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InvalidRequest, match=words) as caught:
        constraint(f"--{option}", str(file))
    assert spelled(caught.value).startswith(f"argument --{option}: ")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "3", "[]", '"text"'])
def test_a_file_without_a_schema_is_told_as_that(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        constraint("--schema", str(file))
    assert spelled(caught.value).startswith("argument --schema: ")


def test_the_answer_is_bound(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "Well?", "--model", str(tiny_path), "--raw"]
    assert generate.run(parse([*line, "--choice", "yes", "--choice", "no"])) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    assert generate.run(parse([*line, "--regex", "[0-9]{3}", "--json"])) == 0
    result = json.loads(capsys.readouterr().out)
    assert re.fullmatch("[0-9]{3}", result["text"])
    assert result["finish_reason"] == "stop"


def test_what_cannot_be_enforced_is_told_of_the_argument(tiny_path: Path, file: Path) -> None:
    file.write_text("start: nothing")
    line = ["generate", "Well?", "--model", str(tiny_path), "--grammar", str(file)]
    with pytest.raises(InvalidRequest) as caught:
        generate.run(parse(line))
    assert spelled(caught.value).startswith("argument --grammar: ")
