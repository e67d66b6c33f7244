"""What the operations ask of a heap, whatever memory it is made of.

One heap per slot, the same layout in each. The owner allocates (or, after the death of an earlier owner, attaches) it
and sends the descriptor to its peers; they map it. A heap lives until it is unlinked, not until its owner's process
ends.
"""

from typing import Protocol

import torch


class HeapError(ValueError):
    """A heap cannot be made, attached or mapped; the message says which and what to do."""


class PeerHeap(Protocol):
    """Another rank's heap as mapped here."""

    @property
    def nbytes(self) -> int: ...

    @property
    def bytes_U8(self) -> torch.Tensor:
        """uint8 [nbytes], writable, memory shared with the owner."""
        ...

    @property
    def header_U8(self) -> torch.Tensor:
        """The version header, readable on the host: uint8 [256] (less if the heap is smaller)."""
        ...

    @property
    def address(self) -> int:
        """Of byte 0 as mapped here: for kernels."""
        ...

    def close(self) -> None:
        """Give up this mapping. The memory goes when the last tensor viewing it goes."""
        ...


class SymmetricHeap(PeerHeap, Protocol):
    """The own heap."""

    @property
    def descriptor(self) -> str:
        """What a peer passes to ``HeapProvider.map_peer``."""
        ...


class HeapProvider(Protocol):
    """Makes and maps heaps of one kind of memory. Every method raises HeapError."""

    def allocate(self, name: str, nbytes: int) -> SymmetricHeap:
        """A new heap, all zero."""
        ...

    def attach(self, name: str) -> SymmetricHeap:
        """The heap an earlier process left under this name, contents intact, once nobody else owns it."""
        ...

    def map_peer(self, descriptor: str) -> PeerHeap: ...

    def unlink(self, name: str) -> None:
        """Let the memory go when the last process that maps it has gone. No error if there is no such heap."""
        ...

    def close(self) -> None:
        """Close every heap and mapping made here; unlinks nothing."""
        ...
