"""Builds the compiled CPU kernels beside their sources:  python -m kernels.cpu.build

One library for each instruction set that may be met, so that what was built on one machine runs on another, with the
same bits. `make setup` and `pip install` do it as well (setup.py). Needs a C compiler: gcc or clang, or what the
environment variable CC names. Imports nothing but the standard library: it runs before anything is installed.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from kernels.cpu.artifacts import FOLDER, LEVELS, library_path, sources_digest

# One rounding for each operation that the source names, fused only where it says so: that is the meaning of bits.
_EXACT = ["-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]
_LIBRARY = ["-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
_FLAGS = ["-O3", "-std=gnu11", *_EXACT, *_LIBRARY, "-Wall", "-Wextra", "-Wno-psabi"]


def build() -> list[Path]:
    """Compiles what is missing or stale; the paths of all libraries. RuntimeError when that fails."""
    digest, compiler = sources_digest(), shlex.split(os.environ.get("CC", "cc"))
    paths = []
    for level, flags in LEVELS.items():
        path = library_path(level)
        if not path.exists() or digest.encode() not in path.read_bytes():
            _compile([*compiler, *_FLAGS, *flags, f'-DREGROW_SOURCES="{digest}"'], path)
        paths.append(path)
    return paths


def _compile(command: list[str], path: Path) -> None:
    # A process that runs keeps the file that it has mapped; nobody sees half a file.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    sources = [str(source) for source in sorted(FOLDER.glob("*.c"))]
    try:
        done = subprocess.run([*command, *sources, "-o", str(unfinished), "-lm"], capture_output=True, text=True)
    except OSError as error:
        reason = f"no C compiler ({command[0]}: {error.strerror})"
        raise RuntimeError(f"{reason}: install gcc and the C library's headers, or name a compiler in CC") from None
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    unfinished.replace(path)


if __name__ == "__main__":
    try:
        for built in build():
            print(built)
    except RuntimeError as failure:
        sys.exit(f"kernels.cpu: {failure}")
