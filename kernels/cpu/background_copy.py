"""A copy that a thread outside the interpreter makes, at a bounded rate, with the checksum of what has arrived."""

import ctypes
import weakref
from functools import cache

from torch import Tensor

from kernels.cpu.library import POINTER, SIZE, KernelFunction, kernel_function


class BackgroundCopy:
    """Begins to copy ``source`` to ``target`` (contiguous, of equal sizes) at once. Both are kept until `end`.

    Raises OSError when the system gives no thread, KernelsNotBuilt.
    """

    def __init__(self, target: Tensor, source: Tensor, bytes_per_s: float) -> None:
        if target.nbytes != source.nbytes or not (target.is_contiguous() and source.is_contiguous()):
            raise ValueError(f"cannot copy {source.nbytes} bytes onto {target.nbytes}: both contiguous, of equal sizes")
        self._memory: tuple[Tensor, ...] = target, source
        self.num_bytes = target.nbytes
        self._state = (ctypes.c_int64 * 2)()
        handle = ctypes.c_void_p()
        rate = max(1, int(bytes_per_s))
        _begin()(target.data_ptr(), source.data_ptr(), self.num_bytes, rate, ctypes.addressof(handle))
        if not handle.value:
            raise OSError("the system gives no thread to copy with")
        self._handle = handle.value
        # Also if it is only forgotten: the memory must not go before the thread has.
        self._end = weakref.finalize(self, _end_of, self._handle, self._memory)

    def look(self) -> tuple[int, int | None]:
        """Bytes that have arrived, and their CRC-32 once that is all of them. Not after `end`."""
        _look()(self._handle, ctypes.addressof(self._state))
        num_bytes = self._state[0]
        return num_bytes, self._state[1] if num_bytes == self.num_bytes else None

    def end(self) -> None:
        """Afterwards ``target`` is written no more, whether it was whole or not. May be called again."""
        self._end()
        self._memory = ()


def _end_of(handle: int, memory: tuple[Tensor, ...]) -> None:
    _end()(handle)


@cache
def _begin() -> KernelFunction:
    return kernel_function("regrow_copy_begin", POINTER, POINTER, SIZE, SIZE, POINTER)


@cache
def _look() -> KernelFunction:
    return kernel_function("regrow_copy_look", POINTER, POINTER)


@cache
def _end() -> KernelFunction:
    return kernel_function("regrow_copy_end", POINTER)
