"""What every result file says about where it comes from."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def results_path(name: str, suffix: str = "") -> Path:
    """Where a measurement of today is kept, unless told otherwise."""
    return Path("benchmarks/results") / f"{name}_{today()}{suffix}"


def provenance() -> dict[str, str]:
    """Hardware, date, commit, command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    dirty = " with uncommitted changes" if changed.stdout.strip() else ""
    return {
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "date": today(),
        "commit": (commit.stdout.strip() or "unknown") + dirty,
        "command": f"python -m {_module()} {' '.join(sys.argv[1:])}".strip(),
        "python": platform.python_version(),
        "load_average_before": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _module() -> str:
    path = Path(sys.argv[0]).resolve()
    return (
        ".".join(path.with_suffix("").relative_to(Path.cwd()).parts) if path.is_relative_to(Path.cwd()) else str(path)
    )
