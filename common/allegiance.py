"""Whom a process obeys: one monitor id per term, never a lower term (PROTOCOL 3.3).

    no monitor --first word of (term t, monitor m)--> (t, m) --word of (t' > t, m')--> (t', m')

Invariant: ``term`` never falls, and within a term ``monitor`` never changes. Two monitors that both believe in
themselves can therefore never both be followed by one process.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Allegiance:
    term: int = 0
    monitor: str = ""

    def accepts(self, term: int, monitor: str) -> bool:
        """True when a word of this monitor counts; from then on lower terms and second ids do not."""
        if term > self.term:
            self.term, self.monitor = term, monitor
            return True
        return term == self.term and monitor == self.monitor
