"""How processes come into the group: slots for standbys, formation, two-phase joins (PROTOCOL 4).

standby --a slot is free and the group too small--> slot given --> asked to prepare --> in force
                                                      ^                  |
                                                      +---- dropped <----+   must first say that it is out
"""

from common.config import ClusterConfig
from common.ids import NO_RANK, Epoch, ProcessId
from common.messages import Member, View
from common.view import newcomers
from services.monitor.actions import Outbox
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.join_paths import JoinPaths
from services.monitor.prepared_view import PreparedView
from services.monitor.processes import Process, ProcessTable
from services.monitor.recovery import place_outsider
from services.monitor.sizing import Sizing
from services.monitor.slots import Slot, SlotState, SlotTable
from services.monitor.terms import EpochCounter
from services.monitor.ticks import TickClock

_WELCOME_AGAIN_S = 0.5
# A newcomer that had not heard of the dropped view cannot say that it is out of it. Its heartbeats show soon enough
# that it never went in.
_NOT_IN_S = 1.0
# After a take-over; a process that is just starting is heard by then.
_UNHEARD_S = 20.0


class Joining:
    def __init__(
        self,
        config: ClusterConfig,
        counter: EpochCounter,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        sizing: Sizing,
        fences: Fences,
        paths: JoinPaths,
        outbox: Outbox,
        clock: TickClock,
    ) -> None:
        self._config, self._counter, self._table, self._slots = config, counter, table, slots
        self._paths = paths
        self._group, self._sizing, self._fences, self._outbox, self._clock = group, sizing, fences, outbox, clock
        self._dropped: dict[ProcessId, tuple[Epoch, float]] = {}  # newcomers that must say they are out of that view
        self._unmasked: set[ProcessId] = set()
        self._forming_since: float | None = None
        self._form_now = False
        self._complete_since: float | None = None
        self._overdue: set[ProcessId] = set()
        self._unheard: set[ProcessId] = set()
        self._unheard_since = 0.0
        self.to_welcome: list[ProcessId] = []  # processes whose slot has changed

    def joiners(self) -> list[ProcessId]:
        """Holders of slots that are not in the current view."""
        held = self._slots.in_state(SlotState.HELD)
        return [slot.process for slot in held if self._group.member(slot.process) is None]

    def on_take_over(self, now: float) -> None:
        """Some process may hold a slot that nobody told of: stopped when the last monitor removed it, or with that
        monitor's last words still unread. So nobody gets a slot before every decode process, and every one that an
        agent lists, has been heard and follows this monitor: from then on it refuses older words."""
        children = self._table.children.items()
        self._unheard = {process for process, child in children if child.name.startswith("decode")}
        self._unheard |= {process.id for process in self._table.of_kind("decode")}
        self._unheard_since = now

    def _hear_out(self, now: float) -> None:
        for process in sorted(self._unheard):
            record = self._table.get(process)
            if record is None and process not in self._table.children:
                self._unheard.discard(process)
            elif record is not None and record.beat.term >= self._counter.term:
                self._unheard.discard(process)
                if self._slots.of_process(process) is None:
                    place_outsider(record, self._slots, self._fences, self._config.monitor.adopt_timeout_s, now)
                    self.to_welcome.append(process)
            elif self._clock.elapsed(self._unheard_since, now) > _UNHEARD_S:
                self._fences.put_up(process, now)

    def may_have_been_let_in(self, process: ProcessId) -> bool:
        """A newcomer of a dropped view: it may be about to leave its slot, and must not be told that it holds it."""
        return process in self._dropped

    def on_in_force(self, view: View, now: float) -> None:
        for process in [member.process for member in view.members]:
            self._dropped.pop(process, None)
        self._paths.on_in_force(view)
        self._forming_since, self._form_now, self._complete_since = None, False, None

    def on_dropped(self, prepared: PreparedView, view: View, now: float) -> None:
        """Newcomers may have been let in by members already: they come back when they say they are out."""
        for member in newcomers(prepared.view, view):
            slot = self._slots.of_process(member.process)
            if slot is not None and slot.state is SlotState.HELD:
                self._dropped[member.process] = (prepared.view.epoch, now)

    def form_again(self, now: float) -> None:
        """The formation failed half-way. There is no older view to fall back to: all that are left prepare anew, under
        a new number, at once; some may be in the failed epoch already and wait there."""
        self._group.prepared = None
        self._form_now = True

    def advance(self, now: float) -> None:
        """After every event: gives slots, starts what can start."""
        self._give_masked_back(now)
        self._give_slots(now)
        self._start_join(now)

    def on_tick(self, now: float) -> None:
        for process, (epoch, since) in list(self._dropped.items()):
            record, slot = self._table.get(process), self._slots.of_process(process)
            if (
                record is None
                or slot is None
                or slot.state is not SlotState.HELD
                or record.beat.out_of >= epoch
                or (record.beat.epoch < epoch and self._clock.elapsed(since, now) > _NOT_IN_S)
            ):
                del self._dropped[process]
            elif self._clock.elapsed(since, now) > self._config.monitor.adopt_timeout_s:
                self._overdue.add(process)
        self._end_late_join(now)

    def overdue(self) -> list[ProcessId]:
        """Those to be removed because they neither came in nor went out."""
        overdue, self._overdue = sorted(self._overdue), set()
        return overdue

    def on_heartbeat(self, process: Process, now: float) -> None:
        """Clears a dropped newcomer at once; repeats a Welcome that was lost, of one that got a slot, or lost it to a
        mask before it was in a view."""
        dropped = self._dropped.get(process.id)
        if dropped is not None and process.beat.out_of >= dropped[0]:
            del self._dropped[process.id]
        slot = self._slots.of_process(process.id)
        if slot is None or now - process.welcomed_at <= _WELCOME_AGAIN_S:
            return
        is_new = slot.state is SlotState.HELD and not slot.seen
        is_still_joining = process.beat.rank == slot.rank and not process.beat.epoch
        if is_new or (slot.state is SlotState.MASKED and is_still_joining):
            self.to_welcome.append(process.id)

    def _end_late_join(self, now: float) -> None:
        prepared = self._group.prepared
        if prepared is None or not prepared.newcomers:  # a migration looks after its own
            return
        if self._clock.elapsed(prepared.started_at, now) <= self._config.monitor.prepare_timeout_s:
            return
        if late := self.late(prepared, now):
            self._overdue |= late
        elif prepared.base is None:
            self.form_again(now)
        else:
            prepared.started_at = now  # all newcomers are in; a member that is not will be void, silent, or removed

    def late(self, prepared: PreparedView, now: float) -> set[ProcessId]:
        """Newcomers that hold up the prepared view, whose time is over."""
        waiting = set(prepared.waiting)
        if prepared.base is not None:
            late = waiting & set(prepared.newcomers)
            late = self._missed_by_members(prepared) & late or late
        else:
            late = {process for process in waiting if self._holds_up(prepared, process)}
        self._outbox.emit("join_failed", now, epoch=prepared.view.epoch, waiting=sorted(waiting), late=sorted(late))
        return late

    def _missed_by_members(self, prepared: PreparedView) -> set[ProcessId]:
        """Newcomers of which a member lacks the first header: no other is to blame if one of them has no path there."""
        missed = set()
        for member in prepared.view.members:
            record = self._table.get(member.process)
            if record is not None and member.process not in prepared.newcomers:
                missed |= {m.process for m in prepared.view.members if m.rank in record.beat.misses}
        return missed

    def _holds_up(self, prepared: PreparedView, process: ProcessId) -> bool:
        """In a formation: others wait for its first header, and it waits for nobody."""
        ranks = {member.process: member.rank for member in prepared.view.members}
        record = self._table.get(process)
        others = [self._table.get(other) for other in ranks if other != process]
        awaited = any(other is not None and ranks[process] in other.beat.waits_for for other in others)
        return awaited and (record is None or not record.beat.waits_for)

    # Slots.

    def unmask(self, slot: Slot, now: float) -> None:
        """Nothing to do for who is in: a permission that stays would undo the next mask."""
        if slot.state is SlotState.MASKED:
            self._unmasked.add(slot.process)
            self._give_masked_back(now)

    def withdraw_unmask(self, process: ProcessId) -> None:
        """It has not been given its slot back yet, and is not to get it."""
        self._unmasked.discard(process)

    def _give_masked_back(self, now: float) -> None:
        """After a take-over a masked rank is bound to whatever number was free, so the last holder of that one may
        still be there: stopped and unheard, or heard and not reaped."""
        if self._unheard:
            return
        claimed = {process.beat.rank: process.id for process in self._table.of_kind("decode")}
        for slot in self._slots.in_state(SlotState.MASKED):
            process = self._table.get(slot.process)
            if claimed.get(slot.rank, slot.process) != slot.process:
                continue
            if process is not None and slot.process in self._unmasked and slot.left and not process.must_greet:
                self._unmasked.discard(slot.process)
                self._give(slot, process, now)

    def _give_slots(self, now: float) -> None:
        self._hear_out(now)
        if self._unheard:
            return
        for process in self._table.of_kind("decode"):
            slot = self._slots.lowest_free()
            if slot is None or self._slots.num_taken >= self._sizing.num_ranks:
                return
            if self._is_standby(process, now):
                self._give(slot, process, now)

    def _is_standby(self, process: Process, now: float) -> bool:
        return (
            self._slots.of_process(process.id) is None
            and process.hello.rank == NO_RANK
            and not process.must_greet
            and self._table.is_live(process, now)
            and self._paths.may_try(process.hello.name, now)
            and self._fences.may_get_slot(process.id, now)
        )

    def _give(self, slot: Slot, process: Process, now: float) -> None:
        self._slots.give(slot.rank, process.id, self._counter.take_incarnation(), process.hello.heap, now)
        slot.last_pid, slot.last_host = process.hello.pid, process.hello.host
        fields = {"rank": slot.rank, "incarnation": slot.incarnation, "process": process.id}
        self._outbox.emit("slot_given", now, epoch=self._group.epoch, **fields)
        self.to_welcome.append(process.id)

    # Joins.

    def _start_join(self, now: float) -> None:
        if self._group.prepared is not None:
            return
        ready = [process for process in self.joiners() if process not in self._dropped]
        if self._group.members:
            # Nobody joins together with one that has failed before.
            ready = [process for process in ready if not self._paths.has_failed(process)] or ready[:1]
            if ready and self._group.is_adopted:
                self._group.prepare(self._members(ready), now)
            return
        if not ready:
            self._forming_since, self._form_now, self._complete_since = None, False, None
            return
        if self._may_form(len(ready), now):
            self._form_now = False
            self._group.prepare(self._members(ready), now)

    def _may_form(self, num_ready: int, now: float) -> bool:
        """Desired size, or waited long enough for it; and the planner has had its time. A group that has lost all its
        members is needed: it begins as soon as there is room for all experts, and the others join it."""
        if self._form_now:
            return True
        self._forming_since = now if self._forming_since is None else self._forming_since
        is_new = self._group.placement is None
        complete = num_ready >= (self._sizing.num_ranks if is_new else self._group.experts.min_ranks)
        if not complete and self._clock.elapsed(self._forming_since, now) <= self._config.monitor.formation_s:
            return False
        self._complete_since = now if self._complete_since is None else self._complete_since
        is_recorded = bool(self._config.planner.init_placement)  # the planner reads it, and was asked for
        awaits_plan = (
            self._group.placement is None
            and self._group.experts.plan is None
            and (is_recorded or any(self._table.is_live(p, now) for p in self._table.of_kind("planner")))
        )
        waited_s = self._clock.elapsed(self._complete_since, now)
        patience_s = self._config.monitor.formation_s if is_recorded else self._config.monitor.planner_wait_s
        return not awaits_plan or waited_s > patience_s

    def _members(self, processes: list[ProcessId]) -> list[Member]:
        members = []
        for process in processes:
            slot, record = self._slots.of_process(process), self._table.get(process)
            assert slot is not None
            if record is not None:
                hello = record.hello
                place = (hello.host, hello.endpoint, slot.heap, hello.agent)
                members.append(Member(slot.rank, slot.incarnation, process, *place))
        return members
