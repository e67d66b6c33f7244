"""Who is in the group: evidence in, views out (DESIGN 7; PROTOCOL 3, 4, 5). The one place where that is decided.

    standby --slot given--> joining --prepared view in force--> member --evidence--> removed --gone or left--> slot free
                               ^                                            |
                               +--unmasked, left-- masked <--fault event----+

    void round of the current or prepared epoch --> roll call --all answered--> new view, same members
                                                              --silent-------> new view without them

Invariants:
* every void of the current epoch ends in a new view;
* a member is removed only for: known gone, left by itself, lifeline cut, silence (counted in this monitor's on-time
  ticks), no answer to a roll call, a published view not adopted in time, a broken path, slowness (if configured),
  memory that is not trusted, a fault event, a scaling;
* who is removed and not known gone is fenced, unless masked, and its slot number waits for that; who is released by a
  scaling has time to leave by itself first;
* a removal beats a join: it is computed from the current view, under a new number, and newcomers prepare again.

If you change a rule here, change PROTOCOL's counterpart in docs and the simulation in tests/unit/monitor.
"""

from dataclasses import dataclass, replace
from enum import Enum

from common.config import ClusterConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import Heartbeat, Member, RollAnswer, RollCall, SlotLeft, View, VoidReport
from services.monitor.actions import Outbox
from services.monitor.deafness import Deafness
from services.monitor.emptying import Emptying
from services.monitor.failure_detector import FailureDetector, Suspect
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.joining import Joining
from services.monitor.lifelines import Lifelines
from services.monitor.processes import ProcessTable
from services.monitor.roll_call import SEND_AGAIN_S, BrokenPaths, RollCallState
from services.monitor.sizing import Sizing
from services.monitor.slots import Slot, SlotState, SlotTable
from services.monitor.slow_ranks import SlowRanks
from services.monitor.ticks import TickClock


class Fate(Enum):
    """What becomes of the slot of a removed process."""

    FENCE = "fence"  # still there, as far as is known; may come back when it has left by itself
    END = "end"  # still there, and what is wrong with it would be wrong again: it must end
    FREE = "free"  # reaped, or has left by itself
    MASK = "mask"  # stays alive, keeps its number
    RELEASE = "release"  # stays alive, gives its number back


@dataclass(frozen=True, slots=True)
class Removal:
    process: ProcessId
    evidence: str
    since: float
    fate: Fate = Fate.FENCE


