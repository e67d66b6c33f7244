"""The compiled CPU kernels on each instruction set that this processor has: the bits must be the same."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from kernels.cpu import library
from kernels.cpu.artifacts import LEVELS
from kernels.cpu.library import open_level

HERE = [level for level in LEVELS if open_level("base").regrow_has_level(level.encode())]


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Every wrapper calls the library of this instruction set; an object with a table of functions keeps its own."""
    chosen = open_level(level)
    with patch.object(library, "_library", lambda: chosen):
        _forget_functions()
        yield
    _forget_functions()


def _forget_functions() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.cpu."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
