"""Tells how many interleavings there were."""

from __future__ import annotations

import pytest

from tests.sweep.simulation import Simulation


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Simulation.runs:
        terminalreporter.write_line(f"cancellation sweep: {Simulation.runs} interleavings")
