"""A placement on its way into force while the present one serves (PROTOCOL 8).

    nothing --plan taken, or a rank to be emptied--> staging --every member reports it staged--> prepared
    prepared (a view of the same members) --in force--> nothing: moved
    staging, prepared --any other view, or a join, or too late--> nothing: abandoned, nobody has lost anything

Invariants: one at a time; it starts from the placement in force, which every member has reported, so that what only
older placements needed may be overwritten; every expert that has a live copy keeps one; no rank takes in more than it
has memory for. Staging binds nobody; only the prepared view does, and that is as short as a round.
"""

from dataclasses import dataclass

from common.config import ClusterConfig
from common.ids import Epoch, ProcessId
from common.messages import Placement, PlacementPlan, StagePlacement
from common.placement import PhysicalToLogical, num_staging_experts
from common.placement_steps import moves_to
from common.view import ranks
from services.monitor.actions import Outbox
from services.monitor.group import Group
from services.monitor.processes import ProcessTable, reports
from services.monitor.terms import EpochCounter
from services.monitor.ticks import TickClock

_SEND_AGAIN_S = 0.5


@dataclass(slots=True)
class Moving:
    """``yields``: a wish of the planner, which gives way to the emptying of a rank."""

    placement: Placement
    base_epoch: Epoch
    cause: str
    num_moves: int
    yields: bool
    started_at: float
    sent_at: float
    is_prepared: bool = False


class Migration:
    def __init__(
        self,
        monitor: ProcessId,
        config: ClusterConfig,
        counter: EpochCounter,
        table: ProcessTable,
        group: Group,
        outbox: Outbox,
        clock: TickClock,
    ) -> None:
        self._monitor, self._config, self._counter = monitor, config, counter
        self._table, self._group, self._outbox, self._clock = table, group, outbox, clock
        self._last_refused: PlacementPlan | None = None
        self.moving: Moving | None = None
        self.is_closed_to_plans = False  # a rank is being emptied
        self.term = 0
        self.num_moved = self.num_abandoned = self.num_moves = 0

    @property
    def num_staging(self) -> int:
        return num_staging_experts(self._config.decode, self._group.experts.num_logical_experts)

    # Wishes.

    def on_plan(self, plan: PlacementPlan, now: float) -> str:
        """Takes a plan, or returns why not. A plan that is on its way already is only repeated by its sender."""
        if self.moving is not None and plan.physical_to_logical == self.moving.placement.physical_to_logical:
            return ""
        reason = self._refusal(plan)
        if not reason:
            self._start(plan.physical_to_logical, f"plan of {plan.process}", True, now)
        elif plan != self._last_refused:
            self._last_refused = plan
            fields = {"process": plan.process, "base_version": plan.base_version, "reason": reason}
            self._outbox.emit("plan_refused", now, epoch=self._group.epoch, **fields)
        return reason

    def _refusal(self, plan: PlacementPlan) -> str:
        view = self._group.current
        if view is None or not view.members or not self._group.is_adopted or self._group.prepared is not None:
            return "no placement is in force, or a view is on its way"
        if self.is_closed_to_plans:
            return "a rank is being emptied"
        if self.moving is not None:
            return f"placement {self.moving.placement.version} is on its way"
        if plan.base_version != view.placement.version:
            return f"made for placement {plan.base_version}, but {view.placement.version} is in force"
        if fault := self._group.experts.fault_of(plan.physical_to_logical, view):
            return fault
        if plan.physical_to_logical == view.placement.physical_to_logical:
            return "changes nothing"
        moves = moves_to(view.placement.physical_to_logical, plan.physical_to_logical, ranks(view))
        for rank in ranks(view):
            if (count := sum(move.rank == rank for move in moves)) > self.num_staging:
                return f"rank {rank} would load {count} experts, and has memory for {self.num_staging}"
        return ""

    def move(self, wanted: PhysicalToLogical, cause: str, now: float) -> bool:
        """The monitor's own wish: a step towards an empty rank. False while it has to wait."""
        view = self._group.current
        if view is None or not self._group.is_adopted or self._group.prepared is not None:
            return False
        if self.moving is not None:
            if not self.moving.yields:
                return False
            self._abandon(cause, now)
        self._start(wanted, cause, False, now)
        return True

    def _start(self, wanted: PhysicalToLogical, cause: str, yields: bool, now: float) -> None:
        view = self._group.current
        assert view is not None
        num_moves = len(moves_to(view.placement.physical_to_logical, wanted, ranks(view)))
        placement = Placement(self._counter.take(), wanted)
        self.moving = Moving(placement, view.epoch, cause, num_moves, yields, now, now)
        fields = {"version": placement.version, "base_version": view.placement.version, "num_moves": num_moves}
        self._outbox.emit("migration", now, epoch=view.epoch, status="staging", cause=cause, **fields)
        self._send(self.moving)

    # Its way.

    def advance(self, now: float) -> None:
        """After every event, and after joins had their turn: those come first."""
        moving, view, prepared = self.moving, self._group.current, self._group.prepared
        if moving is None or view is None:
            return
        if view.placement.version == moving.placement.version:
            self._end(moving, now)
        elif view.epoch != moving.base_epoch:
            self._abandon(f"view {view.epoch}: {view.reason}", now)
        elif prepared is None and not moving.is_prepared:
            if not self._not_staged(moving):
                moving.is_prepared = True
                self._group.prepare_placement(moving.placement, now)
        elif prepared is None or prepared.view.placement.version != moving.placement.version:
            self._abandon("ranks join", now)

    def on_tick(self, now: float) -> str:
        """Repeats what may have been lost. Returns why the prepared view has to be dropped, if it has to be."""
        moving = self.moving
        if moving is None:
            return ""
        elapsed_s = self._clock.elapsed(moving.started_at, now)
        if moving.is_prepared:
            # Ready was said by some, which binds: only a view with a higher number takes it back.
            late = elapsed_s > self._config.planner.stage_timeout_s + self._config.monitor.prepare_timeout_s
            return "a migration was not entered in time" if late else ""
        if elapsed_s > self._config.planner.stage_timeout_s:
            self._abandon(f"not staged in time by {', '.join(self._not_staged(moving))}", now)
        elif now - moving.sent_at >= _SEND_AGAIN_S:
            moving.sent_at = now
            self._send(moving)
        return ""

    def _not_staged(self, moving: Moving) -> list[str]:
        missing = []
        for member in self._group.members:
            record = self._table.get(member.process)
            if (
                record is None
                or reports(record, member.incarnation) != moving.base_epoch
                or record.beat.staged_placement != moving.placement.version
            ):
                missing.append(f"rank {member.rank}")
        return missing

    def _send(self, moving: Moving) -> None:
        message = StagePlacement(self._monitor, self.term, moving.base_epoch, moving.placement)
        self._group.send_to_members(message)

    def _end(self, moving: Moving, now: float) -> None:
        self.moving = None
        self.num_moved += 1
        self.num_moves += moving.num_moves
        self._tell(moving, "in force", now, took_s=round(now - moving.started_at, 3))

    def _abandon(self, reason: str, now: float) -> None:
        moving, self.moving = self.moving, None
        if moving is not None:
            self.num_abandoned += 1
            self._tell(moving, "abandoned", now, reason=reason)

    def _tell(self, moving: Moving, status: str, now: float, **fields: object) -> None:
        fields = {"version": moving.placement.version, "num_moves": moving.num_moves, **fields}
        self._outbox.emit("migration", now, epoch=self._group.epoch, status=status, cause=moving.cause, **fields)
