"""Ranks on the host wake each other: a bell in every heap, with a counter for each source.

A source that has stored words (or poison) into a heap adds one to its counter there, and makes the system call only
when the owner sleeps for it. The owner reads the counter before it looks at the words, so a ring after that look
keeps it from falling asleep: the kernel compares the counter again (futex(2)). Poison of another source and a word of
the owner's own host thread can just miss the sleeper; they wait for the end of its sleep, as do all of GPU ranks.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kernels import futex
from kernels.heap_window import HeapWindow


class Ring(NamedTuple):
    """How often ``source`` had rung: ``number``."""

    source: int
    number: int


class Doorbell:
    """One rank's bell. ``windows`` are the heaps mapped now, its own among them."""

    def __init__(self, rank: int, windows: Mapping[int, HeapWindow]) -> None:
        self._rank, self._windows, self._own = rank, windows, windows[rank]
        self._own.sleeper[0] = 0
        self._fence = threading.Lock()

    def ring_of(self, source: int) -> Ring:
        return Ring(source, self._own.bell[source])

    def sleep(self, ring: Ring, timeout_s: float) -> None:
        """Until the source has rung again, poison rings, or the time is over; may also end for no reason."""
        own = self._own
        own.sleeper[0] = ring.source + 1
        futex.wait(own.bell_address + 8 * ring.source, ring.number, timeout_s)
        own.sleeper[0] = 0

    def ring(self, members: Iterable[int]) -> None:
        """Wakes those who sleep for this rank. Their words are stored."""
        rank, others = self._rank, [self._windows[member] for member in members if member != self._rank]
        for window in others:
            window.bell[rank] += 1
        with self._fence:  # a locked instruction: what was stored is seen by all before the sleepers are read
            pass
        for window in others:
            if window.sleeper[0] == rank + 1:
                futex.wake(window.bell_address + 8 * rank)

    def rouse(self, members: Iterable[int]) -> None:
        """Wakes all of them, for whomever they sleep: poison is stored."""
        self.ring(members)
        for member in members:
            window = self._windows[member]
            if source := window.sleeper[0]:
                futex.wake(window.bell_address + 8 * (source - 1))
