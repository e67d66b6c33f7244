"""``regrow agent``: the first process of a container, one child of one role. Becomes the agent, so it keeps its pid."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from common.cluster_key import read_key
from common.ids import make_process_id
from common.monitor_address import MonitorAddress
from common.process_args import ProcessArgs
from common.service_runner import OperatorError
from services.cli.up import agent_command, agent_environment

ROLES = ("monitor", "router", "prefill", "decode", "planner")
_RESOLVE_S = 60.0


@dataclass(frozen=True, slots=True)
class ContainerOptions:
    role: str
    monitor_address: str
    host: str  # empty: the address from which this machine reaches the monitor
    config: Path | None
    heap_dir: Path
    port: int
    key_file: Path | None
    admin_token_file: Path | None


def run_agent(options: ContainerOptions) -> None:
    """Does not return. Raises OperatorError on options that make no sense."""
    if options.role not in ROLES:
        raise OperatorError(f"unknown role {options.role!r}; the roles are {', '.join(ROLES)}")
    key = read_key(options.key_file) if options.key_file is not None else None
    monitor = MonitorAddress.parse(options.monitor_address, key)
    host = options.host or _address_towards(monitor)
    # Several agents may share a machine; a container has one, and keeps its name when it is started again.
    place = socket.gethostname() if os.getpid() == 1 else f"{socket.gethostname()}-{os.getpid()}"
    name = f"agent-{place}"
    args = ProcessArgs(
        kind="agent",
        monitor_address=monitor,
        host=host,
        name=name,
        process_id=make_process_id(name, SystemRandom().getrandbits(64)),
        agent="",
        config=options.config,
        heap_dir=options.heap_dir,
        port=options.port,
        run_dir=None,
        admin_token_file=options.admin_token_file,
    )
    command = agent_command(args, [f"{options.role}-{place}"])
    os.execve(command[0], command, agent_environment())


def _address_towards(monitor: MonitorAddress) -> str:
    """This machine's address in the network of the monitor, whose name may take a while to be known."""
    deadline = time.monotonic() + _RESOLVE_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        while True:
            try:
                probe.connect((monitor.host, monitor.port))  # sends nothing: it only asks for a route
            except OSError as error:
                if time.monotonic() > deadline:
                    raise OperatorError(f"cannot find the monitor's host {monitor.host!r}: {error.strerror}") from None
                time.sleep(0.2)
            else:
                address: str = probe.getsockname()[0]
                return address
