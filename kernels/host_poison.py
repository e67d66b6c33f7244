"""The word with which a rank's host ends the waits of its own kernels, in the own heap."""

import threading

import torch

from kernels.heap_layout import HeapLayout
from kernels.symmetric_memory.base import SymmetricHeap


class HostPoison:
    """Writes beside the running stream, from any thread. What an earlier process of the slot said is taken back."""

    def __init__(self, layout: HeapLayout, heap: SymmetricHeap, rank: int) -> None:
        self._own = layout.view(heap.bytes_U8, "ep_poison")[rank : rank + 1]
        self._own.zero_()
        self._lock = threading.Lock()
        self._word = 0
        self._stream: torch.cuda.Stream | None = None
        if self._own.device.type == "cuda":
            self._stream = torch.cuda.Stream(self._own.device)  # type: ignore[no-untyped-call]

    def raise_to(self, word: int) -> None:
        """Never back to a lower one."""
        with self._lock:
            self._word = max(self._word, word)
            source = torch.tensor([self._word], dtype=torch.int64)
            if self._stream is None:
                self._own.copy_(source)
                return
            with torch.cuda.stream(self._stream):
                self._own.copy_(source.pin_memory(), non_blocking=True)
            self._stream.synchronize()
