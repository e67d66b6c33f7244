"""The body of ``GET /cluster``."""

import json
from typing import Any

from common.messages import Worker
from services.monitor.directory import DirectoryKeeper
from services.monitor.event_log import EventLog
from services.monitor.group import Group
from services.monitor.placement_status import PlacementStatus
from services.monitor.processes import Process, ProcessTable
from services.monitor.sizing import Sizing
from services.monitor.slots import Slot, SlotState, SlotTable
from services.monitor.strangers import Strangers

_RANK_COUNTERS = (
    "running",
    "waiting",
    "rounds",
    "void_rounds",
    "tokens_committed",
    "prompt_tokens_computed",
    "preempted",
)
_PREFILL_COUNTERS = ("prompt_tokens_computed", "prefix_hits", "prefix_tokens_saved", "prefix_bytes")


class ClusterStatus:
    """``bus``: the addresses where to publish and to subscribe."""

    def __init__(
        self,
        sizing: Sizing,
        myself: Worker,
        bus: dict[str, str],
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        directory: DirectoryKeeper,
        placement: PlacementStatus,
        events: EventLog,
        strangers: Strangers,
    ) -> None:
        self._sizing, self._myself, self._bus = sizing, myself, bus
        self._table, self._slots, self._group = table, slots, group
        self._directory, self._placement, self._events, self._strangers = directory, placement, events, strangers

    def body(self, phase: str, term: int, now: float) -> str:
        status = {
            "phase": phase,
            "term": term,
            "epoch": self._group.epoch,
            "desired_ranks": self._sizing.num_ranks,
            "desired_prefill": self._sizing.wanted["prefill"],
            "prepared": self._group.prepared.view.epoch if self._group.prepared else None,
            "ranks": [self._rank(slot) for slot in self._slots.slots if self._is_shown(slot)],
            "prefill": [self._worker(p, _PREFILL_COUNTERS) for p in self._live("prefill", now)],
            "services": self._services(now),
            "bus": self._bus,
            "placement": self._placement.body(),
            "strangers_refused": self._strangers.num_refused,
            "events": self._events.kept(),
        }
        return json.dumps(status)

    def _live(self, kind: str, now: float) -> list[Process]:
        found = [process for process in self._table.of_kind(kind) if self._table.is_live(process, now)]
        return sorted(found, key=lambda process: process.hello.name)

    def _services(self, now: float) -> list[dict[str, Any]]:
        myself = {"name": self._myself.name, "kind": "monitor", "pid": self._myself.pid, "state": "up"}
        others = [p for kind in ("router", "planner", "agent") for p in self._live(kind, now)]
        standbys = [p for p in self._live("decode", now) if self._slots.of_process(p.id) is None]
        return [myself, *(self._worker(process, ()) for process in (*others, *standbys))]

    def _worker(self, process: Process, counters: tuple[str, ...]) -> dict[str, Any]:
        hello = process.hello
        state = self._directory.state_of(process.id) if hello.kind == "decode" else process.beat.state
        values = {**dict.fromkeys(counters, 0), **process.beat.counters}
        head = {"name": hello.name, "kind": hello.kind, "pid": hello.pid, "host": hello.host, "state": state}
        return {**values, **head, "endpoint": hello.endpoint, "process": process.id, "epoch": process.beat.epoch}

    def _is_shown(self, slot: Slot) -> bool:
        """A vacant slot is a dead rank until the group has its size again."""
        if slot.state is not SlotState.FREE:
            return True
        return bool(slot.last_incarnation) and self._slots.num_taken < self._sizing.num_ranks

    def _rank(self, slot: Slot) -> dict[str, Any]:
        process = self._table.get(slot.process) if slot.process else None
        counters: dict[str, int] = dict.fromkeys(_RANK_COUNTERS, 0)
        if process is not None and slot.state in (SlotState.HELD, SlotState.MASKED):
            counters |= process.beat.counters
        return {
            **counters,
            "rank": slot.rank,
            "state": self._state(slot, process),
            "incarnation": slot.last_incarnation,
            "process": slot.process,
            "name": process.hello.name if process else "",
            "pid": process.hello.pid if process else slot.last_pid,
            "host": process.hello.host if process else slot.last_host,
            "heap": slot.heap,
            "epoch": process.beat.epoch if process else 0,
            "kv_used": counters.get("kv_blocks_used", 0),
        }

    def _state(self, slot: Slot, process: Process | None) -> str:
        """joining | serving | draining | masked | dead"""
        if slot.state is SlotState.MASKED:
            return "masked"
        if slot.state is not SlotState.HELD:
            return "draining" if slot.state is SlotState.FENCING and slot.released else "dead"
        if self._group.member(slot.process) is None:
            return "joining"
        return "draining" if process is not None and process.beat.state == "draining" else "serving"
