"""Who of an epoch is still able to go on: asked of every member when a round was void (PROTOCOL 3.2).

    void reported --RollCall to all, repeated--> CALLING --all have answered--> new view, same members
                                                 CALLING --roll_call_s--> new view without the silent

Guilty is only who does not answer in time; a live heartbeat beside a stuck stream is silence too. What members accuse
each other of decides nothing, with two exceptions, where all answer, roll call after roll call. The same pair each
time: then the path between them is broken, which no new view mends, and the one that stands in more such pairs goes.
And a group that has stood still since the last roll call, where all accusations have the same one in common, which
accuses all others or is accused by them: it is cut off from them, and goes the second time.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from common.ids import Epoch, ProcessId
from common.messages import View

SEND_AGAIN_S = 0.5
# Two ranks may miss each other's deadline twice in a row on a busy machine, and a group of two has only one pair. Four
# times with hardly a clean round in between is no accident: over a broken path every round is void at its deadline.
_NUM_REPEATS = 4
_REPEATS_WITHIN_S = 20.0
_STANDSTILL_ROUNDS = 2  # between two roll calls; what a cut rank sends or hears alone may complete one

Pair = frozenset[ProcessId]


@dataclass(slots=True)
class RollCallState:
    """Answers say which ranks the answerer had been missing."""

    epoch: Epoch
    cause: str
    members: tuple[ProcessId, ...]
    started_at: float
    sent_at: float
    answers: dict[ProcessId, tuple[int, ...]] = field(default_factory=dict)

    @property
    def silent(self) -> tuple[ProcessId, ...]:
        return tuple(process for process in self.members if process not in self.answers)


class BrokenPaths:
    """Remembers the accusations of the last roll calls that all members answered."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, frozenset[Pair]]] = deque(maxlen=_NUM_REPEATS)
        self._last_center: tuple[ProcessId | None, int] = None, 0

    def on_all_answered(self, roll_call: RollCallState, view: View, num_rounds: int, now: float) -> ProcessId | None:
        """The member to remove because of a broken path, or None. ``num_rounds``: that the group has made so far."""
        process_of: dict[int, ProcessId] = {member.rank: member.process for member in view.members}
        pairs = {
            frozenset((accuser, process_of[rank]))
            for accuser, accused in roll_call.answers.items()
            for rank in accused
            if rank in process_of and process_of[rank] != accuser
        }
        self._history.append((now, frozenset(pairs)))
        (last, last_rounds), center = self._last_center, _center(pairs, list(process_of.values()))
        self._last_center = center, num_rounds
        if center is not None and center == last and num_rounds - last_rounds <= _STANDSTILL_ROUNDS:
            self._history.clear()
            return center
        if len(self._history) < _NUM_REPEATS or now - self._history[0][0] > _REPEATS_WITHIN_S:
            return None
        repeated = frozenset.intersection(*(pairs for _, pairs in self._history))
        if not repeated:
            return None
        self._history.clear()
        in_pairs = Counter(process for pair in repeated for process in pair)
        accused = Counter(
            process_of[rank] for ranks in roll_call.answers.values() for rank in ranks if rank in process_of
        )
        return max(in_pairs, key=lambda process: (in_pairs[process], accused[process], process))


def _center(pairs: set[Pair], members: list[ProcessId]) -> ProcessId | None:
    """The one that is in a pair with every other, if no pair is without it. Two are not enough to tell them apart."""
    if len(members) < 3 or not pairs:
        return None
    common = frozenset.intersection(*pairs)
    found = [p for p in common if all(frozenset((p, other)) in pairs for other in members if other != p)]
    return found[0] if len(found) == 1 else None
