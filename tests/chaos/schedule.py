"""A seeded schedule of faults and pairs of faults. Pure: the same seed gives the same schedule.

Signals go straight to processes, found by /proc, so that they also hit when nobody leads the cluster. Everything else
is a fault event on the bus, undone by another one after `Fault.hold_s` unless it ends by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

SIGNALS = ("kill", "stop")
UNDONE_BY = {"mask": "unmask", "drain": "undrain", "scale": "scale"}

# What may be hit and how: (action, whom, weight). "all prefill" and "everything" are hit together.
_MENU = (
    ("kill", "decode", 8),
    ("kill", "prefill", 3),
    ("kill", "all prefill", 1),
    ("kill", "monitor", 2),
    ("kill", "planner", 1),
    ("kill", "agent", 1),
    ("stop", "decode", 3),
    ("stop", "prefill", 1),
    ("stop", "monitor", 1),
    ("stop", "planner", 1),
    ("stop", "agent", 1),
    ("stop", "everything", 1),
    ("mask", "decode", 1),
    ("drain", "decode", 2),
    ("scale", "cluster", 2),
)
_PAIR_SHARE = 0.3
_SIZES = ((3, 1), (5, 2), (6, 3), (4, 3))  # decode ranks, prefill workers; back to the first size afterwards


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` after the one before began; ``pick`` in [0, 1) chooses among the processes of the kind."""

    after_s: float
    action: str
    kind: str
    pick: float
    hold_s: float = 0.0  # until it is undone
    size: tuple[int, int] = (0, 0)  # of scale

    def __str__(self) -> str:
        held = f" for {self.hold_s:g} s" if self.hold_s else ""
        size = f" to {self.size[0]} ranks, {self.size[1]} prefill" if self.action == "scale" else ""
        return f"{self.action} {self.kind}{size}{held}"


def schedule(seed: int) -> Iterator[list[Fault]]:
    """Without end: one fault, or two of which the second falls into the first or into the recovery from it. Stops last
    from half a second (nobody should notice much) to longer than every deadline."""
    random = Random(seed)
    while True:
        pause_s, group = random.uniform(0.5, 6.0), []
        for _ in range(1 + (random.random() < _PAIR_SHARE)):
            group.append(_fault(random, pause_s))
            pause_s = random.choice((0.0, random.uniform(0.0, 0.3), random.uniform(0.3, 3.0)))
        yield group


def _fault(random: Random, after_s: float) -> Fault:
    action, kind, _ = random.choices(_MENU, [weight for *_, weight in _MENU])[0]
    pick, hold_s, size = random.random(), 0.0, (0, 0)
    if action == "stop":
        hold_s = random.choice((0.5, 3.0) if kind == "everything" else (0.5, 2.0, 7.0))
    elif action in UNDONE_BY:
        hold_s = random.uniform(0.5, 4.0)
    if action == "scale":
        size = random.choice(_SIZES)
    return Fault(after_s, action, kind, pick, hold_s, size)
