"""Waiting for step words: PROTOCOL 2.1, one verdict a wait.

A wait ends when every word is there (checked first: complete data stays complete whatever else happened), or a word
is from the future, or a poison word of this epoch or a later one is seen from a member, or the caller's ``stop`` says
so, or the deadline passes. The clock is read before the words: a process that was itself stopped past the deadline
looks once more before it accuses anybody.

A rank that waits gives its core away at once, since with more ranks than cores the late one may need just that one. It
sleeps until the source it waits for rings (`doorbell`); the sleeps are short, so that a ring that never comes, a word
from the host or a ``stop`` cost milliseconds.
"""

from collections.abc import Callable, Sequence
from enum import Enum

from kernels.doorbell import Doorbell
from kernels.heap_window import OwnWords
from kernels.peer_windows import LinkFault

Clock = Callable[[], float]
Pause = Callable[[int], None]

# When several are late, some may be waiting for the others, an operation behind this rank; they lack fewer words, so
# their deadline comes first, and what they then say gets this much longer to arrive before a healthy rank is accused.
LONGER_FOR_EACH = 0.1
_SHORT_SLEEP_S = 0.001
_LONG_SLEEP_S = 0.004
_NUM_SHORT_SLEEPS = 10


def _nothing() -> None:
    pass


class WaitEnd(Enum):
    """Why a wait ended. All but COMPLETE make the rank void."""

    COMPLETE = "complete"
    DEADLINE = "deadline"
    PEER_POISON = "peer_poison"
    HOST_POISON = "host_poison"
    STOPPED = "stopped"
    FUTURE_WORD = "future_word"


class WordWait:
    """The waits of one rank. ``poison`` is the poison row of its own heap, indexed by the writer's slot. ``pause``, for
    tests, is called with the number of polls so far in place of a sleep.

    ``missing`` names the sources without a word now, or when the last wait ended. ``while_waiting`` is called with each
    look that finds some missing.
    """

    def __init__(self, rank: int, poison: memoryview, bell: Doorbell, clock: Clock, pause: Pause | None) -> None:
        self.missing: tuple[int, ...] = ()
        self._wait_s = [0.0] * len(poison)
        self._rank = rank
        self._poison = poison
        self._bell = bell
        self._clock = clock
        self._pause = pause
        self.fault: LinkFault | None = None
        self.while_waiting: Callable[[], None] = _nothing

    def waited_ns(self) -> list[int]:
        """Per slot, how long this rank has waited for it so far. From any thread."""
        return [round(1e9 * seconds) for seconds in self._wait_s]

    def until(
        self,
        words: OwnWords,
        members: Sequence[int],
        step: int,
        floor: int,
        deadline_s: float | None,
        stop: Callable[[], bool] | None = None,
    ) -> WaitEnd:
        """Wait until ``words.row[j] == step`` for every j in members; ``floor``: lowest word of the epoch. Seconds."""
        clock, poison, row = self._clock, self._poison, words.row
        start = clock()
        pending = list(members)
        num_polls = 0
        unseen: set[int] = set()
        while True:
            # Before the words: what is rung for after this look ends the sleep behind it.
            ring = self._bell.ring_of(pending[-1])
            now = clock()
            fault = self.fault if self.fault is not None and self.fault.is_deaf() else None
            still = []
            future = False
            for source in pending:
                word = row[source]
                if fault is not None and source != self._rank:
                    if word >= step and source not in unseen:
                        unseen.add(source)
                        fault.on_lost(0, 1)
                    still.append(source)
                elif word != step:
                    still.append(source)
                    future |= word > step
                elif num_polls:
                    self._wait_s[source] += now - start
            pending = still
            self.missing = tuple(pending)
            if not pending:
                return WaitEnd.COMPLETE
            end = None
            if future:
                end = WaitEnd.FUTURE_WORD
            elif poison[self._rank] >= floor:
                end = WaitEnd.HOST_POISON
            elif fault is None and any(poison[member] >= floor for member in members):
                end = WaitEnd.PEER_POISON
            elif stop is not None and stop():
                end = WaitEnd.STOPPED
            elif deadline_s is not None and now - start >= deadline_s * (1 + LONGER_FOR_EACH * (len(pending) - 1)):
                end = WaitEnd.DEADLINE
            if end is not None:
                for source in pending:
                    self._wait_s[source] += now - start
                return end
            self.while_waiting()
            if self._pause is not None:
                self._pause(num_polls)
            elif ring.source == pending[-1]:
                self._bell.sleep(ring, _SHORT_SLEEP_S if num_polls < _NUM_SHORT_SLEEPS else _LONG_SLEEP_S)
            num_polls += 1
