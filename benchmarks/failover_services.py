"""Monitor, planner and agent killed and stopped under load: processes that no token passes through.

Each fault has a window, and before it an equally long one without a fault, under the same load in the same minute: so
what is compared differs in the fault alone. A fault counts only when /proc shows it (another pid, state T).
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.failover_report import Window
from common.process_table import processes_of, state_of

KINDS, ACTIONS = ("monitor", "planner", "agent"), ("kill", "stop")
WINDOW_S = 10.0
_STOP_S, _EFFECT_S, _BACK_S = 5.0, 5.0, 30.0  # a stop is longer than any deadline of the group


def run_faults(run_dir: Path, kinds: tuple[str, ...], repeats: int) -> list[Window]:
    windows = []
    for _ in range(repeats):
        for kind in kinds:
            for action in ACTIONS:
                at = time.monotonic()
                time.sleep(WINDOW_S)
                windows.append(Window(f"{action} {kind}", False, at, time.monotonic()))
                at = time.monotonic()
                _inject(run_dir, kind, action)
                time.sleep(max(0.0, at + WINDOW_S - time.monotonic()))
                windows.append(Window(f"{action} {kind}", True, at, at + WINDOW_S))
                print(f"{action} {kind}: done", flush=True)
    return windows


def _inject(run_dir: Path, kind: str, action: str) -> None:
    pid = _pid_of(run_dir, kind)
    if action == "kill":
        os.kill(pid, signal.SIGKILL)
        _until(lambda: _pid_of(run_dir, kind) not in (0, pid), _BACK_S, f"no other {kind} was started")
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        _until(lambda: state_of(pid) == "T", _EFFECT_S, f"the {kind} does not stand still")
        time.sleep(_STOP_S)
        assert state_of(pid) == "T", f"somebody else woke the {kind}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _until(is_so: Callable[[], bool], within_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} within {within_s:.0f} s")
        time.sleep(0.01)


def _pid_of(run_dir: Path, kind: str) -> int:
    """0 while there is none."""
    return next((found.pid for found in processes_of(run_dir) if found.kind == kind), 0)
