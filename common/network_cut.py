"""Messages that a process loses on purpose: the fault event ``drop_network``. Pure.

A cut is made where messages enter and leave the process, so connections stay open, as they do when a network loses
packets: silence is the only sign. It ends by itself, since who cannot hear the monitor cannot be told. Two sides: the
monitor (control, heartbeats, bus) and the peers (everybody else, for decode ranks also the words of the data path).
"""

SIDES = ("monitor", "peers")
WHICH = (*SIDES, "all")
DIRECTIONS = ("in", "out", "both")

_Lane = tuple[str, str]


class NetworkCut:
    """One for a process. ``num_dropped`` only grows; reading it from other threads is safe."""

    def __init__(self) -> None:
        self._until: dict[_Lane, float] = {}
        self.num_dropped: dict[_Lane, int] = {(side, way): 0 for side in SIDES for way in ("in", "out")}

    def cut(self, which: str, direction: str, until: float) -> None:
        """``which`` of `WHICH`, ``direction`` of `DIRECTIONS`; replaces an earlier cut of the same lanes."""
        self._until |= dict.fromkeys(lanes(which, direction), until)

    def is_cut(self, side: str, way: str, now: float) -> bool:
        return now < self._until.get((side, way), now)

    def drops(self, side: str, way: str, now: float) -> bool:
        """Whether this message is lost; counts it if so."""
        lost = self.is_cut(side, way, now)
        if lost:
            self.count(side, way)
        return lost

    def count(self, side: str, way: str, number: int = 1) -> None:
        self.num_dropped[side, way] += number

    def counters(self) -> dict[str, int]:
        """For heartbeats, of the lanes that have lost something."""
        return {f"dropped_{side}_{way}": number for (side, way), number in self.num_dropped.items() if number}


def lanes(which: str, direction: str) -> list[_Lane]:
    """
    >>> lanes("monitor", "both")
    [('monitor', 'in'), ('monitor', 'out')]
    """
    sides = SIDES if which == "all" else (which,)
    ways = ("in", "out") if direction == "both" else (direction,)
    return [(side, way) for side in sides for way in ways]
