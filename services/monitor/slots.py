"""Who holds which slot number, also after the process was put out of the group.

    FREE --given to a process--> HELD --process known gone, or left--> FREE
                                 HELD --removed, not known gone--> FENCING --gone, or left--> FREE
                                 HELD --masked--> MASKED --unmasked and left--> HELD
                                                  MASKED --gone--> FREE

Invariant: a number is given out only when FREE, and it is FREE only when its last holder has been reaped or has itself
said that it left, with its stream drained (PROTOCOL 5.2): kernels may outlive sockets, and a store of the old holder
lands in the region of the new one. Likewise no process holds two numbers.
"""

from dataclasses import dataclass, field
from enum import Enum

from common.ids import NO_RANK, Incarnation, ProcessId, Rank
from common.messages import Heartbeat
from common.state_machine import StateMachine, transition_table

_SETTLED_S = 1.0
_NOBODY, _NO_INCARNATION = ProcessId(""), Incarnation(0)


class SlotState(Enum):
    FREE = "free"
    HELD = "held"
    FENCING = "fencing"
    MASKED = "masked"


MOVES = transition_table(
    {
        SlotState.FREE: {SlotState.HELD, SlotState.FENCING, SlotState.MASKED},  # the latter two after a take-over
        SlotState.HELD: {SlotState.FREE, SlotState.FENCING, SlotState.MASKED},
        SlotState.FENCING: {SlotState.FREE},
        SlotState.MASKED: {SlotState.FREE, SlotState.HELD},
    }
)


@dataclass(slots=True)
class Slot:
    """``seen``: the holder's heartbeats have shown this incarnation, so if they no longer do, it has left; before, they
    only show that its Welcome is still on the way. ``entered``: they have shown it in a view. ``last_*`` describe the
    last holder for people, also when the slot is free."""

    rank: Rank
    machine: StateMachine[SlotState]
    process: ProcessId = _NOBODY
    incarnation: Incarnation = _NO_INCARNATION
    heap: str = ""
    seen: bool = False
    entered: bool = False
    taken_away_at: float = 0.0  # FENCING, MASKED: since when
    released: bool = False  # FENCING: nothing is wrong with it, it is only not wanted any more
    left: bool = False  # MASKED: the process has drained its stream and waits as a standby
    last_incarnation: Incarnation = _NO_INCARNATION
    last_pid: int = 0
    last_host: str = ""

    @property
    def state(self) -> SlotState:
        return self.machine.state


@dataclass(slots=True)
class SlotTable:
    slots: list[Slot] = field(default_factory=list)

    @classmethod
    def of_size(cls, max_ranks: int, now: float) -> "SlotTable":
        return cls([Slot(Rank(r), StateMachine(f"slot {r}", MOVES, SlotState.FREE, now)) for r in range(max_ranks)])

    def give(
        self,
        rank: Rank,
        process: ProcessId,
        incarnation: Incarnation,
        heap: str,
        now: float,
        state: SlotState = SlotState.HELD,
    ) -> Slot:
        """``state``: after a take-over slots are found fenced or masked."""
        holder = self.of_process(process)
        slot = self.slots[rank]
        assert holder is None or holder is slot, f"{process} holds slot {holder and holder.rank} already"
        slot.machine.move(state, now, f"{process} incarnation {incarnation}")
        slot.process, slot.incarnation, slot.heap = process, incarnation, heap
        slot.seen = slot.entered = slot.left = slot.released = False
        slot.taken_away_at = now
        slot.last_incarnation = incarnation
        return slot

    def has_left(self, slot: Slot, beat: Heartbeat, now: float) -> bool:
        """Takes note of a heartbeat of the holder. True when it shows that the slot was given back, whatever became
        of the holder's SlotLeft. A newcomer that lost its slot before it knew of it shows nothing else but its lack:
        that counts once the words that gave and took it must have arrived."""
        if beat.incarnation == slot.incarnation:
            slot.seen = True
            slot.entered = slot.entered or beat.epoch > 0
        is_known = slot.seen or (slot.state is not SlotState.HELD and now - slot.taken_away_at > _SETTLED_S)
        return is_known and not slot.left and beat.rank == NO_RANK

    def fence(self, slot: Slot, now: float, cause: str, released: bool = False) -> None:
        slot.machine.move(SlotState.FENCING, now, cause)
        slot.taken_away_at, slot.released = now, released

    def mask(self, slot: Slot, now: float, cause: str) -> None:
        slot.machine.move(SlotState.MASKED, now, cause)
        slot.taken_away_at = now

    def free(self, slot: Slot, now: float, cause: str) -> None:
        slot.machine.move(SlotState.FREE, now, cause)
        slot.process, slot.left = _NOBODY, False

    def of_process(self, process: ProcessId) -> Slot | None:
        return next((slot for slot in self.slots if slot.process == process), None)

    def in_state(self, state: SlotState) -> list[Slot]:
        return [slot for slot in self.slots if slot.state is state]

    def lowest_free(self) -> Slot | None:
        return next(iter(self.in_state(SlotState.FREE)), None)

    @property
    def num_taken(self) -> int:
        """Slots that count towards the desired size of the group."""
        return len(self.in_state(SlotState.HELD)) + len(self.in_state(SlotState.MASKED))
