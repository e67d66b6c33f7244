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
