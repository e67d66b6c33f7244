"""The command line of every process that an agent starts: ``python -m services.KIND`` with the options below.

Only addresses, names and paths are given this way. Sizes and deadlines come from the monitor's welcome; the monitor
itself reads them from ``--config``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.cluster_key import ClusterKey, read_key
from common.ids import ProcessId
from common.monitor_address import MonitorAddress

DEFAULT_HEAP_DIR = Path("/dev/shm")
CHILDREN_FILE = "children.json"  # in the run directory: how many of each kind were asked for since the start


@dataclass(frozen=True, slots=True)
class ProcessArgs:
    """``process_id`` is empty when nobody chose one: the process then makes its own (`common.ids.make_process_id`)."""

    kind: str
    monitor_address: MonitorAddress
    host: str  # under which others reach this process
    name: str  # what its agent calls it: "decode-2"
    process_id: ProcessId
    agent: str  # name of the agent that can signal and reap it; empty = none
    config: Path | None
    heap_dir: Path
    port: int  # router: HTTP; others: 0, any free port. The monitor's own port is in monitor_address
    run_dir: Path | None
    admin_token_file: Path | None = None  # router: who may scale and drain over HTTP

    def command_line(self) -> list[str]:
        """The options that `parse_process_args` turns into this value."""
        options = [
            *("--monitor-address", str(self.monitor_address)),
            *("--host", self.host),
            *("--name", self.name),
            *("--process-id", self.process_id),
            *("--agent", self.agent),
            *("--heap-dir", str(self.heap_dir)),
            *("--port", str(self.port)),
        ]
        if self.config is not None:
            options += ["--config", str(self.config)]
        if self.run_dir is not None:
            options += ["--run-dir", str(self.run_dir)]
        if self.monitor_address.key is not None:
            options += ["--key-file", str(self.monitor_address.key.path)]
        if self.admin_token_file is not None:
            options += ["--admin-token-file", str(self.admin_token_file)]
        return options


def process_parser(kind: str) -> argparse.ArgumentParser:
    """The parser of the options above, for those who add some of their own."""
    parser = argparse.ArgumentParser(prog=f"services.{kind}", allow_abbrev=False)
    parser.add_argument("--monitor-address", type=_monitor_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--host", required=True, help="name or address under which others reach this process")
    parser.add_argument("--name", default=kind)
    parser.add_argument("--process-id", default="")
    parser.add_argument("--agent", default="")
    parser.add_argument("--config", type=Path, metavar="FILE.toml")
    parser.add_argument("--heap-dir", type=Path, default=DEFAULT_HEAP_DIR)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--key-file", type=_key, metavar="FILE", help="the key of the cluster; without one it is open")
    parser.add_argument("--admin-token-file", type=Path, metavar="FILE", help="router: the bearer token for /admin")
    return parser


def process_args(kind: str, options: argparse.Namespace) -> ProcessArgs:
    return ProcessArgs(
        kind=kind,
        monitor_address=replace(options.monitor_address, key=options.key_file),
        host=options.host,
        name=options.name,
        process_id=ProcessId(options.process_id),
        agent=options.agent,
        config=options.config,
        heap_dir=options.heap_dir,
        port=options.port,
        run_dir=options.run_dir,
        admin_token_file=options.admin_token_file,
    )


def parse_process_args(kind: str, arguments: Sequence[str] | None = None) -> ProcessArgs:
    """Reads ``arguments`` (None = those of this process). On nonsense prints one line and exits with code 2."""
    return process_args(kind, process_parser(kind).parse_args(arguments))


def _monitor_address(text: str) -> MonitorAddress:
    try:
        return MonitorAddress.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _key(text: str) -> ClusterKey:
    try:
        return read_key(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
