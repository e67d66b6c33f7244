"""The holder of descriptors, with memfds in place of CUDA memory."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.symmetric_memory.base import HeapError
from kernels.symmetric_memory.fd_holder import FdHolder, HolderClient


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[FdHolder]:
    holder = FdHolder(tmp_path / "holder")
    yield holder
    holder.close()
    assert not holder.path.exists()


def put(client: HolderClient, name: str, content: bytes) -> None:
    fd = os.memfd_create(name)
    os.write(fd, content)
    client.put(name, len(content), fd)
    os.close(fd)


def content_of(fd_and_nbytes: tuple[int, int]) -> bytes:
    fd, nbytes = fd_and_nbytes
    content = os.pread(fd, nbytes, 0)
    os.close(fd)
    return content


def own_once_free(client: HolderClient, name: str) -> tuple[int, int]:
    give_up = time.monotonic() + 10
    while True:
        try:
            return client.own(name)
        except HeapError:
            assert time.monotonic() < give_up
            time.sleep(0.005)


def test_a_heap_outlives_the_process_that_made_it(holder: FdHolder) -> None:
    maker = (
        "import os, sys; from pathlib import Path; from kernels.symmetric_memory.fd_holder import HolderClient\n"
        "fd = os.memfd_create('a'); os.write(fd, b'left behind')\n"
        f"HolderClient(Path({str(holder.path)!r})).put('a', 11, fd); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", maker], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == -9
    client = HolderClient(holder.path)
    assert content_of(own_once_free(client, "a")) == b"left behind"
    client.close()


def test_a_heap_has_one_owner_and_any_number_of_peers(holder: FdHolder) -> None:
    first, second = HolderClient(holder.path), HolderClient(holder.path)
    put(first, "a", b"abc")
    assert content_of(second.get("a")) == b"abc"
    assert content_of(second.get("a")) == b"abc"
    with pytest.raises(HeapError, match="owned by a living process"):
        second.own("a")
    first.close()
    assert content_of(own_once_free(second, "a")) == b"abc"
    second.close()


def test_what_is_wrong_is_said(holder: FdHolder) -> None:
    client = HolderClient(holder.path)
    put(client, "a", b"abc")
    with pytest.raises(HeapError, match="exists already"):
        put(client, "a", b"xyz")
    assert content_of(client.get("a")) == b"abc"
    client.unlink("a")
    client.unlink("a")
    with pytest.raises(HeapError, match="does not exist"):
        client.get("a")
    client.close()
    with pytest.raises(HeapError, match="is it running"):
        HolderClient(holder.path.with_name("nobody")).get("a")


def test_owners_may_go_while_the_holder_closes(tmp_path: Path) -> None:
    for attempt in range(60):
        holder = FdHolder(tmp_path / f"holder-{attempt}")
        client = HolderClient(holder.path)
        for number in range(8):
            put(client, f"heap-{number}", b"abc")
        leaving = threading.Thread(target=client.close)
        leaving.start()
        holder.close()
        leaving.join()
