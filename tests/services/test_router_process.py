"""The router as a process: its exit codes and what it says when it cannot start."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "services.router", "--monitor-address", "127.0.0.1:9", "--host", "127.0.0.1"]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_port_in_use_is_one_clear_line_and_exit_2() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = _start("--port", str(port))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines() == [
        f"regrow router: error: cannot listen on port {port}: it is in use; choose another with --port"
    ]


def test_sigterm_ends_a_router_that_never_found_its_monitor() -> None:
    process = _start()
    assert process.stderr is not None
    while "listening on" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors
