"""The heaps of a group's slots as one rank sees them, and what it takes to lose the words between it and the others.

A link fault is for tests and fault injection: a *mute* rank writes into memory that nobody maps, a *deaf* one does not
look at what others wrote. Its own words, and the poison that its host writes, still count.
"""

from collections.abc import Iterable
from typing import Protocol

import torch

from kernels.heap_layout import HeapLayout
from kernels.heap_window import HeapWindow


class LinkFault(Protocol):
    """Asked at every operation, so a fault begins and ends at any time, also in the middle of a round; by a pass in C
    when it begins, and when one of its waits takes milliseconds."""

    def is_mute(self) -> bool: ...
    def is_deaf(self) -> bool: ...
    def on_lost(self, num_out: int, num_in: int) -> None:
        """So many writes to peers went nowhere, so many words of peers were not seen."""
        ...


class PeerWindows(dict[int, HeapWindow]):
    """Slot -> heap as mapped here, the own one included."""

    def __init__(self, layout: HeapLayout, rank: int, own: HeapWindow) -> None:
        super().__init__({rank: own})
        self._layout, self._rank = layout, rank
        self.last_nowhere: HeapWindow | None = None  # once this rank was mute
        self.fault: LinkFault | None = None

    def __getitem__(self, rank: int) -> HeapWindow:
        if rank == self._rank or not self.is_mute:
            return super().__getitem__(rank)
        return self.nowhere()

    def of(self, ranks: Iterable[int]) -> list[HeapWindow]:
        """One after another, with one look at the fault."""
        is_mute, get = self.is_mute, super().__getitem__
        return [self.nowhere() if is_mute and rank != self._rank else get(rank) for rank in ranks]

    @property
    def is_mute(self) -> bool:
        return self.fault is not None and self.fault.is_mute()

    def nowhere(self) -> HeapWindow:
        """What a mute rank writes to in place of a peer's heap."""
        assert self.fault is not None
        if self.last_nowhere is None:
            # Pages that are never written take no memory.
            self.last_nowhere = HeapWindow(self._layout, torch.zeros(self._layout.nbytes, dtype=torch.uint8))
        self.fault.on_lost(1, 0)
        return self.last_nowhere