class Membership:
    def __init__(
        self,
        monitor: ProcessId,
        config: ClusterConfig,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        joining: Joining,
        sizing: Sizing,
        emptying: Emptying,
        fences: Fences,
        lifelines: Lifelines,
        detector: FailureDetector,
        outbox: Outbox,
        clock: TickClock,
    ) -> None:
        self._monitor, self._config = monitor, config
        self._table, self._slots, self._group, self._joining, self._sizing = table, slots, group, joining, sizing
        self._emptying = emptying
        self._fences, self._lifelines, self._detector = fences, lifelines, detector
        self._outbox, self._clock = outbox, clock
        self._broken_paths = BrokenPaths()
        self._slow_ranks = SlowRanks(config.monitor, table, clock)
        self._deafness = Deafness(config.monitor, table, outbox)
        self._is_deaf = False
        self.roll_call: RollCallState | None = None
        self.term = 0

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
            self._on_void(beat.process, beat.incarnation, beat.epoch, now)

    def on_void_report(self, report: VoidReport, now: float) -> None:
        self._on_void(report.process, report.incarnation, report.epoch, now)
        self._on_answer(report.process, report.incarnation, report.epoch, report.accused, now)

    def on_roll_answer(self, answer: RollAnswer, now: float) -> None:
        self._on_answer(answer.process, answer.incarnation, answer.epoch, answer.accused, now)

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
            self.remove([Removal(slot.process, "left its slot", now, Fate.FREE)], now)

    def on_gone(self, process: ProcessId, proof: str, now: float) -> None:
        """Reaped by its agent. No roll call is needed for that."""
        self._fences.on_gone(process)
        slot = self._slots.of_process(process)
        if slot is None:
            return
        if slot.state is SlotState.HELD:
            self.remove([Removal(process, proof, now, Fate.FREE)], now)
        else:
            self._slots.free(slot, now, proof)

    # Time.

    def on_tick(self, now: float) -> None:
        self._fences.on_tick(now)
        self._is_deaf = self._group.current is not None and self._deafness.look(self._group.current, now)
        self._remove_suspects(now)
        self._advance_roll_call(now)
        self._remove_slow(now)
        if self.roll_call is None and not self._is_deaf and (view := self._group.current):
            for suspect in self._detector.stuck(view, now)[:1]:
                self._call_roll(view.epoch, f"{self._name(suspect.process)}: {suspect.evidence}", now)
        self._joining.on_tick(now)
        for process in self._joining.overdue():
            self.remove([Removal(process, "did not get ready in time", now)], now)
        self._group.on_tick(now)

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
        self.remove(removals, now)

    def _remove_slow(self, now: float) -> None:
        """One at a time, each in a group that has come to rest since the last; never the room for all experts."""
        view = self._group.current
        at_rest = self._group.is_adopted and self._group.prepared is None and self.roll_call is None
        if view is None or not at_rest or len(view.members) <= max(1, self._group.experts.min_ranks):
            self._slow_ranks.restart()
        elif (suspect := self._slow_ranks.look(view, now)) is not None:
            self._slow_ranks.restart()
            self.remove([Removal(suspect.process, suspect.evidence, suspect.since, Fate.END)], now)

    def _silent_joiners(self, now: float) -> list[Suspect]:
        """A process that warms up is no member and may be slow, but not silent for thrice the time."""
        limit_s = 3 * self._config.monitor.heartbeat_timeout_s
        found = []
        for process in self._joining.joiners():
            record = self._table.get(process)
            if record is not None and self._table.silence_s(record, now) > limit_s:
                found.append(Suspect(process, f"no heartbeat for {limit_s:g} s while joining", record.heard_at))
        return found

    # Verdicts.

    def remove(self, removals: list[Removal], now: float) -> None:
        """Puts processes out of the group, or out of the join. One view for all of them."""
        first: dict[ProcessId, Removal] = {}
        for removal in removals:
            first.setdefault(removal.process, removal)
        told = []
        for removal in first.values():
            slot = self._slots.of_process(removal.process)
            if slot is None or slot.state is not SlotState.HELD:
                continue
            told.append(self._record_removal(slot, removal, now))
            if removal.fate is Fate.END:
                self._slots.fence(slot, now, removal.evidence)
                self._fences.put_up(removal.process, now, to_the_end=True)
            elif removal.fate is Fate.FENCE:
                self._slots.fence(slot, now, removal.evidence)
                self._fences.put_up(removal.process, now)
            elif removal.fate is Fate.RELEASE:
                self._slots.fence(slot, now, removal.evidence, released=True)
                self._fences.put_up(removal.process, now, self._config.monitor.adopt_timeout_s)
            elif removal.fate is Fate.MASK:
                self._slots.mask(slot, now, removal.evidence)
            else:
                self._slots.free(slot, now, removal.evidence)
            if self._group.member(removal.process) is None:
                self._joining.to_welcome.append(removal.process)  # no view will tell it that it is out
        if told:
            self._publish_without(set(first), told, now)

    def _record_removal(self, slot: Slot, removal: Removal, now: float) -> dict[str, object]:
        fields = {
            "rank": slot.rank,
            "incarnation": slot.incarnation,
            "process": slot.process,
            "evidence": removal.evidence,
            "since": self._outbox.events.wall(removal.since),
        }
        if record := self._table.get(slot.process):
            slot.last_pid, slot.last_host = record.hello.pid, record.hello.host
        kind = {Fate.MASK: "masked", Fate.RELEASE: "released"}.get(removal.fate, "removed")
        self._outbox.emit(kind, now, epoch=self._group.epoch, **fields)
        return fields

    def _publish_without(self, processes: set[ProcessId], told: list[dict[str, object]], now: float) -> None:
        members = [member for member in self._group.members if member.process not in processes]
        prepared = self._group.prepared
        touched = len(members) < len(self._group.members)
        joins = prepared and prepared.base and any(m.process in processes for m in prepared.view.members)
        # A roll call ends in a new view anyway; one made earlier only because of a newcomer would keep the silent.
        if touched or (joins and self.roll_call is None):
            reason = "; ".join(f"without rank {fields['rank']}: {fields['evidence']}" for fields in told)
            self._publish(members, reason, now, evidence=told)
        elif not joins and prepared and any(process in processes for process in prepared.newcomers):
            self._joining.form_again(now)

    def _publish(self, members: list[Member], reason: str, now: float, **evidence: object) -> None:
        prepared = self._group.prepared
        self.roll_call = None
        view = self._group.publish(members, reason, now, **evidence)
        if prepared is not None:
            self._joining.on_dropped(prepared, view, now)

    def publish_same_members(self, reason: str, now: float) -> None:
        self._publish(list(self._group.members), reason, now)

    # Void rounds and roll calls.

    def _on_void(self, process: ProcessId, incarnation: Incarnation, epoch: Epoch, now: float) -> None:
        """Also of the prepared epoch: who is in it already has left the current one."""
        prepared = self._group.prepared
        if (
            prepared is not None
            and epoch == prepared.view.epoch
            and self._is_member(prepared.view, process, incarnation)
        ):
            if prepared.base is None:
                self._joining.form_again(now)  # nobody to call: the first view has not come into force
                return
        elif not (
            self._group.current
            and epoch == self._group.epoch
            and self._is_member(self._group.current, process, incarnation)
        ):
            return
        if self.roll_call is None:
            self._call_roll(epoch, f"{self._name(process)}: void round", now)

    @staticmethod
    def _is_member(view: View, process: ProcessId, incarnation: Incarnation) -> bool:
        return any(member.process == process and member.incarnation == incarnation for member in view.members)

    def _call_roll(self, epoch: Epoch, cause: str, now: float) -> None:
        members = tuple(member.process for member in self._group.members)
        self.roll_call = RollCallState(epoch, cause, members, now, now)
        self._outbox.emit("roll_call", now, epoch=epoch, cause=cause, ranks=[m.rank for m in self._group.members])
        self._send_roll_call(self.roll_call)

    def _send_roll_call(self, roll_call: RollCallState) -> None:
        for process in roll_call.silent:
            self._outbox.send(process, RollCall(self._monitor, self.term, roll_call.epoch))

    def _on_answer(
        self, process: ProcessId, incarnation: Incarnation, epoch: Epoch, accused: tuple[int, ...], now: float
    ) -> None:
        """Answers tell the epoch that the answerer is in: the current one, or a prepared one that it entered since."""
        roll_call, member = self.roll_call, self._group.member(process)
        if roll_call is None or member is None or member.incarnation != incarnation or epoch < self._group.epoch:
            return
        roll_call.answers[process] = accused
        if roll_call.silent:
            return
        assert self._group.current is not None
        broken = self._broken_paths.on_all_answered(roll_call, self._group.current, self._group.num_rounds, now)
        if broken is not None:
            evidence = "the path to it is broken"
            self.remove([Removal(broken, evidence, roll_call.started_at, Fate.END)], now)
        else:
            self.publish_same_members(f"void round, all answered ({roll_call.cause})", now)

    def _advance_roll_call(self, now: float) -> None:
        roll_call = self.roll_call
        if roll_call is None:
            return
        if self._clock.elapsed(roll_call.started_at, now) > self._config.monitor.roll_call_s:
            evidence = f"no answer to the roll call of epoch {roll_call.epoch}"
            self.remove([Removal(process, evidence, roll_call.started_at) for process in roll_call.silent], now)
        elif now - roll_call.sent_at >= SEND_AGAIN_S:
            roll_call.sent_at = now
            self._send_roll_call(roll_call)

    def _name(self, process: ProcessId) -> str:
        member = self._group.member(process)
        return f"rank {member.rank}" if member else str(process)

    # Commands.

    def distrust(self, process: ProcessId, now: float) -> None:
        """It says itself that its memory must not be trusted: out, and ended. Nobody takes that memory over."""
        self.remove([Removal(process, "its memory is not trusted, by its own word", now, Fate.END)], now)

    def shrink(self, now: float) -> None:
        """Puts out who is too many, or drained, in one view, once others hold their experts. What is masked has left
        already and only gives its number back."""
        leaving: list[Removal] = []
        outside: list[Removal] = []
        for removal in [*self._surplus(now), *self._drained(now)]:
            (leaving if self._group.member(removal.process) else outside).append(removal)
        undone = self._emptying.advance([removal.process for removal in leaving], now)
        if undone is not None:
            outside += [replace(removal, evidence=removal.evidence + undone) for removal in leaving]
        self.remove(outside, now)

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
        self._emptying.drained[self._slots.slots[rank].process] = cause
        self.shrink(now)

    def mask(self, rank: Rank, cause: str, now: float) -> None:
        slot = self._slots.slots[rank]
        self.remove([Removal(slot.process, cause, now, Fate.MASK)], now)

    def unmask(self, rank: Rank, now: float) -> None:
        self._emptying.drained.pop(self._slots.slots[rank].process, None)
        self._joining.unmask(self._slots.slots[rank], now)
