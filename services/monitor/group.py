"""The views of the group: the one in force or published, and the one that is prepared.

    (no view) --formation: prepared, base epoch 0--> in force
    published --every member reports its epoch--> adopted --joiners--> prepared --all report--> in force (adopted)
                                                             prepared --any publication--> dropped

Invariants: epochs only rise, a number is used once; at most one view is prepared; a publication drops it; a join starts
only when the current view is adopted, so that it grows from an epoch in which everybody is.

Whether to publish, and without whom, is decided in `services.monitor.membership` and `removals`.
"""

from collections.abc import Iterable

from common.config import MonitorConfig
from common.ids import Epoch, ProcessId
from common.messages import Directory, Member, Message, Placement, View
from common.view import member_of, newcomers, ranks
from services.monitor.actions import Outbox
from services.monitor.expert_map import ExpertMap
from services.monitor.failure_detector import FailureDetector
from services.monitor.prepared_view import PreparedView
from services.monitor.processes import ProcessTable, reports
from services.monitor.terms import EpochCounter

_SEND_AGAIN_S = 0.5


class Group:
    def __init__(
        self,
        monitor: ProcessId,
        config: MonitorConfig,
        counter: EpochCounter,
        experts: ExpertMap,
        table: ProcessTable,
        detector: FailureDetector,
        outbox: Outbox,
    ) -> None:
        self._monitor, self._config, self._counter, self.experts = monitor, config, counter, experts
        self._table, self._detector, self._outbox = table, detector, outbox
        self.current: View | None = None
        self.prepared: PreparedView | None = None
        self.published_at = 0.0
        self.is_adopted = True
        self.placement: Placement | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        return self.current.members if self.current else ()

    @property
    def epoch(self) -> Epoch:
        return self.current.epoch if self.current else Epoch(0)

    @property
    def num_rounds(self) -> int:
        """That the group has made, as its members last reported; a round number to delay a fault event to."""
        records = [self._table.get(member.process) for member in self.members]
        return max((record.beat.counters.get("group_rounds", 0) for record in records if record), default=0)

    def member(self, process: ProcessId) -> Member | None:
        return member_of(self.current, process) if self.current else None

    def recover(self, view: View) -> None:
        """After a take-over: the group as its members report it. A fresh view follows at once."""
        self.current, self.placement = view, view.placement

    def publish(self, members: Iterable[Member], reason: str, now: float, **evidence: object) -> View:
        """Puts the view of ``members`` in the place of the current one, and of a prepared one."""
        view = self._make_view(self._counter.take(), tuple(members), reason)
        self.current, self.prepared, self.published_at = view, None, now
        self.placement = view.placement
        self.is_adopted = not view.members
        self._detector.restart()
        self.tell_everybody(view)
        self._record(view, now, **evidence)
        return view

    def prepare(self, joiners: Iterable[Member], now: float) -> None:
        """Starts the join of ``joiners``, or the formation of the group where it has no members."""
        members = tuple(sorted((*self.members, *joiners), key=lambda member: member.rank))
        base = self.current if self.members else None
        reason = "joined" if base else "formed"
        view = self._make_view(self._counter.take(), members, reason)
        self._prepare(view, base, now)

    def prepare_placement(self, placement: Placement, now: float) -> None:
        """The same members under another placement, whose experts they all hold."""
        view = self._make_view(self._counter.take(), self.members, "experts moved", placement)
        self._prepare(view, self.current, now)

    def on_report(self, process: ProcessId, now: float) -> View | None:
        """A heartbeat has come. Returns the prepared view when this puts it in force."""
        prepared, record = self.prepared, self._table.get(process)
        if prepared is None or record is None:
            return None
        member = member_of(prepared.view, process)
        if member is None or reports(record, member.incarnation) != prepared.view.epoch:
            return None
        prepared.entered.add(process)
        if not prepared.is_in_force:
            return None
        self.current, self.prepared, self.is_adopted = prepared.view, None, True
        self.placement, self.published_at = prepared.view.placement, now
        self._detector.restart()
        self.tell_everybody(prepared.view)
        self._record(prepared.view, now)
        for newcomer in newcomers(prepared.view, prepared.base):
            fields = {"rank": newcomer.rank, "incarnation": newcomer.incarnation, "process": newcomer.process}
            self._outbox.emit("joined", now, epoch=prepared.view.epoch, **fields)
        return prepared.view

    def check_adopted(self) -> bool:
        """True once: when the last member has reported the epoch of the published view."""
        if self.is_adopted or self.current is None:
            return False
        view = self.current
        self.is_adopted = all(self._detector.has_adopted(member, view) for member in view.members)
        return self.is_adopted

    def on_tick(self, now: float) -> None:
        """Repeats what may have been lost."""
        prepared = self.prepared
        if prepared is not None and now - prepared.sent_at >= _SEND_AGAIN_S:
            prepared.sent_at = now
            self._send_prepare(prepared)

    def tell(self, process: ProcessId, directory: Directory) -> None:
        """All that this process may have missed."""
        if self.current is not None:
            self._outbox.send(process, self.current)
        if self.prepared is not None and process in self.prepared.waiting:
            self._outbox.send(process, self.prepared.message)
        self._outbox.send(process, directory)

    def tell_everybody(self, message: View | Directory) -> None:
        """Members first: streams stand still until they know."""
        inside = [member.process for member in self.members if self._table.get(member.process)]
        outside = [record.id for record in self._table.all() if record.id not in inside]
        for process in [*inside, *outside]:
            self._outbox.send(process, message)
        self._outbox.publish(message)

    def send_to_members(self, message: Message) -> None:
        for member in self.members:
            self._outbox.send(member.process, message)

    def _prepare(self, view: View, base: View | None, now: float) -> None:
        self.prepared = PreparedView(view, base, now, now)
        self._send_prepare(self.prepared)

    def _send_prepare(self, prepared: PreparedView) -> None:
        for process in prepared.waiting:
            self._outbox.send(process, prepared.message)

    def _make_view(
        self, epoch: Epoch, members: tuple[Member, ...], reason: str, placement: Placement | None = None
    ) -> View:
        placement = placement or self.placement or self.experts.first(epoch)
        present = tuple(member.rank for member in members)
        repaired, _, _ = self.experts.repaired(placement, present, epoch)
        return View(self._monitor, self._counter.term, epoch, members, repaired, reason)

    def _record(self, view: View, now: float, **evidence: object) -> None:
        _, _, num_orphans = self.experts.repaired(view.placement, ranks(view), view.epoch)
        fields = {"epoch": view.epoch, "ranks": list(ranks(view)), "reason": view.reason, **evidence}
        self._outbox.emit("view", now, **fields, placement_version=view.placement.version)
        if view.members and num_orphans:
            self._outbox.emit(
                "degraded",
                now,
                epoch=view.epoch,
                num_orphans=num_orphans,
                text="experts without a live copy: requests wait until a rank comes back",
            )
