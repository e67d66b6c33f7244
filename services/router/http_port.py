"""The HTTP port that all routers of a machine share, and how one of them leaves it without a connection lost.

Every router has a listening socket of its own on the port (SO_REUSEPORT); the kernel deals new connections out among
them. A socket that is closed resets what it has been dealt and not yet accepted. So a router that leaves first drops
packets that would begin a connection (a socket filter; the client's kernel sends them again after a second, and then
they go to another router), accepts those that are under way, and only then closes.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
from pathlib import Path

from aiohttp import web

from common.service_runner import OperatorError

_SO_ATTACH_FILTER = 26
_BACKLOG = 1024
_LISTENING = "0A"
_LOOK_AGAIN_S = 0.1
# A classic BPF program on the TCP header: load the byte of flags; with SYN set keep 0 bytes of the packet, else all.
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class SharedPort:
    """Bound from the start, so that a port which is not to be had is noticed then; open when `open` was called."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OperatorError when something that is no router has the port."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise OperatorError(f"cannot listen on port {port}: {reason}; choose another with --port") from None
        self.number: int = self._socket.getsockname()[1]
        self._site: web.SockSite | None = None

    async def open(self, runner: web.AppRunner) -> None:
        self._site = web.SockSite(runner, self._socket, backlog=_BACKLOG)
        await self._site.start()

    def has_others(self) -> bool:
        """Whether another router listens on this port now."""
        own, local = os.fstat(self._socket.fileno()).st_ino, f":{self.number:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[1].endswith(local) and int(fields[9]) != own:
                return True
        return False

    async def wait_for_others(self, within_s: float, stop: asyncio.Event) -> bool:
        """Until another process listens too, or ``stop``. False: neither in time."""
        for _ in range(round(within_s / _LOOK_AGAIN_S)):
            if self.has_others() or stop.is_set():
                return True
            await asyncio.sleep(_LOOK_AGAIN_S)
        return False

    async def leave(self, accept_s: float) -> None:
        """No new connections; those that have begun are accepted for another ``accept_s``."""
        if self._site is not None:
            self._refuse_new()
            await asyncio.sleep(accept_s)
            await self._site.stop()
        self._socket.close()

    def _refuse_new(self) -> None:
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
        # Where filters are forbidden, what arrives in the moment of closing is reset.
        with contextlib.suppress(OSError):
            description = struct.pack("HL", len(_DROP_SYN), ctypes.addressof(program))
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, description)
