"""One cluster a directory; what a killed one left is found by what stands on its command lines, and ended."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.process_table import FoundProcess, open_pidfd, processes_of, state_of
from common.service_runner import OperatorError
from services.cli.run_directory import ClusterDescription, RunDirectory, bus_address, read_description

DESCRIPTION = ClusterDescription(1, "http://127.0.0.1:8000", "127.0.0.1:7000", "tcp://127.0.0.1:7002", "", "")
# Starts the grandchild and ends, so that the grandchild is nobody's child.
ORPHAN = """
import subprocess, sys
command = [sys.executable, "-S", "-c", "print('up', flush=True); import time; time.sleep(600)", *sys.argv[1:]]
child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
"""


def start_orphan(run_dir: Path, name: str) -> int:
    words = ["services.decode", "--name", name, "--process-id", f"{name}-00ff", "--run-dir", str(run_dir)]
    done = subprocess.run([sys.executable, "-S", "-c", ORPHAN, *words], capture_output=True, text=True, timeout=30)
    return int(done.stdout)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory.acquire(tmp_path / "run")
    yield directory
    directory.remove_left_over()
    directory.release()


def test_a_second_cluster_in_the_same_directory_is_refused(directory: RunDirectory) -> None:
    with pytest.raises(OperatorError, match=r"a cluster is running in .*; stop it, or choose another"):
        RunDirectory.acquire(directory.path)
    other = RunDirectory.acquire(directory.path.parent / "other")
    other.release()


def test_orphans_are_ended_whoever_started_them_also_stopped_ones(directory: RunDirectory) -> None:
    pids = [start_orphan(directory.path, "decode-0"), start_orphan(directory.path, "decode-1")]
    bystander = start_orphan(directory.path.parent / "other", "decode-0")
    os.kill(pids[1], signal.SIGSTOP)
    directory.heap_dir.mkdir()
    (directory.heap_dir / "decode-0-00ff.0.heap").write_bytes(b"x")
    try:
        found = processes_of(directory.path)
        assert sorted(p.pid for p in found) == sorted(pids)
        assert {(p.kind, p.name, p.process) for p in found} == {
            ("decode", "decode-0", "decode-0-00ff"),
            ("decode", "decode-1", "decode-1-00ff"),
        }
        assert directory.remove_left_over() == 2
        assert processes_of(directory.path) == []
        assert not directory.heap_dir.exists()
        assert directory.remove_left_over() == 0
        assert state_of(bystander) in ("R", "S")
    finally:
        os.kill(bystander, signal.SIGKILL)


def test_a_reused_pid_is_not_taken_for_ours(directory: RunDirectory) -> None:
    pid = start_orphan(directory.path, "decode-0")
    (found,) = processes_of(directory.path)
    impostor = FoundProcess(pid, found.kind, found.name, type(found.process)("decode-0-beef"))
    assert open_pidfd(impostor, directory.path) is None
    pidfd = open_pidfd(found, directory.path)
    assert pidfd is not None
    os.close(pidfd)


def test_state_of_a_process_and_of_none() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    pidfd = os.pidfd_open(process.pid)
    try:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while state_of(process.pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.005)
        assert state_of(process.pid) == "T"
        process.kill()
        assert select.select([pidfd], [], [], 20)[0]
        assert state_of(process.pid) == "Z"
    finally:
        process.kill()
        process.wait()
        os.close(pidfd)
    assert state_of(process.pid) == ""


def test_heap_directories_of_two_clusters_differ(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "a", -1).heap_dir != RunDirectory(tmp_path / "b", -1).heap_dir


def test_description_is_found_again_and_its_absence_is_explained(directory: RunDirectory) -> None:
    with pytest.raises(OperatorError, match=r"no cluster runs in .*regrow up"):
        read_description(directory.path)
    directory.describe(DESCRIPTION)
    assert read_description(directory.path) == DESCRIPTION
    assert str(bus_address(directory.path, "", "")) == "127.0.0.1:7000"
    assert bus_address(directory.path, "", "").key is None
    (directory.path / "cluster.json").write_text("{}")
    with pytest.raises(OperatorError, match="damaged"):
        read_description(directory.path)


def test_the_bus_can_be_given_by_its_addresses(tmp_path: Path) -> None:
    assert str(bus_address(tmp_path, "tcp://h:7002", "")) == "h:7000"
    assert str(bus_address(tmp_path, "", "h:7003")) == "h:7000"
    assert str(bus_address(tmp_path, "h:7002", "h:7003")) == "h:7000"
    with pytest.raises(OperatorError, match="not of one bus"):
        bus_address(tmp_path, "h:7002", "h:8003")
