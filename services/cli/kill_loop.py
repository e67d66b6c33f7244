"""Kills the decode rank with most to do, again and again, each time with proof."""

import asyncio
import time
from collections.abc import Callable

from common.fault_answers import proof_of
from common.monitor_address import MonitorAddress
from services.cli.cluster_state import fetch_cluster
from services.cli.fault import FaultClient, fault_event

_MIN_SURVIVORS = 2  # with one rank there may be no room for all experts, and nothing would go on


class KillLoop:
    """``num_killed`` counts kills with proof; what could not be proven is in ``failures``."""

    def __init__(self, url: str, address: MonitorAddress, every_s: float) -> None:
        self._url, self._address, self._every_s = url, address, every_s
        self.num_killed = 0
        self.failures: list[str] = []

    async def run(self, is_over: Callable[[], bool]) -> None:
        """A kill every ``every_s``, later when too few ranks serve; returns soon after ``is_over``."""
        next_at = time.monotonic() + self._every_s
        with FaultClient(self._address) as bus:
            while not is_over():
                await asyncio.sleep(0.05)
                now = time.monotonic()
                if now >= next_at and await self._kill(bus):
                    next_at = now + self._every_s

    async def _kill(self, bus: FaultClient) -> bool:
        """False when there was nobody to kill yet."""
        cluster = await asyncio.to_thread(fetch_cluster, self._url)
        serving = [rank for rank in cluster["ranks"] if rank["state"] == "serving"]
        if len(serving) <= _MIN_SURVIVORS:
            return False
        victim = max(serving, key=lambda rank: int(rank["running"]))
        answer = await asyncio.to_thread(bus.inject, fault_event("kill", int(victim["rank"]), None))
        if answer["status"] == "done":
            self.num_killed += 1
        else:
            self.failures.append(f"kill of rank {victim['rank']}: {proof_of(answer)}")
        return True
