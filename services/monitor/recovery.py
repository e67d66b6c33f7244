"""What a monitor makes of a group that lived before it (PROTOCOL 3.4)."""

from common.ids import NO_RANK, Incarnation
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
    now: float,
) -> None:
    """Fills ``slots`` from what the processes say and publishes a fresh view of those members of ``best`` that do.

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
        known_out = member.process in table.gone or (process is not None and process.hello.rank == NO_RANK)
        evidence = table.gone.get(member.process, "left its slot" if known_out else "not heard by the new monitor")
        fields = {"rank": member.rank, "incarnation": member.incarnation, "process": member.process}
        outbox.emit("removed", now, epoch=group.epoch, **fields, evidence=evidence, since=outbox.events.wall(now))
        if not known_out:
            slots.give(member.rank, member.process, member.incarnation, member.heap, now, SlotState.FENCING)
            fences.put_up(member.process, now)
    for process in table.of_kind("decode"):
        if slots.of_process(process.id) is None:
            _place_outsider(process, slots, fences, now)
    group.publish(members, "a new monitor has taken over", now)


def _place_outsider(process: Process, slots: SlotTable, fences: Fences, now: float) -> None:
    """Not in the highest view: a newcomer goes on joining, a masked rank stays masked, anything else is a zombie."""
    hello = process.hello
    free = slots.lowest_free()
    if hello.masked or process.beat.state == "masked":
        if free is not None:
            slots.give(free.rank, process.id, Incarnation(0), hello.heap, now, SlotState.MASKED).left = True
        return
    if hello.rank == NO_RANK or hello.rank >= len(slots.slots):
        return
    slot = slots.slots[hello.rank]
    if slot.state is SlotState.FREE:
        state = SlotState.HELD if hello.view is None else SlotState.FENCING
        slots.give(slot.rank, process.id, hello.incarnation, hello.heap, now, state)
    if slot.process != process.id or slot.state is not SlotState.HELD:
        fences.put_up(process.id, now)
