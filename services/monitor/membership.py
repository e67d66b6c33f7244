"""Who is in the group: evidence in, views out (PROTOCOL 3, 4, 5). The one place where that is decided.

    standby --slot given--> joining --prepared view in force--> member --evidence--> removed --gone or left--> slot free
                               ^                                            |
                               +--unmasked, left-- masked <--fault event----+

The evidence is gathered here; what a removal does is in `removals`, what follows a void round in `void_rounds`.

Invariants:
* a prepared view that only some of its members enter ends in a new view;
* a member is removed only for: known gone, left by itself, lifeline cut, silence (counted in this monitor's on-time
  ticks), no answer to a roll call, a published view not adopted in time, a broken path, slowness (if configured),
  memory that is not trusted, a fault event, a scaling;
* a removal beats a join: it is computed from the current view, under a new number, and newcomers prepare again.

If you change a rule here, change its counterpart in docs/protocol.md and the simulation in tests/unit/monitor.
"""

from dataclasses import replace

from common.config import ClusterConfig
from common.ids import ProcessId, Rank
from common.messages import Heartbeat, RollAnswer, SlotLeft, VoidReport
from services.monitor.deafness import Deafness
from services.monitor.emptying import Emptying
from services.monitor.failure_detector import FailureDetector, Suspect
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.join_paths import JoinPaths
from services.monitor.joining import Joining
from services.monitor.lifelines import Lifelines
from services.monitor.processes import ProcessTable
from services.monitor.removals import Fate, Removal, Removals
from services.monitor.sizing import Sizing
from services.monitor.slots import Slot, SlotState, SlotTable
from services.monitor.slow_ranks import SlowRanks
from services.monitor.void_rounds import VoidRounds


