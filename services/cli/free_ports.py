"""Ports for a new cluster: the monitor's four in a row, and whether the HTTP port is to be had."""

import errno
import socket
from pathlib import Path
from random import Random

from common.service_runner import OperatorError

_NUM_MONITOR_PORTS = 4
_LOWEST = 10_000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int) -> bool:
    """Whether all interfaces can be bound now. Like a server, it disregards connections that linger in TIME_WAIT."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            # Binding alone would succeed beside another socket that has bound with SO_REUSEADDR but not listened yet.
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def require_free(port: int) -> None:
    """Raises OperatorError when ``port`` is in use."""
    if not 0 < port < 65536:
        raise OperatorError(f"port must be from 1 to 65535, got {port}")
    if not is_free(port):
        raise OperatorError(f"port {port} is in use; choose another with --port")


def pick_monitor_port(rng: Random, taken: int) -> int:
    """The first of four free ports outside the range from which the kernel draws ports for outgoing connections.

    From that range, one of them could be gone whenever a monitor is started again. ``taken``: a port to stay clear of.
    """
    first_ephemeral = int(_EPHEMERAL_RANGE.read_text().split()[0])
    highest = max(first_ephemeral, _LOWEST + 1000) - _NUM_MONITOR_PORTS
    for _ in range(200):
        first = rng.randrange(_LOWEST, highest)
        ports = range(first, first + _NUM_MONITOR_PORTS)
        if taken not in ports and all(is_free(port) for port in ports):
            return first
    raise OperatorError(f"found no four free ports in a row between {_LOWEST} and {highest}")
