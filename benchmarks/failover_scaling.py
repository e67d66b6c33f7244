"""The group grown and shrunk under load, decode ranks and prefill workers."""

import time
from pathlib import Path

from benchmarks.failover_report import Window
from common.fault_answers import proof_of
from services.cli.fault import FaultClient, scale_event
from services.cli.run_directory import monitor_address

_BEFORE_S, _AFTER_S = 3.0, 3.0  # joins and moves of requests go on for a moment after the command is done


def run_scalings(run_dir: Path, steps: list[tuple[int, int]]) -> list[Window]:
    """``steps``: decode ranks and prefill workers wanted, one after the other."""
    windows = []
    with FaultClient(monitor_address(run_dir)) as bus:
        for decode, prefill in steps:
            start = time.monotonic()
            time.sleep(_BEFORE_S)
            name, at = f"scale to {decode} ranks, {prefill} prefill", time.monotonic()
            windows.append(Window(name, False, start, at))
            answer = bus.inject(scale_event(decode, prefill))
            if answer["status"] != "done":
                raise RuntimeError(f"{name}: {proof_of(answer)}")
            done = time.monotonic()
            time.sleep(_AFTER_S)
            windows.append(Window(name, True, at, time.monotonic()))
            print(f"{name}: done after {done - at:.1f} s: {proof_of(answer)}", flush=True)
    return windows
