"""What a monitor makes of a group that lived before it (PROTOCOL 3.4)."""

from common.ids import Incarnation
from common.messages import View
from services.monitor.actions import Outbox
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.processes import Process, ProcessTable, claims
from services.monitor.slots import SlotState, SlotTable


def recover(
    best: View | None,
    table: ProcessTable,
    slots: SlotTable,
    group: Group,
    fences: Fences,
    outbox: Outbox,
    leave_s: float,
    now: float,
) -> None:
    """Fills ``slots`` from what the processes say and publishes a fresh view of those members of ``best`` that do.
    ``leave_s``: time for a newcomer to give its slot back.

    Fresh also when nothing is missing: ranks may have said ready for a view that the last monitor prepared, which
    binds, so only a view with a higher number makes sure that all of them are in the same epoch.
    """
    if best is not None:
        group.recover(best)
    members = []
    for member in best.members if best else ():
        process = table.get(member.process)
        if process is not None and claims(process, member.rank, member.incarnation):
            slots.give(member.rank, member.process, member.incarnation, member.heap, now)
            members.append(member)
            continue
        evidence = "not heard by the new monitor"
        if process is None and member.process not in table.gone:
            table.on_unheard(member)
            slots.give(member.rank, member.process, member.incarnation, member.heap, now, SlotState.FENCING)
            fences.put_up(member.process, now)
        else:
            evidence = table.gone.get(member.process, "not in the group by its own word")
        fields = {"rank": member.rank, "incarnation": member.incarnation, "process": member.process}
        outbox.emit("removed", now, epoch=group.epoch, **fields, evidence=evidence, since=outbox.events.wall(now))
    for process in table.of_kind("decode"):
        if slots.of_process(process.id) is None:
            place_outsider(process, slots, fences, leave_s, now)
    group.publish(members, "a new monitor has taken over", now)


def place_outsider(process: Process, slots: SlotTable, fences: Fences, leave_s: float, now: float) -> None:
    """Not a member of the highest view. A masked rank stays masked. One that was in an older view is a zombie. A
    newcomer, whom the last monitor gave a slot, is asked to give it back, and gets one like any standby: it may be
    entering a prepared view right now, so that it cannot simply go on."""
    hello, beat = process.hello, process.beat
    free = slots.lowest_free()
    if hello.masked or beat.state == "masked":
        if free is not None:
            slots.give(free.rank, process.id, Incarnation(0), hello.heap, now, SlotState.MASKED).left = True
        return
    if not 0 <= beat.rank < len(slots.slots):
        return
    slot = slots.slots[beat.rank]
    if slot.state is SlotState.FREE:
        slots.give(beat.rank, process.id, beat.incarnation, hello.heap, now, SlotState.FENCING).seen = True
    is_zombie = slot.process != process.id or beat.epoch > 0
    fences.put_up(process.id, now, 0.0 if is_zombie else leave_s)
