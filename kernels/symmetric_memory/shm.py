"""Heaps as files in a tmpfs directory: the CPU path, one host.

The file outlives the process. Its owner holds an exclusive flock, which the kernel releases when the owner dies and
not before, so two processes never own one heap (PROTOCOL 7.2). Peers map without a lock.
"""

import errno
import fcntl
import mmap
import os
import weakref
from pathlib import Path

import torch

from kernels.symmetric_memory.base import HeapError

_KIND = "shm"


class ShmHeap:
    """A mapped file, own or a peer's."""

    def __init__(self, path: Path, nbytes: int, mapping: mmap.mmap) -> None:
        self.path = path
        self.nbytes = nbytes
        self.descriptor = f"{_KIND}:{nbytes}:{path}"
        self._bytes_U8: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    @property
    def bytes_U8(self) -> torch.Tensor:
        if self._bytes_U8 is None:
            raise HeapError(f"heap {self.path} is closed")
        return self._bytes_U8

    @property
    def header_U8(self) -> torch.Tensor:
        return self.bytes_U8[:256]

    @property
    def address(self) -> int:
        return self.bytes_U8.data_ptr()

    def close(self) -> None:
        """Drop the mapping. Tensors that still view the memory keep it mapped, and owned: none of them can fault, and
        no successor gets memory that this process can still write."""
        self._bytes_U8 = None


class ShmProvider:
    """Heaps under ``directory``, which exists and should be on a tmpfs (say /dev/shm/regrow-1234)."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise HeapError(f"heap directory {directory} does not exist: create it, best on a tmpfs such as /dev/shm")
        self.directory = directory
        self._open: weakref.WeakSet[ShmHeap] = weakref.WeakSet()

    def allocate(self, name: str, nbytes: int) -> ShmHeap:
        """A new file of zeros, its memory reserved now: running out later would be a SIGBUS in mid-store."""
        if nbytes <= 0:
            raise HeapError(f"heap {name!r}: nbytes must be positive, got {nbytes}")
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise HeapError(f"heap {path} exists already: attach it, or unlink it first") from None
        except OSError as error:
            raise HeapError(f"cannot make heap {path}: {error.strerror}") from None
        try:
            _lock(fd, path)
            _reserve(fd, path, nbytes)
            return self._map(path, nbytes, fd)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def attach(self, name: str) -> ShmHeap:
        path = self._path(name)
        fd = _open_existing(path)
        try:
            _lock(fd, path)
            return self._map(path, os.fstat(fd).st_size, fd)
        finally:
            os.close(fd)

    def map_peer(self, descriptor: str) -> ShmHeap:
        kind, _, rest = descriptor.partition(":")
        size, _, location = rest.partition(":")
        if kind != _KIND or not size.isdecimal() or not location:
            raise HeapError(f"not a descriptor of a shared-memory heap: {descriptor!r}")
        path = Path(location)
        fd = _open_existing(path)
        try:
            nbytes = os.fstat(fd).st_size
            if nbytes != int(size):
                raise HeapError(
                    f"heap {path} has {nbytes} bytes, its descriptor says {size}: it was made anew, ask its owner again"
                )
            return self._map(path, nbytes, fd)
        finally:
            os.close(fd)

    def unlink(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        for heap in list(self._open):
            heap.close()
        self._open.clear()

    def _path(self, name: str) -> Path:
        if not name or "/" in name or name.startswith("."):
            raise HeapError(f"bad heap name {name!r}: a plain file name is needed")
        return self.directory / name

    def _map(self, path: Path, nbytes: int, fd: int) -> ShmHeap:
        if nbytes == 0:
            raise HeapError(f"heap {path} is empty: its maker died while making it, unlink it")
        # The mapping keeps a duplicate of fd, and with it the lock if there is one, until its last view is gone.
        heap = ShmHeap(path, nbytes, mmap.mmap(fd, nbytes))
        self._open.add(heap)
        return heap


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HeapError(f"heap {path} does not exist: its owner has unlinked it, or it is on another host") from None
    except OSError as error:
        raise HeapError(f"cannot open heap {path}: {error.strerror}; do all ranks run as the same user?") from None


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeapError(f"heap {path} is still owned by a living process: wait until that one is reaped") from None


def _reserve(fd: int, path: Path, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
        room = os.statvfs(path.parent)
        raise HeapError(
            f"no room for heap {path}: {nbytes >> 20} MiB wanted, {room.f_bavail * room.f_frsize >> 20} MiB free: "
            "make the tmpfs larger (docker: --shm-size) or the heap smaller"
        ) from None
