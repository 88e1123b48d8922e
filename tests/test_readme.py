"""What the README and the guide promise, done."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_lm.generate import stream_generate

import mlx_engine
from mlx_engine import SimpleEngine
from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "mlx_engine" / "guide").glob("*.md"))]
LINKED = [*PAGES, ROOT / "tests" / "README.md", ROOT / "benchmarks" / "README.md"]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


BLOCKS = [(page.name, block) for page in PAGES for block in blocks(page)]
TOUR = BLOCKS[0][1]


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_to_headings_in_them(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in _anchors(there), target


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_links_to_every_topic() -> None:
    text = README.read_text("utf-8")
    for page in PAGES[1:]:
        assert f"[{page.stem}]({page.relative_to(ROOT)})" in text


@pytest.mark.anyio
@pytest.mark.parametrize(("page", "block"), BLOCKS[1:])
async def test_the_other_blocks_run(page: str, block: str, tiny_path: Path) -> None:
    for name in ("model", "small"):
        block = block.replace(f'"{name}"', repr(str(tiny_path)))
    code = compile(block, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, object] = {name: getattr(mlx_engine, name) for name in mlx_engine.__all__}
    names["prompt"] = [1, 2, 3] * 100
    running = eval(code, names)
    if running is not None:
        await running


@pytest.mark.demo
def test_the_tour_runs(tmp_path: Path) -> None:
    script = tmp_path / "tour.py"
    script.write_text(TOUR, "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Paris" in lines[0]
    assert "too slow; next, please" in lines
    assert "100.0" in lines
    assert sum("GenerationResult(" in line for line in lines) == 2
    again = [line for line in lines if line.endswith("prompt tokens")]
    assert not again[1].startswith("0 of"), "the second time, the prompt cache has it"


@pytest.mark.demo
@pytest.mark.anyio
async def test_the_demo_model_gives_the_tokens_of_mlx_lm() -> None:
    prompt = "The capital of France is"

    def raw() -> list[int]:
        loaded = engine._holder.model()
        answer = stream_generate(loaded.model, loaded.tokenizer, prompt, max_tokens=24)
        return [response.token for response in answer]

    async with SimpleEngine("demo") as engine:
        expected = await engine.run_blocking(raw)
        async with engine.stream_generate(prompt, max_tokens=24) as stream:
            streamed = [token async for chunk in stream for token in chunk.tokens]
        assert streamed == expected
        assert "Paris" in stream.result.text
        answer = await engine.chat(
            [{"role": "user", "content": "What is the capital of France?"}], max_tokens=24
        )
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"
