"""A cluster for the time of a demonstration or a measurement: started with ``regrow up``, gone afterwards."""

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from services.cli.run_directory import RunDirectory
from services.cli.up import agent_environment

_STOP_S = 60.0
_PR_SET_PDEATHSIG = 1


class ClusterDidNotStart(Exception):
    """``regrow up`` ended before it was ready; it has said why on stderr."""


@contextlib.contextmanager
def temporary_cluster(
    run_dir: Path, model: Path, decode_ranks: int, prefill_workers: int, *options: str
) -> Iterator[str]:
    """Its address, once it is ready. ``options`` are further ones of ``regrow up``. Raises ClusterDidNotStart."""
    port, libc = _free_port(), ctypes.CDLL(None)
    command = [sys.executable, "-m", "services.cli", "up", "--port", str(port), "--run-dir", str(run_dir)]
    command += ["--decode-ranks", str(decode_ranks), "--prefill-workers", str(prefill_workers), "--model", str(model)]
    process = subprocess.Popen(
        [*command, *options],
        env=agent_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C comes here, and the cluster is stopped once
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            RunDirectory.acquire(run_dir).remove_left_over()
        if process.stdout is not None:
            process.stdout.close()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    assert process.stdout is not None
    # `regrow up` has a deadline of its own for this, and says why when it passes.
    for line in process.stdout:
        if line.decode().strip() == f"ready {url}":
            return
    raise ClusterDidNotStart("the cluster did not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