class Membership:
    def __init__(
        self,
        config: ClusterConfig,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        joining: Joining,
        paths: JoinPaths,
        sizing: Sizing,
        emptying: Emptying,
        fences: Fences,
        lifelines: Lifelines,
        detector: FailureDetector,
        removals: Removals,
        void_rounds: VoidRounds,
        slow_ranks: SlowRanks,
        deafness: Deafness,
    ) -> None:
        self._config, self._table, self._slots = config, table, slots
        self._group, self._joining, self._sizing, self._emptying = group, joining, sizing, emptying
        self._fences, self._lifelines, self._detector = fences, lifelines, detector
        self._removals, self._void_rounds = removals, void_rounds
        self._slow_ranks, self._deafness, self._paths = slow_ranks, deafness, paths
        self._is_deaf = False

    # Words of processes.

    def on_heartbeat(self, beat: Heartbeat, now: float) -> None:
        slot = self._slots.of_process(beat.process)
        if slot is not None and self._slots.has_left(slot, beat, now):
            self.on_left(slot, now)
        if view := self._group.on_report(beat.process, now):
            self._joining.on_in_force(view, now)
        if beat.counters.get("distrusted"):
            self.distrust(beat.process, now)
        if beat.state == "void":
            self._void_rounds.on_void(beat.process, beat.incarnation, beat.epoch, now)

    def on_void_report(self, report: VoidReport, now: float) -> None:
        self._void_rounds.on_void(report.process, report.incarnation, report.epoch, now)
        self._void_rounds.on_answer(report.process, report.incarnation, report.epoch, report.accused, now)

    def on_roll_answer(self, answer: RollAnswer, now: float) -> None:
        self._void_rounds.on_answer(answer.process, answer.incarnation, answer.epoch, answer.accused, now)

    def on_slot_left(self, left: SlotLeft, now: float) -> None:
        slot = self._slots.of_process(left.process)
        if slot is not None and slot.incarnation == left.incarnation:
            slot.entered = True
            self.on_left(slot, now)

    def on_left(self, slot: Slot, now: float) -> None:
        """The holder says so itself: stream drained, number given back."""
        if (record := self._table.get(slot.process)) and slot.entered:
            record.must_greet = True  # it will offer another heap
        if slot.state is SlotState.MASKED:
            slot.left = True
        elif slot.state is SlotState.FENCING:
            self._fences.on_left(slot.process)
            self._slots.free(slot, now, "left")
        elif slot.state is SlotState.HELD:
            self._removals.remove([Removal(slot.process, "left its slot", now, Fate.FREE)], now)

    def on_gone(self, process: ProcessId, proof: str, now: float) -> None:
        """Reaped by its agent. No roll call is needed for that."""
        self._fences.on_gone(process)
        slot = self._slots.of_process(process)
        if slot is None:
            return
        if slot.state is SlotState.HELD:
            self._removals.remove([Removal(process, proof, now, Fate.FREE)], now)
        else:
            self._slots.free(slot, now, proof)

    # Time.

    def on_tick(self, now: float) -> None:
        self._fences.on_tick(now)
        self._is_deaf = self._group.current is not None and self._deafness.look(self._group.current, now)
        self._remove_suspects(now)
        self._void_rounds.advance(now)
        self._remove_slow(now)
        if not self._void_rounds.is_calling and not self._is_deaf and (view := self._group.current):
            for suspect in self._detector.stuck(view, now)[:1]:
                self._void_rounds.call_roll(view.epoch, suspect.process, suspect.evidence, now)
        self._joining.on_tick(now)
        for process in self._joining.overdue():
            self._removals.remove([Removal(process, "did not get ready in time", now)], now)
        unreached = self._paths.unreached(self._group.prepared, now)
        is_half_in = self._detector.is_half_in(self._group.prepared, now)
        if not self._is_deaf and not self._void_rounds.is_calling:
            if unreached is not None:
                self._put_out_of_join([unreached], Fate.END, now)
            elif is_half_in:
                self._end_half_entered(now)
        self._group.on_tick(now)

    def _put_out_of_join(self, suspects: list[Suspect], fate: Fate, now: float) -> None:
        for suspect in suspects:
            self._paths.on_failed(suspect.process, now)
        self._removals.remove([Removal(s.process, s.evidence, s.since, fate) for s in suspects], now)

    def _end_half_entered(self, now: float) -> None:
        """Who is in stands still until the others are: whatever they lack, a new view ends it."""
        prepared = self._group.prepared
        if prepared is None or prepared.base is None:  # a formation keeps nobody from serving
            return
        evidence = f"view {prepared.view.epoch} was entered by others only"
        late = [process for process in sorted(self._joining.late(prepared, now)) if self._slots.of_process(process)]
        if late:
            suspects = [Suspect(process, evidence, prepared.started_at) for process in late]
            self._put_out_of_join(suspects, Fate.FENCE, now)
        else:
            self._removals.publish_same_members(evidence, now)

    def _remove_suspects(self, now: float) -> None:
        """A cut network closes lifelines and delays adoption too; deaths that agents have seen come another way."""
        if self._is_deaf:
            return
        removals = []
        for slot in self._slots.in_state(SlotState.HELD):
            closed_at = self._lifelines.closed_at(slot.process)
            if closed_at is not None and self._lifelines.is_cut(slot.process, now):
                removals.append(Removal(slot.process, "lifeline closed", closed_at))
        if view := self._group.current:
            suspects = self._detector.silent(view, now)
            suspects += [] if self._group.is_adopted else self._detector.behind(view, self._group.published_at, now)
            removals += [Removal(suspect.process, suspect.evidence, suspect.since) for suspect in suspects]
        removals += [Removal(s.process, s.evidence, s.since) for s in self._silent_joiners(now)]
        self._removals.remove(removals, now)

    def _remove_slow(self, now: float) -> None:
        """One at a time, each in a group that has come to rest since the last; never the room for all experts."""
        view = self._group.current
        at_rest = self._group.is_adopted and self._group.prepared is None and not self._void_rounds.is_calling
        if view is None or not at_rest or len(view.members) <= max(1, self._group.experts.min_ranks):
            self._slow_ranks.restart()
        elif (suspect := self._slow_ranks.look(view, now)) is not None:
            self._slow_ranks.restart()
            self._removals.remove([Removal(suspect.process, suspect.evidence, suspect.since, Fate.END)], now)

    def _silent_joiners(self, now: float) -> list[Suspect]:
        """A process that warms up is no member and may be slow, but not silent for thrice the time."""
        limit_s = 3 * self._config.monitor.heartbeat_timeout_s
        found = []
        for process in self._joining.joiners():
            record = self._table.get(process)
            if record is not None and self._table.silence_s(record, now) > limit_s:
                found.append(Suspect(process, f"no heartbeat for {limit_s:g} s while joining", record.heard_at))
        return found

    # Commands.

    def distrust(self, process: ProcessId, now: float) -> None:
        """It says itself that its memory must not be trusted: out, and ended. Nobody takes that memory over."""
        self._removals.remove([Removal(process, "its memory is not trusted, by its own word", now, Fate.END)], now)

    def shrink(self, now: float) -> None:
        """Puts out who is too many, or drained, in one view, once others hold their experts. What is masked has left
        already and only gives its number back. Where a loss meanwhile has taken the room for all experts, a drain is
        off, as it would be refused now, and who is too many waits until there is room."""
        leaving: list[Removal] = []
        outside: list[Removal] = []
        for removal in [*self._surplus(now), *self._drained(now)]:
            (leaving if self._group.member(removal.process) else outside).append(removal)
        if leaving and len(self._group.members) - len(leaving) < max(1, self._group.experts.min_ranks):
            for removal in leaving:
                self._emptying.drained.pop(removal.process, None)
            leaving = []
        undone = self._emptying.advance([removal.process for removal in leaving], now)
        if undone is not None:
            outside += [replace(removal, evidence=removal.evidence + undone) for removal in leaving]
        self._removals.remove(outside, now)

    def _surplus(self, now: float) -> list[Removal]:
        released = []
        for slot in self._sizing.surplus():
            if slot.state is SlotState.HELD:
                evidence = f"scaled to {self._sizing.num_ranks} ranks"
                released.append(Removal(slot.process, evidence, now, Fate.RELEASE))
            elif slot.left:
                self._slots.free(slot, now, "scaled down while masked")
        return released

    def _drained(self, now: float) -> list[Removal]:
        removals = []
        for process, cause in list(self._emptying.drained.items()):
            slot = self._slots.of_process(process)
            if slot is not None and slot.state is SlotState.HELD:
                removals.append(Removal(process, cause, now, Fate.MASK))
            else:
                del self._emptying.drained[process]  # out already, this way or another
        return removals

    def drain(self, rank: Rank, cause: str, now: float) -> None:
        """Out of the group as when masked, but emptied of experts first."""
        process = self._slots.slots[rank].process
        self._joining.withdraw_unmask(process)
        self._emptying.drained[process] = cause
        self.shrink(now)

    def mask(self, rank: Rank, cause: str, now: float) -> None:
        process = self._slots.slots[rank].process
        self._joining.withdraw_unmask(process)
        self._removals.remove([Removal(process, cause, now, Fate.MASK)], now)

    def unmask(self, rank: Rank, now: float) -> None:
        self._emptying.drained.pop(self._slots.slots[rank].process, None)
        self._joining.unmask(self._slots.slots[rank], now)
