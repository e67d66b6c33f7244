"""Carries faults out against a live cluster, proves them, and undoes what does not end by itself."""

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from common.fault_answers import proof_of
from common.process_table import processes_of, state_of
from services.cli.fault import FaultClient, fault_event, scale_event
from services.cli.run_directory import monitor_address
from tests.chaos.schedule import SIGNALS, UNDONE_BY, Fault
from tests.chaos.witness import Witness
from tests.cluster.harness import Cluster

_PROOF_S, _ANSWER_S = 5.0, 30.0
_SPARED = ("router", "cli")  # streams live in the router, which has faults of its own; `regrow up` is the operator


@dataclass
class Injector:
    """``size``: what the cluster is scaled back to."""

    cluster: Cluster
    size: tuple[int, int]
    witness: Witness = field(default_factory=Witness)
    num_done: dict[str, int] = field(default_factory=dict)
    num_refused: int = 0
    router_kills: list[float] = field(default_factory=list)  # when
    _masked: set[int] = field(default_factory=set)

    async def inject(self, fault: Fault) -> None:
        if fault.action in SIGNALS:
            await self._signal(fault)
        else:
            await self._event(fault)

    def _tell(self, text: str) -> None:
        self.witness.tell(text)

    def _count(self, fault: Fault) -> None:
        name = f"{fault.action} {fault.kind}"
        self.num_done[name] = self.num_done.get(name, 0) + 1

    # Signals.

    def _pids(self, fault: Fault) -> list[int]:
        found = [
            p for p in processes_of(self.cluster.run_dir.resolve()) if p.kind not in _SPARED or p.kind == fault.kind
        ]
        if fault.kind == "everything":
            return [process.pid for process in found]
        kind = fault.kind.removeprefix("all ")
        pids = [process.pid for process in found if process.kind == kind]
        return pids if kind != fault.kind or not pids else [pids[int(fault.pick * len(pids))]]

    async def _signal(self, fault: Fault) -> None:
        pids, wanted = self._pids(fault), "" if fault.action == "kill" else "T"
        number = signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP
        if (fault.action, fault.kind) == ("kill", "router"):
            self.router_kills.append(self.witness.now_s)
        for pid in pids:
            _send(pid, number)
        await self._prove(fault, pids, wanted)
        if not pids:
            return
        self._tell(f"{fault}: pids {pids}")
        self._count(fault)
        if fault.action == "stop":
            await asyncio.sleep(fault.hold_s)
            for pid in pids:
                _send(pid, signal.SIGCONT)

    async def _prove(self, fault: Fault, pids: list[int], wanted: str) -> None:
        deadline = time.monotonic() + _PROOF_S
        while late := [pid for pid in pids if state_of(pid) not in (wanted, "Z", "X", "")]:
            assert time.monotonic() < deadline, f"{fault} did not take effect on {late}"
            await asyncio.sleep(0.005)

    # Events.

    async def _event(self, fault: Fault) -> None:
        """Refused is no failure: beside another fault there may be no such rank, or no room without it."""
        rank = None if fault.action in ("scale", "restart") else int(fault.pick * self.size[0])
        answer = await self._ask(await self._as_event(fault, rank))
        self._tell(f"{fault}{'' if rank is None else f', rank {rank}'}: {answer['status']}: {proof_of(answer)}")
        if answer["status"] == "done":
            self._count(fault)
        else:
            self.num_refused += 1
        if rank is not None and fault.action in ("mask", "drain"):
            self._masked.add(rank)
        await asyncio.sleep(fault.hold_s)
        if fault.action in UNDONE_BY:
            await self._undo(UNDONE_BY[fault.action], rank)

    async def _as_event(self, fault: Fault, rank: int | None) -> dict[str, object]:
        detail = dict(fault.detail)
        if fault.action == "kill in a round":
            status = await self.cluster.wait_status(lambda _: True)
            rounds = max((int(entry.get("group_rounds", 0)) for entry in status["ranks"]), default=0)
            ahead = detail["rounds_ahead"]
            assert isinstance(ahead, int)
            return fault_event("kill", rank, None, at_round=rounds + ahead)
        if fault.action == "restart":
            status = await self.cluster.wait_status(lambda _: True)
            names = sorted(entry["name"] for entry in status["services"] if entry["kind"] == "router")
            return fault_event("restart", None, names[int(fault.pick * len(names))])
        return fault_event(fault.action, rank, None, **detail)

    async def _undo(self, action: str, rank: int | None) -> None:
        match action:
            case "scale":
                event = scale_event(*self.size)
            case "slow":
                event = fault_event(action, rank, None, factor=1.0)
            case _:
                event = fault_event(action, rank, None)
        answer = await self._ask(event)
        self._tell(f"{action}{'' if rank is None else f' rank {rank}'} again: {answer['status']}: {proof_of(answer)}")
        if answer["status"] != "failed" and rank is not None and action != "slow":
            self._masked.discard(rank)

    async def _ask(self, event: dict[str, object]) -> dict[str, Any]:
        """An answer is due even when the monitor has just been killed: the client repeats the event to the next one."""
        with FaultClient(monitor_address(self.cluster.run_dir)) as client:
            try:
                return await asyncio.to_thread(client.inject, event, _ANSWER_S)
            except TimeoutError as error:
                return {"status": "failed", "error": str(error)}

    async def undo_all(self) -> None:
        """Ranks still masked, and the size: an undoing may itself have met a fault."""
        for rank in sorted(self._masked):
            await self._undo("unmask", rank)
        await self._undo("scale", None)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
