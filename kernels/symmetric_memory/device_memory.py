"""What the providers of CUDA memory share: driver calls with errors, and memory seen as tensors.

CUDA through cuda-bindings; the current device's primary context must exist (any torch CUDA tensor makes it).
"""

from typing import Any

import torch
from cuda.bindings import driver

from kernels.symmetric_memory.base import HeapError

_HEADER_BYTES = 256


class _Array:
    """What torch needs to see memory as a tensor without owning it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def as_bytes(address: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] on the current device."""
    return torch.as_tensor(_Array(address, nbytes), device="cuda")


def read_header(address: int) -> torch.Tensor:
    """The first bytes of a heap, on the host."""
    header = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
    call(driver.cuMemcpyDtoH, header.data_ptr(), address, _HEADER_BYTES)
    return header


class DeviceHeap:
    """Mapped device memory, own or a peer's, until it is closed; how it is unmapped is the provider's."""

    def __init__(self, address: int, nbytes: int, descriptor: str) -> None:
        self.nbytes = nbytes
        self.descriptor = descriptor
        self._address = address

    @property
    def address(self) -> int:
        if not self._address:
            raise HeapError(f"heap {self.descriptor} is closed")
        return self._address

    @property
    def bytes_U8(self) -> torch.Tensor:
        """On the current device; for the own heap. A peer's is reached by ``address``."""
        return as_bytes(self.address, self.nbytes)

    @property
    def header_U8(self) -> torch.Tensor:
        return read_header(self.address)


def clear(address: int, nbytes: int) -> None:
    call(driver.cuMemsetD8, address, 0, nbytes)
    torch.cuda.synchronize()


def call(function: Any, *arguments: Any) -> Any:
    """A driver call's results without its error code. HeapError unless that is success."""
    error, *results = function(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise HeapError(f"{function.__name__} failed: {error}")
    if len(results) > 1:
        return tuple(results)
    return results[0] if results else None
