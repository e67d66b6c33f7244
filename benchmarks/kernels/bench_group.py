"""The ranks of one measurement, as their parent sees them: forms groups and views.

``show`` prints one fact as a line of JSON.
"""

import json
from typing import Any

from benchmarks.kernels.rank_pool import RankProcess, call_all

SHAPES = {
    "h7168 e256 k8": ({"max_tokens": 128, "top_k": 8, "hidden_size": 7168}, 256),
    "h2048 e64 k6": ({"max_tokens": 128, "top_k": 6, "hidden_size": 2048}, 64),
}
LARGE = next(iter(SHAPES))


def show(title: str, **facts: Any) -> None:
    print(title, json.dumps(facts), flush=True)


class BenchGroup:
    """``provider``: vmm, whose descriptors the holder at ``holder`` keeps, or nvshmem."""

    def __init__(self, provider: str, holder: str, num_ranks: int, num_devices: int) -> None:
        self.provider, self.holder = provider, holder
        self.num_ranks, self.num_devices = num_ranks, num_devices
        self.ranks = [self.spawn(rank) for rank in range(num_ranks)]
        self.num_made = 0
        self.epoch = 0
        unique_id = self.ranks[0].call("new_unique_id") if provider == "nvshmem" else ""
        for rank, process in enumerate(self.ranks):
            process.start("open_provider", **self.memory(unique_id, rank))
        for process in self.ranks:
            process.finish()

    def spawn(self, rank: int) -> RankProcess:
        return RankProcess(rank % self.num_devices)

    def memory(self, unique_id: str, rank: int) -> dict[str, Any]:
        return {
            "kind": self.provider,
            "holder": self.holder,
            "unique_id": unique_id,
            "rank": rank,
            "num_ranks": self.num_ranks,
        }

    def settings(self, shape: str, rank: int, variants: list[str], attach: bool = False) -> dict[str, Any]:
        sizes, num_experts = SHAPES[shape]
        return {
            "shape": {"max_ranks": self.num_ranks, **sizes},
            "rank": rank,
            "num_ranks": self.num_ranks,
            "num_experts": num_experts,
            "name": f"heap{self.num_made}",
            "variants": variants,
            "attach": attach,
        }

    def form(self, shape: str, variants: list[str]) -> None:
        """New heaps and groups of all ranks, in the next epoch, past the first header."""
        self.num_made += 1
        for rank, process in enumerate(self.ranks):
            process.start("make", **self.settings(shape, rank, variants))
        self.descriptors = [process.finish() for process in self.ranks]
        for rank, process in enumerate(self.ranks):
            for peer in range(self.num_ranks):
                if peer != rank:
                    process.call("map_rank", rank=peer, descriptors=self.descriptors[peer])
        self.enter(list(range(self.num_ranks)))

    def enter(self, members: list[int]) -> None:
        self.epoch += 1
        chosen = [self.ranks[member] for member in members]
        call_all(chosen, "adopt", epoch=self.epoch, members=members)
        wanted = [[100 * r, 100 * r + 1] if r in members else [0, 0] for r in range(self.num_ranks)]
        for header in call_all(chosen, "allgather"):
            if any(header[i : i + self.num_ranks] != wanted for i in range(0, len(header), self.num_ranks)):
                raise RuntimeError(f"wrong headers {header}")

    def replace(self, slot: int, standby: RankProcess, shape: str, variants: list[str]) -> None:
        """``standby`` takes the place of a dead rank: with its memory (vmm), or with its own."""
        survivors = [rank for rank in range(self.num_ranks) if rank != slot]
        for rank in survivors:
            self.ranks[rank].call("drop_mapping", rank=slot)
        attach = self.provider == "vmm"
        self.descriptors[slot] = standby.call("make", **self.settings(shape, slot, variants, attach))
        self.ranks[slot] = standby
        for rank in survivors:
            standby.call("map_rank", rank=rank, descriptors=self.descriptors[rank])
            self.ranks[rank].call("map_rank", rank=slot, descriptors=self.descriptors[slot])

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
