"""One address configures a process: the monitor's four ports lie side by side."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MonitorAddress:
    """``port`` control (ROUTER), ``+1`` lifeline (plain TCP), ``+2`` bus XSUB (publish), ``+3`` XPUB (subscribe)."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "MonitorAddress":
        """``HOST:PORT``; raises ValueError that says so."""
        host, _, port = text.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65533:
            raise ValueError(f"monitor address must be HOST:PORT with a port below 65533, got {text!r}")
        return cls(host, int(port))

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
