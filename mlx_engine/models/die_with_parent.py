"""A command that ends when the process that wanted it ends: ``die_with_parent.py COMMAND...``.

Its standard input is a pipe that its parent holds and never writes to. The end of that pipe is
the parent's end, however it came about; then this process and the command are killed. A
download would otherwise go on for minutes for nobody.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Run the command in this process's group, and give its exit code."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()
    code = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)


def _wait_for_the_end() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
