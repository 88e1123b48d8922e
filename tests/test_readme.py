"""What the README promises, done."""

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

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_tree_names_every_file_and_no_other() -> None:
    tree = README.split("## What is where")[1].split("## Developing")[0]
    named = set(re.findall(r"[\w_]+\.py", tree))
    modules = {path.name for path in (ROOT / "mlx_engine").rglob("*.py")}
    missing = modules - named - {"__init__.py", "__main__.py"} - _cli_modules()
    assert not missing, f"the README's tree does not name {missing}"
    assert named <= modules | {"guard.py"}


def _cli_modules() -> set[str]:
    return {path.name for path in (ROOT / "mlx_engine" / "cli").glob("*.py")}


@pytest.mark.anyio
@pytest.mark.parametrize("block", blocks("python")[1:])
async def test_the_other_blocks_run(block: str, tiny_path: Path) -> None:
    for name in ("model", "small"):
        block = block.replace(f'"{name}"', repr(str(tiny_path)))
    code = compile(block, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, object] = {name: getattr(mlx_engine, name) for name in mlx_engine.__all__}
    names["prompt"] = [1, 2, 3] * 100
    running = eval(code, names)
    if running is not None:
        await running


@pytest.mark.demo
def test_the_tour_runs(tmp_path: Path) -> None:
    tour = blocks("python")[0]
    script = tmp_path / "tour.py"
    script.write_text(tour, "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Paris" in lines[0]
    assert "too slow; next, please" in lines
    assert "100.0" in lines
    assert sum("GenerationResult(" in line for line in lines) == 3
    again = [line for line in lines if line.endswith("prompt tokens")]
    assert not again[1].startswith("0 of"), "the second time, the prompt cache has it"


@pytest.mark.demo
@pytest.mark.anyio
async def test_the_demo_model_gives_the_tokens_of_mlx_lm() -> None:
    prompt = "The capital of France is"

    def raw() -> list[int]:
        loaded = engine._slot.get()
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
