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
        ("mtp", "faster-decoding"),
        ("ray", "engines-elsewhere"),
    ],
)
def test_an_unknown_topic_is_a_usage_error_that_names_the_nearest(
    word: str, topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["help", word])
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument TOPIC: there is no topic {word!r}; the nearest is {topic!r}" in said


def test_any_word_has_a_nearest_topic() -> None:
    for word in ("", "zzz", "x" * 1000, "\n"):
        assert guide.nearest(word) in guide.topics()
