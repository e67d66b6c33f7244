"""What ``GET /cluster`` says under ``placement``: how even it is, what moves, how much a loss would cost."""

from typing import Any

from common.messages import View
from common.placement import EMPTY
from common.view import orphans, ranks
from services.monitor.expert_load import ExpertBalance
from services.monitor.group import Group
from services.monitor.migration import Migration
from services.monitor.processes import ProcessTable

# Counted by the ranks, each since it got its slot.
_COPY_COUNTERS = ("experts_copied", "experts_from_checkpoint", "bad_expert_copies", "expert_bytes_copied")


class PlacementStatus:
    def __init__(self, group: Group, table: ProcessTable, load: ExpertBalance, migration: Migration) -> None:
        self._group, self._table, self._load, self._migration = group, table, load, migration

    def body(self) -> dict[str, Any]:
        view, migration, moving = self._group.current, self._migration, self._migration.moving
        beats = [record.beat for member in self._group.members if (record := self._table.get(member.process))]
        planners = [record.beat.counters for record in self._table.of_kind("planner")]
        figures: dict[str, Any] = {
            "version": view.placement.version if view else 0,
            "staged_version": moving.placement.version if moving else 0,
            "staged_ranks": [b.rank for b in beats if moving and b.staged_placement == moving.placement.version],
            "cause": moving.cause if moving else "",
            "migrations": {"in_force": migration.num_moved, "abandoned": migration.num_abandoned},
            "moved_experts": migration.num_moves,
            **{name: sum(beat.counters.get(name, 0) for beat in beats) for name in _COPY_COUNTERS},
            "plans": max((counters.get("plans", 0) for counters in planners), default=0),
            "plan_s": max((counters.get("plan_us", 0) for counters in planners), default=0) / 1e6,
            "balancedness": 1.0,
            "foretold_balancedness": 1.0,
            "served_entries": 0,
            "layers": [],
        }
        if view is not None and view.members:
            figures |= self._of_view(view)
        return figures

    def _of_view(self, view: View) -> dict[str, Any]:
        num_experts = self._group.experts.num_logical_experts
        return {
            **self._load.figures(view),
            "orphans": len(orphans(view.placement, ranks(view), num_experts)),
            "experts": num_experts * len(view.placement.physical_to_logical),
            "covered_experts": _num_covered(view),
        }


def _num_covered(view: View) -> int:
    """(layer, expert) pairs with copies in two fault domains: hosts where there are several, else ranks."""
    host_of: dict[int, str] = {member.rank: member.host for member in view.members}
    has_hosts = len(set(host_of.values())) > 1
    num_covered = 0
    for rows in view.placement.physical_to_logical:
        domains: dict[int, set[object]] = {}
        for rank, host in host_of.items():
            for expert in rows[rank]:
                if expert != EMPTY:
                    domains.setdefault(expert, set()).add(host if has_hosts else rank)
        num_covered += sum(len(found) > 1 for found in domains.values())
    return num_covered
