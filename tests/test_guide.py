"""The guide, as the command shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_engine.cli import guide
from mlx_engine.cli import help as help_command
from mlx_engine.cli.options import parse
from tests.conftest import ROOT
from tests.waiting import PATIENCE

PAGES = sorted((ROOT / "mlx_engine" / "guide").glob("*.md"))


def test_help_lists_every_topic_with_its_first_line_and_does_not_import_mlx() -> None:
    code = (
        "import sys\nfrom mlx_engine.cli import main\nassert main(['help']) == 0\n"
        "print([m for m in ('mlx', 'mlx_lm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE)
    *topics, blank, hint, imported = done.stdout.decode().splitlines()
    assert (blank, hint, imported) == ("", "mlx-engine help TOPIC shows one.", "[]")
    told = [tuple(line.split(maxsplit=1)) for line in topics]
    assert told == [
        (page.stem, page.read_text("utf-8").splitlines()[0].removeprefix("# ")) for page in PAGES
    ]
    assert max(map(len, topics)) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_help_shows_a_topic(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert help_command.run(parse(["help", page.stem])) == 0
    assert capsys.readouterr().out == page.read_text("utf-8")


@pytest.mark.parametrize(
    ("word", "topic"),
    [
        ("cancelation", "cancellation"),
        ("Cancellation", "cancellation"),
        ("trouble-shooting", "troubleshooting"),
        ("prompt-caching", "prompt-cache"),
        ("selftest", "command-line"),
        ("fastapi", "deploying"),
        ("vllm", "from-vllm-mlx"),
        ("ray", "engines-elsewhere"),
        ("BatchedEngine", "batching"),
    ],
)
def test_a_word_that_means_one_topic_shows_it(
    word: str, topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert help_command.run(parse(["help", word])) == 0
    shown, said = capsys.readouterr()
    assert shown == guide.text(topic)
    assert said == f"mlx-engine: there is no topic {word!r}; this is from {topic!r}\n"


def test_a_word_of_one_heading_shows_what_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_command.run(parse(["help", "map"])) == 0
    shown, said = capsys.readouterr()
    assert "this is from 'batching'" in said
    assert shown.startswith("## Jobs: `map`")
    assert shown in guide.text("batching")
    assert shown.count("\n## ") == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("temperature", "near is '"),
        ("mtp", "near are 'command-line', 'faster-decoding' ("),
        ("what", "near are 'cancellation', "),
    ],
)
def test_other_words_are_usage_errors_that_name_what_is_near(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["help", word])
    line = capsys.readouterr().err
    assert f"argument TOPIC: there is no topic {word!r}; {said}" in line


def test_any_word_has_a_nearest_topic() -> None:
    for word in ("", "zzz", "x" * 1000, "\n"):
        assert guide.nearest(word) in guide.topics()
