"""Which requests take part in the next round: continuous batching with admission by KV blocks. Pure.

    submit --> WAITING --admit: a place in the batch and all its blocks--> RUNNING --remove--> gone

A request gets the blocks for its whole length when it is admitted, so a running one never has to be pushed out again.
Waiting is first come, first served: a large request at the head is not overtaken, or it would starve.
"""

from collections.abc import Iterator
from typing import Generic

from common.kv_blocks import BlockAllocator, Owner


class BatchScheduler(Generic[Owner]):
    """Running requests take one token each per round, so at most ``max_batch`` of them run."""

    def __init__(self, blocks: BlockAllocator[Owner], max_batch: int, max_waiting: int) -> None:
        self.blocks = blocks
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: dict[Owner, int] = {}  # in order of arrival; number of positions
        self._running: dict[Owner, None] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: Owner, num_positions: int) -> str:
        """Queues ``request``; the text says why not, "" = queued."""
        assert request not in self._waiting and request not in self._running
        if self.blocks.blocks_for(num_positions) > self.blocks.num_blocks:
            return (
                f"needs {num_positions} positions, the KV cache has {self.blocks.num_blocks * self.blocks.block_size}"
            )
        if len(self._waiting) >= self._max_waiting:
            return f"{self._max_waiting} requests wait for KV blocks already"
        self._waiting[request] = num_positions
        return ""

    def admit(self) -> list[tuple[Owner, tuple[int, ...]]]:
        """Requests that run from now on, each with its block table."""
        admitted: list[tuple[Owner, tuple[int, ...]]] = []
        for request, num_positions in list(self._waiting.items()):
            if len(self._running) >= self._max_batch:
                break
            table = self.blocks.allocate(request, num_positions)
            if table is None:
                break
            del self._waiting[request]
            self._running[request] = None
            admitted.append((request, table))
        return admitted

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
