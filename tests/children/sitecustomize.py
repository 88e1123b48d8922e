"""In the processes that tests start: half of what the import of transformers does is remembered.

Each time it reads its 1,700 files of models, to see what is where, and finds the same. Python
imports this module as it starts, since the tests have its folder in ``PYTHONPATH``; what the
first process finds is kept in a folder that the environment names.

And if ``tests.way`` has started it, it can be told to record where a request goes.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = os.environ.get("MLX_ENGINE_TEST_IMPORTS")
_MODULE = "transformers.utils.import_utils"


class _Remembering(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads that one module as ever, and wraps the function in it."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is not None and found.loader is not None:
            self._loader, found.loader = found.loader, self
        return found

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        look = module.define_import_structure
        module.define_import_structure = lambda *args, **named: _remembered(look, args, named)


def _remembered(look: Any, args: Any, named: Any) -> Any:
    assert _FOLDER is not None
    asked = repr((args, named))
    file = Path(_FOLDER, hashlib.sha256(asked.encode()).hexdigest())
    try:
        return pickle.loads(file.read_bytes())
    except OSError:
        found = look(*args, **named)
    try:
        draft = Path(f"{file}-{os.getpid()}")
        draft.write_bytes(pickle.dumps(found))
        draft.replace(file)
    except OSError:
        pass  # the tests are over
    return found


if _FOLDER:
    sys.meta_path.insert(0, _Remembering())
if "MLX_ENGINE_TEST_WAY" in os.environ:
    from tests.recorder import follow

    follow()
