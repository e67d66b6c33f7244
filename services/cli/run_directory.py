"""The run directory of a cluster: its lock, its description for other commands, and what a killed one left behind.

RUN_DIR/lock           held (flock) by the `regrow up` that lives here; the kernel lets go of it, whatever happens
RUN_DIR/cluster.json   addresses, for other commands
RUN_DIR/config.toml    the configuration in force
RUN_DIR/cluster.key    the secret of a cluster started with --secure
RUN_DIR/children.json  numbers of decode ranks and prefill workers, once `regrow scale` has changed them
RUN_DIR/logs/NAME.log
/dev/shm/regrow-HASH/  heaps of the ranks; HASH is that of the run directory's path
"""

import fcntl
import hashlib
import os
import select
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.cluster_key import read_key
from common.monitor_address import MonitorAddress
from common.process_args import CHILDREN_FILE
from common.process_table import open_pidfd, processes_of, send_signal
from common.service_runner import OperatorError

_SHARED_MEMORY = Path("/dev/shm")
_KILL_S = 10.0


class ClusterDescription(msgspec.Struct, frozen=True):
    """What cluster.json says; addresses as others use them."""

    pid: int  # of regrow up
    http: str
    monitor_address: str
    publish: str
    subscribe: str
    heap_dir: str
    key_file: str = ""  # empty: the sockets are open to everybody on this machine


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """``lock`` is the descriptor that holds the lock."""

    path: Path
    lock: int

    @property
    def heap_dir(self) -> Path:
        return _SHARED_MEMORY / f"regrow-{hashlib.blake2b(os.fsencode(self.path), digest_size=6).hexdigest()}"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def key(self) -> Path:
        """Of ``regrow up --secure``; it is kept for the next cluster here."""
        return self.path / "cluster.key"

    @property
    def agent_log(self) -> Path:
        return self.path / "logs" / "agent.log"

    @classmethod
    def acquire(cls, path: Path) -> "RunDirectory":
        """Makes the directory and takes its lock; raises OperatorError when a cluster lives there."""
        path = path.resolve()
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "logs").mkdir(exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OperatorError(f"cannot use run directory {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OperatorError(
                f"a cluster is running in {path}; stop it, or choose another directory with --run-dir"
            ) from None
        return cls(path, lock)

    def remove_left_over(self) -> int:
        """Ends every process of this directory and removes the heaps. Returns the number of processes ended."""
        deadline, ended = time.monotonic() + _KILL_S, 0
        # An agent may be starting a child right now: look until there is nobody.
        while found := processes_of(self.path):
            if time.monotonic() > deadline:
                pids = ", ".join(str(process.pid) for process in found)
                raise OperatorError(f"processes of an earlier run in {self.path} cannot be ended: {pids}")
            # Agents first: a child killed before its agent would be started again.
            found.sort(key=lambda process: process.kind != "agent")
            pidfds = [pidfd for process in found if (pidfd := open_pidfd(process, self.path)) is not None]
            for pidfd in pidfds:
                ended += send_signal(pidfd, signal.SIGKILL)
            _wait_and_close(pidfds, deadline)
        shutil.rmtree(self.heap_dir, ignore_errors=True)
        for name in ("cluster.json", CHILDREN_FILE):
            (self.path / name).unlink(missing_ok=True)
        return ended

    def describe(self, description: ClusterDescription) -> None:
        temporary = self.path / "cluster.json.new"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n")
        temporary.replace(self.path / "cluster.json")

    def release(self) -> None:
        os.close(self.lock)


def _wait_and_close(pidfds: list[int], deadline: float) -> None:
    for pidfd in pidfds:
        select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        os.close(pidfd)


def read_description(run_dir: Path) -> ClusterDescription:
    """Raises OperatorError when no cluster runs there."""
    path = run_dir.resolve() / "cluster.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClusterDescription)
    except OSError:
        raise OperatorError(f"no cluster runs in {path.parent}; start one with regrow up, or name --run-dir") from None
    except msgspec.DecodeError as error:
        raise OperatorError(f"{path} is damaged: {error}") from None


def monitor_address(run_dir: Path) -> MonitorAddress:
    """Of the cluster that runs there, with its key. Raises ValueError when there is none, or its key cannot be read."""
    description = read_description(run_dir)
    key = read_key(Path(description.key_file)) if description.key_file else None
    return MonitorAddress.parse(description.monitor_address, key)


def bus_address(run_dir: Path, publish: str, subscribe: str, key_file: Path | None = None) -> MonitorAddress:
    """Of the cluster at ``publish`` and ``subscribe`` (both or neither), else of the one in ``run_dir``."""
    if not publish and not subscribe:
        return monitor_address(run_dir)
    address = MonitorAddress.parse(publish or subscribe)
    key = read_key(key_file) if key_file is not None else None
    base = MonitorAddress(address.host, address.port - (2 if publish else 3), key)
    if subscribe and base.subscribe != f"tcp://{subscribe.removeprefix('tcp://')}":
        raise OperatorError(
            f"--publish {publish} and --subscribe {subscribe} are not of one bus: subscribe is publish + 1"
        )
    return base
