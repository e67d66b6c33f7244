"""One heap as this process reads and writes it: word rows and payload arrays, made once when the heap is mapped.

Memory order. Words are aligned 64-bit loads and stores (a memoryview of int64 copies 8 bytes with one move); payload
is written by calls that have returned before the word is stored. x86-64 keeps stores in order and loads in order, so
a word that is seen stands for payload that is seen, without fences. Other machines (aarch64) reorder them and Python
has no fence to offer, so this path refuses to run there.

Legend: W max_ranks, M max_tokens, K top_k, H hidden_size.
"""

import platform
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kernels.heap_layout import NUM_HEADER_BANKS, HeapLayout

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


def require_ordered_stores() -> None:
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise RuntimeError(
            f"the CPU data path relies on x86-64's ordered stores; it would lose data silently on {machine}"
        )


class OwnWords(NamedTuple):
    """A row of words that its owner waits for, one of each slot: ``step_bytes`` apart from ``address`` on."""

    row: memoryview
    address: int
    step_bytes: int

    @classmethod
    def of(cls, words_W: npt.NDArray[np.int64]) -> "OwnWords":
        return cls(words_W.data, int(words_W.ctypes.data), words_W.strides[0])


class HeapWindow:
    """Row j of everything here is written by slot j only."""

    def __init__(self, layout: HeapLayout, bytes_U8: torch.Tensor) -> None:
        ep = layout.ep

        def array(name: str) -> npt.NDArray[Any]:
            return layout.view(bytes_U8, name).numpy()

        self.address = int(bytes_U8.data_ptr())
        header = array("ep_header")
        dispatch_word = array("ep_dispatch_word")
        bell = array("ep_bell")
        self.bell, self.bell_address = bell.data, int(bell.ctypes.data)
        self.sleeper = array("ep_sleeper").data
        self.poison = array("ep_poison").data
        self.barrier_wait = [OwnWords.of(row) for row in array("ep_barrier_word")]
        self.combine_wait = OwnWords.of(array("ep_combine_word"))
        self.dispatch_wait = OwnWords.of(dispatch_word[:, 0])
        self.header_wait = [OwnWords.of(header[bank, :, 0]) for bank in range(NUM_HEADER_BANKS)]
        self.barrier_word = [words.row for words in self.barrier_wait]
        self.combine_word, self.dispatch_word = self.combine_wait.row, self.dispatch_wait.row
        self.dispatch_num_rows = dispatch_word[:, 1].data
        self.header_word = [words.row for words in self.header_wait]
        self.header_data: npt.NDArray[np.uint64] = header[:, :, 1:].view(np.uint64)
        # Row: token, K codes (rank << 16 | local expert, or -1), K weights, padding, x; see EpShape.row_header_words.
        self.dispatch_rows: Int32Array = array("ep_dispatch_rows").view(np.int32)
        self.combine_rows: FloatArray = array("ep_combine_rows").reshape(
            ep.max_ranks, ep.max_tokens * ep.top_k, ep.hidden_size
        )
