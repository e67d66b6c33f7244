"""One expert on its way from the memory of a peer: how its bytes get here. Says nothing about whether to believe them.

Small rows are copied in slices by the caller. Large ones are copied by a thread outside the interpreter at a bounded
rate, so that neither the length of rounds nor their number bounds how fast experts come in.
"""

import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernels.cpu.background_copy import BackgroundCopy

FLOAT_BYTES = 4
# Copied and summed in less time than a thread takes to begin, and than a round would notice.
SLICE_BYTES = 64 << 10


class ExpertCopy(Protocol):
    """``checksum`` of the copy: None until it is whole. ``keeps_rate``: by itself."""

    checksum: int | None
    keeps_rate: bool

    def advance(self, max_bytes: int) -> int:
        """How many bytes have arrived since the last call; the caller's own work is at most ``max_bytes``."""
        ...

    def end(self) -> None:
        """Afterwards nothing is written any more."""
        ...


@dataclass(slots=True)
class SliceCopy:
    """``target_F`` is being filled from ``source_F``; ``num_floats`` are there."""

    target_F: Tensor
    source_F: Tensor
    num_floats: int = 0
    checksum: int | None = None
    keeps_rate: bool = False
    _checksum_so_far: int = 0

    def advance(self, max_bytes: int) -> int:
        first, last = self.num_floats, min(self.num_floats + max_bytes // FLOAT_BYTES, len(self.target_F))
        self.target_F[first:last] = self.source_F[first:last]
        # Of the copy, not of the source: that may change between two reads.
        self._checksum_so_far = zlib.crc32(_memory(self.target_F[first:last]), self._checksum_so_far)
        self.num_floats = last
        if last == len(self.target_F):
            self.checksum = self._checksum_so_far
        return FLOAT_BYTES * (last - first)

    def end(self) -> None:
        """It writes only when it is told to."""


class ThreadCopy:
    def __init__(self, target_F: Tensor, source_F: Tensor, bytes_per_s: float) -> None:
        self._copy = BackgroundCopy(target_F, source_F, bytes_per_s)
        self._num_bytes = 0
        self.checksum: int | None = None
        self.keeps_rate = True

    def advance(self, max_bytes: int) -> int:
        before = self._num_bytes
        self._num_bytes, self.checksum = self._copy.look()
        return self._num_bytes - before

    def end(self) -> None:
        self._copy.end()


def begin_copy(target_F: Tensor, source_F: Tensor, bytes_per_s: float | None) -> ExpertCopy:
    """None: the caller waits for it, so it is copied by the caller."""
    if bytes_per_s is None or target_F.nbytes <= SLICE_BYTES:
        return SliceCopy(target_F, source_F)
    return ThreadCopy(target_F, source_F, bytes_per_s)


def _memory(row_F: Tensor) -> memoryview:
    array: npt.NDArray[np.float32] = row_F.numpy()
    return array.data.cast("B")
