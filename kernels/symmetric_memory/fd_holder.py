"""Keeps file descriptors of heaps for ranks that come and go: memory lives as long as somebody holds a descriptor.

The holder never touches CUDA. A connection carries one request, a line of JSON; a descriptor travels beside it
(SCM_RIGHTS). Whoever puts or owns a heap keeps its connection open; the kernel closes it with the process, and not
before, so a heap never has two owners. The owner's kernels may outlive its connection by a moment: reap the process
before another one attaches (PROTOCOL 7.2).
"""

import json
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.symmetric_memory.base import HeapError

_MAX_REQUEST_BYTES = 4096
_TIMEOUT_S = 10.0


@dataclass
class _Held:
    fd: int
    nbytes: int
    is_owned: bool


class FdHolder:
    """Serves on the Unix socket ``path`` from ``open`` (here: construction) to ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Give up every descriptor: memory that nobody maps is freed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        with self._lock:  # a thread takes its connection out under the lock before it closes it: those here are open
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for held in self._held.values():
            os.close(held.fd)
        self._held.clear()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        owned = ""
        with connection:
            try:
                request, fds, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 1)
                answer, given, owned = self._answer(json.loads(request or b"{}"), fds)
                try:
                    socket.send_fds(connection, [json.dumps(answer).encode()], given)
                finally:
                    for fd in given:
                        os.close(fd)
                if owned:
                    connection.recv(1)  # until the owner's end closes
            except OSError:
                pass
            finally:
                with self._lock:
                    self._connections.discard(connection)
                    if owned and owned in self._held:
                        self._held[owned].is_owned = False

    def _answer(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int], str]:
        """The answer, a duplicate of the descriptor that goes with it (the heap may be unlinked before it is sent), and
        the name that the asker owns from now on."""
        name, verb = str(request.get("name", "")), request.get("verb")
        with self._lock:
            held = self._held.get(name)
            if verb == "put" and fds:
                if held is not None:
                    os.close(fds[0])
                    return {"error": f"heap {name!r} exists already: attach it, or unlink it first"}, [], ""
                self._held[name] = _Held(fds[0], int(request["nbytes"]), True)
                return {}, [], name
            if verb == "unlink":
                if held is not None:
                    os.close(self._held.pop(name).fd)
                return {}, [], ""
            if held is None:
                return {"error": f"heap {name!r} does not exist: its owner has unlinked it"}, [], ""
            if verb == "own":
                if held.is_owned:
                    return {"error": f"heap {name!r} is still owned by a living process: reap it first"}, [], ""
                held.is_owned = True
                return {"nbytes": held.nbytes}, [os.dup(held.fd)], name
            return {"nbytes": held.nbytes}, [os.dup(held.fd)], ""


class HolderClient:
    """A rank's side. Keeps the connections of what it owns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owning: list[socket.socket] = []

    def put(self, name: str, nbytes: int, fd: int) -> None:
        """Give the holder a new heap's descriptor (it keeps a duplicate) and own the heap."""
        connection, _, _ = self._ask({"verb": "put", "name": name, "nbytes": nbytes}, [fd])
        self._owning.append(connection)

    def own(self, name: str) -> tuple[int, int]:
        """Descriptor and nbytes of a heap whose owner has gone; HeapError while it has an owner."""
        connection, nbytes, fd = self._ask({"verb": "own", "name": name}, [])
        self._owning.append(connection)
        return fd, nbytes

    def get(self, name: str) -> tuple[int, int]:
        """Descriptor and nbytes of a peer's heap."""
        connection, nbytes, fd = self._ask({"verb": "get", "name": name}, [])
        connection.close()
        return fd, nbytes

    def unlink(self, name: str) -> None:
        self._ask({"verb": "unlink", "name": name}, [])[0].close()

    def close(self) -> None:
        for connection in self._owning:
            connection.close()
        self._owning.clear()

    def _ask(self, request: dict[str, Any], fds: list[int]) -> tuple[socket.socket, int, int]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(str(self.path))
            socket.send_fds(connection, [json.dumps(request).encode()], fds)
            data, received, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 1)
        except OSError as error:
            connection.close()
            raise HeapError(f"the holder of heaps at {self.path} does not answer ({error}): is it running?") from None
        answer = json.loads(data or b'{"error": "the holder of heaps is closing"}')
        if "error" in answer:
            connection.close()
            raise HeapError(answer["error"])
        return connection, int(answer.get("nbytes", 0)), received[0] if received else -1
