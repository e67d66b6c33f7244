"""Heaps of NVSHMEM's symmetric memory, on one host; nvshmem4py forms the group, kernels get plain addresses.

NVSHMEM fixes its processing elements at the start, and every collective call of it, ``finalize`` among them, hangs when
one has died. So it serves to begin with and is never asked again: peers are reached by ``nvshmem_ptr`` addresses, which
stay good when their owner dies; survivors never finalize (they end by ``os._exit``); and a process that takes a dead
one's place is in no NVSHMEM job: its heap is plain device memory, and it and the survivors map each other through CUDA
IPC, for which NVSHMEM must not use virtual memory management.

The heap dies with its process: ``attach`` is for ``vmm``.
"""

import hashlib
import os
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver

from kernels.symmetric_memory.base import HeapError
from kernels.symmetric_memory.device_memory import DeviceHeap, call, clear

_KIND = "nvshmem"
_NO_JOB = "-"
_ENVIRONMENT = {
    "NVSHMEM_DISABLE_CUDA_VMM": "1",  # or the heap could not be exported to a relaunched rank
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
}


def new_unique_id(symmetric_bytes: int) -> bytes:
    """Names a job. One process makes it and gives it to the others, before any of them makes its provider.
    ``symmetric_bytes`` as there: NVSHMEM reads its settings here already.
    """
    _set_environment(symmetric_bytes)
    import nvshmem.core as nvshmem

    return bytes(nvshmem.get_unique_id()._data.tobytes())


class NvshmemHeap(DeviceHeap):
    """Device memory, own or a peer's. ``is_ipc``: mapped by CUDA IPC, from ``base``."""

    def __init__(self, address: int, nbytes: int, descriptor: str, base: int, is_ipc: bool) -> None:
        super().__init__(address, nbytes, descriptor)
        self._base, self._is_ipc = base, is_ipc

    def close(self) -> None:
        """Waits for the device, then unmaps what came by IPC; NVSHMEM's own mappings last as long as the process."""
        if self._address and self._is_ipc:
            torch.cuda.synchronize()
            call(driver.cuIpcCloseMemHandle, self._base)
        self._address = 0


class NvshmemProvider:
    """On CUDA device ``device``. With a ``unique_id``: processing element ``rank`` of ``num_ranks``, all of which make
    their providers, and then allocate, in the same order at the same time. Without: a process that takes the place of
    one that died. ``symmetric_bytes``: room for all heaps of this process.
    """

    def __init__(
        self, device: int, *, unique_id: bytes = b"", rank: int = 0, num_ranks: int = 0, symmetric_bytes: int = 1 << 30
    ) -> None:
        self._heaps: list[NvshmemHeap] = []
        self._mapped: list[NvshmemHeap] = []
        self._rank = rank
        self._job = hashlib.sha256(unique_id).hexdigest()[:16] if unique_id else _NO_JOB
        self._bindings: Any = None
        if unique_id:
            self._bindings = _join(device, unique_id, rank, num_ranks, symmetric_bytes)

    def allocate(self, name: str, nbytes: int) -> NvshmemHeap:
        """``name`` says nothing to NVSHMEM: heaps are told apart by their order."""
        if nbytes <= 0:
            raise HeapError(f"heap {name!r}: nbytes must be positive, got {nbytes}")
        in_job = self._bindings is not None
        address = int(self._bindings.malloc(nbytes) if in_job else call(driver.cuMemAlloc, nbytes))
        if not address:
            raise HeapError(f"heap {name!r}: {nbytes >> 20} MiB do not fit: give the provider more symmetric_bytes")
        clear(address, nbytes)
        base = int(call(driver.cuMemGetAddressRange, address)[0])
        handle = bytes(call(driver.cuIpcGetMemHandle, base).reserved).hex()
        descriptor = f"{_KIND}:{self._job}:{self._rank}:{len(self._heaps)}:{nbytes}:{address - base}:{handle}"
        heap = NvshmemHeap(address, nbytes, descriptor, base, is_ipc=False)
        self._heaps.append(heap)
        return heap

    def attach(self, name: str) -> NvshmemHeap:
        raise HeapError(f"heap {name!r}: NVSHMEM's memory dies with its process; use the vmm provider to attach")

    def map_peer(self, descriptor: str) -> NvshmemHeap:
        kind, *fields = descriptor.split(":")
        if kind != _KIND or len(fields) != 6:
            raise HeapError(f"not a descriptor of an NVSHMEM heap: {descriptor!r}")
        job, handle = fields[0], bytes.fromhex(fields[5])
        rank, index, nbytes, offset = map(int, fields[1:5])
        if job == self._job != _NO_JOB:
            address = int(self._bindings.ptr(self._heaps[index].address, rank))
            if not address:
                raise HeapError(f"NVSHMEM reaches no memory of processing element {rank} from here")
            heap = NvshmemHeap(address, nbytes, descriptor, address, is_ipc=False)
        else:
            ipc = driver.CUipcMemHandle()
            ipc.reserved = handle
            flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            base = int(call(driver.cuIpcOpenMemHandle, ipc, flags.value))
            heap = NvshmemHeap(base + offset, nbytes, descriptor, base, is_ipc=True)
        self._mapped.append(heap)
        return heap

    def unlink(self, name: str) -> None:
        """Nothing: the memory goes with the process."""

    def close(self) -> None:
        """Closes mappings. Not NVSHMEM: see the module."""
        for heap in self._mapped + self._heaps:
            heap.close()
        self._mapped.clear()
        self._heaps.clear()


def _set_environment(symmetric_bytes: int) -> None:
    os.environ.update(_ENVIRONMENT, NVSHMEM_SYMMETRIC_SIZE=str(symmetric_bytes))


def _join(device: int, unique_id: bytes, rank: int, num_ranks: int, symmetric_bytes: int) -> Any:
    _set_environment(symmetric_bytes)
    import nvshmem.bindings as bindings
    import nvshmem.core as nvshmem
    from cuda.core import Device

    uid = nvshmem.get_unique_id(empty=True)
    uid._data.view(np.uint8)[:] = np.frombuffer(unique_id, np.uint8)
    nvshmem.init(device=Device(device), uid=uid, rank=rank, nranks=num_ranks, initializer_method="uid")
    return bindings
