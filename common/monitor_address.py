"""One address configures a process: the monitor's four ports lie side by side. With it goes the cluster's key."""

from dataclasses import dataclass, field

from common.cluster_key import ClusterKey

_ALL_INTERFACES, _LOOPBACK = "*", "127.0.0.1"


@dataclass(frozen=True, slots=True)
class MonitorAddress:
    """``port`` control (ROUTER), ``+1`` lifeline (plain TCP), ``+2`` bus XSUB (publish), ``+3`` XPUB (subscribe)."""

    host: str
    port: int
    key: ClusterKey | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, key: ClusterKey | None = None) -> "MonitorAddress":
        """``HOST:PORT``; raises ValueError that says so."""
        host, _, port = text.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65533:
            raise ValueError(f"monitor address must be HOST:PORT with a port below 65533, got {text!r}")
        return cls(host, int(port), key)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def control(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def lifeline_port(self) -> int:
        return self.port + 1

    @property
    def publish(self) -> str:
        return f"tcp://{self.host}:{self.port + 2}"

    @property
    def subscribe(self) -> str:
        return f"tcp://{self.host}:{self.port + 3}"


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def interface_for(host: str) -> str:
    """Where a process listens that others reach as ``host``: a name that only this machine knows needs no more."""
    return _LOOPBACK if is_loopback(host) else _ALL_INTERFACES
