"""Numbers that are used once: epochs, incarnations, placement versions (PROTOCOL 3.3).

A monitor opens a *term* at the next multiple of 1024 above every number and term that it has heard of, and counts up
from there. Numbers of its predecessor that nobody alive has heard of may lie above the term, but only under the
predecessor's term, which everybody who follows this monitor refuses.
"""

from common.ids import Epoch, Incarnation

TERM_SIZE = 1024


class EpochCounter:
    def __init__(self) -> None:
        self.term = 0  # 0: not opened yet
        self._highest = 0

    def heard(self, number: int) -> None:
        """Somebody uses this number; it and all below are spent."""
        self._highest = max(self._highest, number)

    def open_term(self) -> int:
        """Starts above everything heard so far. May be called again as long as no number has been given out."""
        self.term = self._highest = (self._highest // TERM_SIZE + 1) * TERM_SIZE
        return self.term

    def take(self) -> Epoch:
        """The next number. Never twice the same, also not when the view it was taken for is dropped."""
        assert self.term, "a number was asked for before the term was opened"
        self._highest += 1
        return Epoch(self._highest)

    def take_incarnation(self) -> Incarnation:
        """For a slot that is given out: from the same numbers, so that no two lives of a slot are ever confused."""
        return Incarnation(self.take())
