"""Heaps of CUDA memory on one host, exported as POSIX file descriptors: they outlive the process that made them.

Physical memory is freed when its last mapping and its last descriptor are gone, so a holder that keeps the descriptor
(``fd_holder``) keeps the memory over its owner's death, and a mapping of a dead peer's heap stays good to use. Never
unmap while kernels run.

CUDA virtual memory management through cuda-bindings, see ``device_memory``.
"""

import os
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver

from kernels.symmetric_memory.base import HeapError
from kernels.symmetric_memory.device_memory import DeviceHeap, call, clear
from kernels.symmetric_memory.fd_holder import HolderClient

_KIND = "vmm"
_FD_HANDLE = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class VmmHeap(DeviceHeap):
    """Mapped device memory, own or a peer's. ``nbytes`` is what was asked for; the mapping is whole pages."""

    def __init__(self, address: int, nbytes: int, mapped_bytes: int, descriptor: str) -> None:
        super().__init__(address, nbytes, descriptor)
        self._mapped_bytes = mapped_bytes

    def close(self) -> None:
        """Waits for the device, then unmaps: tensors and kernels must not use the memory any more."""
        if self._address:
            torch.cuda.synchronize()
            call(driver.cuMemUnmap, self._address, self._mapped_bytes)
            call(driver.cuMemAddressFree, self._address, self._mapped_bytes)
            self._address = 0


class VmmProvider:
    """Heaps on CUDA device ``device``; descriptors are kept by the holder that listens at ``holder``."""

    def __init__(self, holder: Path, device: int) -> None:
        self._client = HolderClient(holder)
        self._device = device
        self._open: list[VmmHeap] = []

    def allocate(self, name: str, nbytes: int) -> VmmHeap:
        if nbytes <= 0:
            raise HeapError(f"heap {name!r}: nbytes must be positive, got {nbytes}")
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._device
        properties.requestedHandleTypes = _FD_HANDLE
        handle = call(driver.cuMemCreate, self._round_up(nbytes), properties, 0)
        fd = int(call(driver.cuMemExportToShareableHandle, handle, _FD_HANDLE, 0))
        try:
            self._client.put(name, nbytes, fd)
            heap = self._map(handle, name, nbytes)
        finally:
            os.close(fd)
        clear(heap.address, nbytes)
        return heap

    def attach(self, name: str) -> VmmHeap:
        return self._import(*self._client.own(name), name)

    def map_peer(self, descriptor: str) -> VmmHeap:
        kind, _, name = descriptor.partition(":")
        if kind != _KIND or not name:
            raise HeapError(f"not a descriptor of a CUDA heap: {descriptor!r}")
        return self._import(*self._client.get(name), name)

    def unlink(self, name: str) -> None:
        self._client.unlink(name)

    def close(self) -> None:
        for heap in self._open:
            heap.close()
        self._open.clear()
        self._client.close()

    def _import(self, fd: int, nbytes: int, name: str) -> VmmHeap:
        try:
            handle = call(driver.cuMemImportFromShareableHandle, fd, _FD_HANDLE)
        finally:
            os.close(fd)
        return self._map(handle, name, nbytes)

    def _map(self, handle: Any, name: str, nbytes: int) -> VmmHeap:
        mapped_bytes = self._round_up(nbytes)
        address = call(driver.cuMemAddressReserve, mapped_bytes, 0, 0, 0)
        call(driver.cuMemMap, address, mapped_bytes, 0, handle, 0)
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._device
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call(driver.cuMemSetAccess, address, mapped_bytes, [access], 1)
        call(driver.cuMemRelease, handle)  # the mapping keeps the memory
        heap = VmmHeap(int(address), nbytes, mapped_bytes, f"{_KIND}:{name}")
        self._open.append(heap)
        return heap

    def _round_up(self, nbytes: int) -> int:
        granularity = 2 << 20
        return -(-nbytes // granularity) * granularity
