"""Which requests take part in the next round: continuous batching with admission by KV blocks. Pure.

    submit --> WAITING --admit: a place in the batch and blocks--> RUNNING --remove--> gone

A request is admitted with blocks for what it has and for a few tokens more, and grows while it runs. When blocks run
out, the youngest running request has to go (`victim`). One with ``reserves_all`` gets the blocks for its whole length
when it is admitted, and is no victim: a request that was pushed out once comes back like this. So nobody is pushed out
twice, and whoever is oldest, or has all its blocks, goes on to its end.

Waiting is first come, first served: a large request at the head is not overtaken, or it would starve.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

from common.kv_blocks import BlockAllocator, Owner


@dataclass(frozen=True, slots=True)
class Room:
    """Positions: those that a request needs to start, and those that it may come to need."""

    num_positions: int
    most_positions: int
    reserves_all: bool = False

    @property
    def at_start(self) -> int:
        return self.most_positions if self.reserves_all else min(self.num_positions, self.most_positions)


class BatchScheduler(Generic[Owner]):
    """Running requests take one token each per round, so at most ``max_batch`` of them run."""

    def __init__(self, blocks: BlockAllocator[Owner], max_batch: int, max_waiting: int) -> None:
        self.blocks = blocks
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: dict[Owner, Room] = {}  # in order of arrival
        self._running: dict[Owner, Room] = {}  # in order of admission

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: Owner, room: Room) -> str:
        """Queues ``request``; the text says why not, "" = queued."""
        assert request not in self._waiting and request not in self._running
        if self.blocks.blocks_for(room.most_positions) > self.blocks.num_blocks:
            num_positions = self.blocks.num_blocks * self.blocks.block_size
            return f"needs {room.most_positions} positions, the KV cache has {num_positions}"
        if len(self._waiting) >= self._max_waiting:
            return f"{self._max_waiting} requests wait for KV blocks already"
        self._waiting[request] = room
        return ""

    def admit(self) -> list[tuple[Owner, tuple[int, ...]]]:
        """Requests that run from now on, each with its block table."""
        admitted: list[tuple[Owner, tuple[int, ...]]] = []
        for request, room in list(self._waiting.items()):
            if len(self._running) >= self._max_batch:
                break
            table = self.blocks.allocate(request, room.at_start)
            if table is None:
                break
            del self._waiting[request]
            self._running[request] = room
            admitted.append((request, table))
        return admitted

    def grow(self, request: Owner, num_positions: int) -> bool:
        """Whether the running request has blocks for so many positions now."""
        assert request in self._running and num_positions <= self._running[request].most_positions
        return self.blocks.grow(request, num_positions)

    def victim(self) -> Owner:
        """The running request to be given up for want of blocks. There is one when `grow` has failed: one that cannot
        grow has not got all its blocks."""
        return next(request for request, room in reversed(self._running.items()) if not room.reserves_all)

    def remove(self, request: Owner) -> None:
        """Finished or aborted; no error when it is neither waiting nor running."""
        self._waiting.pop(request, None)
        self._running.pop(request, None)
        self.blocks.free(request)

    def batch(self) -> Iterator[tuple[Owner, tuple[int, ...]]]:
        """Running requests in order of admission, with their block tables."""
        return ((request, self.blocks.table(request)) for request in self._running)

    def clear(self) -> None:
        for request in [*self._waiting, *self._running]:
            self.remove(request)

    def check_invariants(self) -> None:
        self.blocks.check_invariants()
        assert not self._waiting.keys() & self._running.keys()
        owned = sum(len(self.blocks.table(request)) for request in self._running)
        assert owned == self.blocks.num_used, "blocks belong to a request that does not run"
