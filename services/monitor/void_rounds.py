"""What follows a void round: the roll call of its epoch, and the view that ends it (PROTOCOL 3.1, 3.2).

    void round of the current or prepared epoch --> roll call --all answered--> new view, same members
                                                              --silent-------> new view without them

Invariant: every void of the current epoch ends in a new view.
"""

from common.config import MonitorConfig
from common.ids import Epoch, Incarnation, ProcessId
from common.messages import RollCall, View
from services.monitor.actions import Outbox
from services.monitor.group import Group
from services.monitor.joining import Joining
from services.monitor.removals import Fate, Removal, Removals
from services.monitor.roll_call import SEND_AGAIN_S, BrokenPaths, RollCallState
from services.monitor.terms import EpochCounter
from services.monitor.ticks import TickClock


class VoidRounds:
    def __init__(
        self,
        monitor: ProcessId,
        config: MonitorConfig,
        counter: EpochCounter,
        group: Group,
        joining: Joining,
        removals: Removals,
        outbox: Outbox,
        clock: TickClock,
    ) -> None:
        self._monitor, self._config, self._counter, self._group = monitor, config, counter, group
        self._joining, self._removals, self._outbox, self._clock = joining, removals, outbox, clock
        self._broken_paths = BrokenPaths()

    @property
    def is_calling(self) -> bool:
        return self._removals.roll_call is not None

    def on_void(self, process: ProcessId, incarnation: Incarnation, epoch: Epoch, now: float) -> None:
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
        if not self.is_calling:
            self.call_roll(epoch, process, "void round", now)

    @staticmethod
    def _is_member(view: View, process: ProcessId, incarnation: Incarnation) -> bool:
        return any(member.process == process and member.incarnation == incarnation for member in view.members)

    def call_roll(self, epoch: Epoch, process: ProcessId, evidence: str, now: float) -> None:
        """Asks every member of the current view; ``evidence`` is what ``process`` showed."""
        member = self._group.member(process)
        cause = f"{f'rank {member.rank}' if member else process}: {evidence}"
        members = tuple(member.process for member in self._group.members)
        self._removals.roll_call = RollCallState(epoch, cause, members, now, now)
        self._outbox.emit("roll_call", now, epoch=epoch, cause=cause, ranks=[m.rank for m in self._group.members])
        self._send_roll_call(self._removals.roll_call)

    def _send_roll_call(self, roll_call: RollCallState) -> None:
        for process in roll_call.silent:
            self._outbox.send(process, RollCall(self._monitor, self._counter.term, roll_call.epoch))

    def on_answer(
        self, process: ProcessId, incarnation: Incarnation, epoch: Epoch, accused: tuple[int, ...], now: float
    ) -> None:
        """Answers tell the epoch that the answerer is in: the current one, or a prepared one that it entered since."""
        roll_call, member = self._removals.roll_call, self._group.member(process)
        if roll_call is None or member is None or member.incarnation != incarnation or epoch < self._group.epoch:
            return
        roll_call.answers[process] = accused
        if roll_call.silent:
            return
        assert self._group.current is not None
        broken = self._broken_paths.on_all_answered(roll_call, self._group.current, self._group.num_rounds, now)
        if broken is not None:
            evidence = "the path to it is broken"
            self._removals.remove([Removal(broken, evidence, roll_call.started_at, Fate.END)], now)
        else:
            self._removals.publish_same_members(f"void round, all answered ({roll_call.cause})", now)

    def advance(self, now: float) -> None:
        roll_call = self._removals.roll_call
        if roll_call is None:
            return
        if self._clock.elapsed(roll_call.started_at, now) > self._config.roll_call_s:
            evidence = f"no answer to the roll call of epoch {roll_call.epoch}"
            silent = [Removal(process, evidence, roll_call.started_at) for process in roll_call.silent]
            self._removals.remove(silent, now)
        elif now - roll_call.sent_at >= SEND_AGAIN_S:
            roll_call.sent_at = now
            self._send_roll_call(roll_call)
