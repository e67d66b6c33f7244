"""Which living processes belong to a run directory, as /proc tells.

Every process that an agent starts carries its run directory and its process id (with 64 random bits) on its command
line. So there is no file to keep in step with the truth: whoever comes after a crash asks the kernel, and a reused pid
cannot be mistaken for one of ours.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.ids import ProcessId

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class FoundProcess:
    """A living process (zombies have no command line and are not found)."""

    pid: int
    kind: str
    name: str
    process: ProcessId


def processes_of(run_dir: Path) -> list[FoundProcess]:
    """All processes started for ``run_dir``, an absolute path, by pid."""
    pids = sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    return [found for pid in pids if (found := _identify(pid, run_dir)) is not None]


def _identify(pid: int, run_dir: Path) -> FoundProcess | None:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None  # gone meanwhile
    process = _option(words, "--process-id")
    if not process or _option(words, "--run-dir") != str(run_dir):
        return None
    kind = next((word.removeprefix("services.") for word in words if word.startswith("services.")), "")
    return FoundProcess(pid, kind, _option(words, "--name"), ProcessId(process))


def _option(words: list[str], name: str) -> str:
    return next((value for word, value in pairwise(words) if word == name), "")


def open_pidfd(found: FoundProcess, run_dir: Path) -> int | None:
    """A descriptor of exactly this process, or None when it is gone; the caller closes it."""
    try:
        pidfd = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return None
    # The descriptor holds the pid's present owner fast; only now is it worth looking who that is.
    if _identify(found.pid, run_dir) == found:
        return pidfd
    os.close(pidfd)
    return None


def send_signal(pidfd: int, number: signal.Signals) -> bool:
    """False when the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def state_of(pid: int) -> str:
    """The letter of /proc/PID/stat (R, S, D, T, Z, ...); of a stopping process only once all its threads stand."""
    letters = set(_thread_states(pid))
    if "T" in letters and len(letters) > 1:
        return min(letters - {"T"})
    return min(letters, default="")


def _thread_states(pid: int) -> Iterator[str]:
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return
    for thread in threads:
        try:
            # The command in parentheses may itself hold spaces and parentheses.
            yield (thread / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
