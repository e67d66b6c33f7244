"""A seeded schedule of faults and pairs of faults. Pure: the same seed gives the same schedule.

Signals go straight to processes, found by /proc, so that they also hit when nobody leads the cluster. Everything else
is a fault event on the bus, undone by another one after `Fault.hold_s` unless it ends by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from common.network_cut import DIRECTIONS, WHICH

SIGNALS = ("kill", "stop")
UNDONE_BY = {"mask": "unmask", "drain": "undrain", "scale": "scale", "slow": "slow"}

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
    ("slow", "decode", 2),
    ("drop_network", "decode", 2),
    ("corrupt_heap", "decode", 2),
    ("kill in a round", "decode", 2),
)
# Of the routers, beside all this: their clients see these, so they are rarer, and one at a time.
_ROUTER_MENU = (("kill", 2), ("stop", 1), ("restart", 1))
_PAIR_SHARE = 0.3
_FACTORS = (2.0, 4.0, 10.0)
_CUTS = tuple((which, direction) for which in WHICH for direction in DIRECTIONS)
_SIZES = ((3, 1), (5, 2), (6, 3), (4, 3))  # decode ranks, prefill workers; back to the first size afterwards


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` after the one before began; ``pick`` in [0, 1) chooses among the processes of the kind."""

    after_s: float
    action: str
    kind: str
    pick: float
    hold_s: float = 0.0  # until it is undone
    detail: tuple[tuple[str, object], ...] = ()  # keys and values of the fault event

    def __str__(self) -> str:
        held = f" for {self.hold_s:.3g} s" if self.hold_s else ""
        details = "".join(f", {key} {value}" for key, value in self.detail)
        return f"{self.action} {self.kind}{details}{held}"


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


def router_schedule(seed: int) -> Iterator[list[Fault]]:
    """Without end, one at a time; drawn apart, so that `schedule` is the same with and without it."""
    random = Random(f"routers {seed}")
    while True:
        (action,) = random.choices([action for action, _ in _ROUTER_MENU], [weight for _, weight in _ROUTER_MENU])
        hold_s = random.choice((0.5, 2.0, 7.0)) if action == "stop" else 0.0
        yield [Fault(random.uniform(8.0, 20.0), action, "router", random.random(), hold_s)]


def _fault(random: Random, after_s: float) -> Fault:
    action, kind, _ = random.choices(_MENU, [weight for *_, weight in _MENU])[0]
    pick, hold_s = random.random(), 0.0
    detail: dict[str, object] = {}
    match action:
        case "stop":
            hold_s = random.choice((0.5, 3.0) if kind == "everything" else (0.5, 2.0, 7.0))
        case "mask" | "drain":
            hold_s = random.uniform(0.5, 4.0)
        case "scale":
            hold_s, (ranks, workers) = random.uniform(0.5, 4.0), random.choice(_SIZES)
            detail = {"decode": ranks, "prefill": workers}
        case "slow":
            hold_s, detail = random.uniform(1.0, 6.0), {"factor": random.choice(_FACTORS)}
        case "drop_network":
            hold_s, (which, direction) = random.choice((1.0, 5.0)), random.choice(_CUTS)
            detail = {"which": which, "direction": direction, "duration_s": hold_s}
        case "kill in a round":
            detail = {"rounds_ahead": random.randrange(1, 200)}
        case _:
            pass
    return Fault(after_s, action, kind, pick, hold_s, tuple(detail.items()))
