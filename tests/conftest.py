"""Leak checks for every test, and who may skip: only what the machine cannot run, and the summary counts it."""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

from kernels.cpu.build import build

# How long an example takes says something of the machine only, which may be busy or slow.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
pytest_plugins = ["tests.leak_checks"]


def has_gpu() -> bool:
    """Without importing torch, which most tests do without."""
    return importlib.util.find_spec("torch") is not None and Path("/dev/nvidiactl").exists()


NEEDS = {
    "gpu": (has_gpu, "needs an NVIDIA GPU"),
    "root": (lambda: os.geteuid() == 0, "needs to run as root"),
}


def pytest_sessionstart() -> None:
    """The sources at hand are tested, and not what was built from older ones."""
    build()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (is_met, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not is_met():
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = Counter(
        marker for report in terminalreporter.stats.get("skipped", []) for marker in NEEDS if marker in report.keywords
    )
    for marker, number in sorted(skipped.items()):
        terminalreporter.write_line(f"{number} skipped: {NEEDS[marker][1]}")
