"""``python -m mlx_engine``."""

from __future__ import annotations

import sys

from mlx_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
