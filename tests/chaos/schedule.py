"""A seeded schedule of faults and pairs of faults. Pure: the same seed gives the same schedule."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

# What may be hit and how: (action, kind of process, weight). A stop ends with a continue after `Fault.stop_s`.
_MENU = (
    ("kill", "decode", 8),
    ("kill", "prefill", 4),
    ("kill", "monitor", 2),
    ("kill", "planner", 1),
    ("kill", "agent", 1),
    ("stop", "decode", 3),
    ("stop", "prefill", 1),
    ("stop", "monitor", 1),
    ("stop", "everything", 1),
)
_PAIR_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` after the one before; ``pick`` in [0, 1) chooses among the processes of the kind that are alive."""

    after_s: float
    action: str  # kill | stop
    kind: str
    pick: float
    stop_s: float = 0.0


def schedule(seed: int) -> Iterator[Fault]:
    """Without end. Stops last from half a second (nobody should notice much) to longer than every deadline."""
    random = Random(seed)
    while True:
        pause_s = random.uniform(0.5, 6.0)
        for _ in range(1 + (random.random() < _PAIR_SHARE)):
            action, kind, _ = random.choices(_MENU, [weight for *_, weight in _MENU])[0]
            stop_s = random.choice((0.5, 2.0, 7.0)) if action == "stop" else 0.0
            if kind == "everything":
                stop_s = random.choice((0.5, 3.0))
            yield Fault(pause_s, action, kind, random.random(), stop_s)
            pause_s = random.uniform(0.0, 0.3)  # the second of a pair: into the recovery from the first
