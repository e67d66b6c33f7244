"""Rank processes that do as the parent says, one call at a time; the parent touches no GPU and may kill them."""

import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

CALL_TIMEOUT_S = 120.0


def _serve(connection: Connection, device: int) -> None:
    # After the start: they initialise CUDA.
    from benchmarks.kernels.check_rank import CheckRank
    from benchmarks.kernels.fault_rank import FaultRank

    class Rank(CheckRank, FaultRank):
        """Everything that a rank can be told to do."""

    rank = Rank(device)
    while True:
        name, arguments = connection.recv()
        try:
            connection.send((True, getattr(rank, name)(**arguments)))
        except Exception as error:
            connection.send((False, f"{name}: {type(error).__name__}: {error}"))


class RankProcess:
    """One rank, or a standby that may become one."""

    def __init__(self, device: int) -> None:
        context = get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, device), daemon=True)
        self._process.start()
        child.close()

    def start(self, name: str, /, **arguments: Any) -> None:
        self._connection.send((name, arguments))

    def finish(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """What the call returned. RuntimeError if it raised, hangs or died."""
        if not self._connection.poll(timeout_s):
            raise RuntimeError("a rank does not answer")
        try:
            good, result = self._connection.recv()
        except EOFError:
            raise RuntimeError("a rank died") from None
        if not good:
            raise RuntimeError(result)
        return result

    def call(self, name: str, /, **arguments: Any) -> Any:
        self.start(name, **arguments)
        return self.finish()

    def kill(self) -> None:
        """SIGKILL, and wait until it is reaped."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._connection.close()


def call_all(ranks: list[RankProcess], name: str, /, **arguments: Any) -> list[Any]:
    """The same call on every rank, at the same time."""
    for rank in ranks:
        rank.start(name, **arguments)
    return [rank.finish() for rank in ranks]
