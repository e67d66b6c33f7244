"""One rank of the measurements: its memory, its groups, its tokens.

A variant is a build of the operations (VARIANTS). There are two groups of each, over heaps of their own: one operation
can be repeated only if two groups take turns, since buffers are single.

Legend: W ranks, M max_tokens, T tokens, K top_k, H hidden_size, G groups of 128.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.device_group import DeviceGroup
from kernels.elastic_mode import ElasticMode
from kernels.heap_layout import EpShape, HeapLayout
from kernels.launch_plan import LaunchPlan, LaunchPlanner
from kernels.symmetric_memory.base import HeapProvider, PeerHeap

VARIANTS = {
    "views": (ElasticMode.VIEWS, None),
    "bare": (ElasticMode.BARE, None),
    "alone": (ElasticMode.ALONE, None),
    "fp8": (ElasticMode.VIEWS, torch.float8_e4m3fn),
}
NUM_TURNS = 2
SYMMETRIC_BYTES = 2 << 30
Descriptors = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class FixedPlan(LaunchPlanner):
    """One plan for every size."""

    hidden_size: int
    num_resident: int
    overlap: bool
    plan: LaunchPlan

    def dispatch(self, num_tokens: int) -> LaunchPlan:
        return self.plan

    def combine(self, num_tokens: int, ordered: bool) -> LaunchPlan:
        return self.plan


@dataclass
class Batch:
    """Tokens of one rank, and where their results go."""

    x_TH: torch.Tensor
    rank_TK: torch.Tensor
    local_TK: torch.Tensor
    weight_TK: torch.Tensor
    out_TH: torch.Tensor


class BenchRank:
    def __init__(self, device: int) -> None:
        torch.cuda.set_device(device)
        torch.zeros(1, device="cuda")
        self.device = device
        self.provider: HeapProvider | None = None
        self.groups: dict[str, list[DeviceGroup]] = {}
        self.peers: dict[int, list[PeerHeap]] = {}
        self.rank = 0

    def new_unique_id(self) -> str:
        from kernels.symmetric_memory.nvshmem import new_unique_id

        return new_unique_id(SYMMETRIC_BYTES).hex()

    def open_provider(self, kind: str, holder: str, unique_id: str, rank: int, num_ranks: int) -> None:
        """``unique_id`` empty, kind nvshmem: as a process that takes a dead one's place."""
        if kind == "vmm":
            from kernels.symmetric_memory.vmm import VmmProvider

            self.provider = VmmProvider(Path(holder), self.device)
        else:
            from kernels.symmetric_memory.nvshmem import NvshmemProvider

            uid = bytes.fromhex(unique_id)
            self.provider = NvshmemProvider(
                self.device, unique_id=uid, rank=rank, num_ranks=num_ranks, symmetric_bytes=SYMMETRIC_BYTES
            )

    def make(
        self,
        shape: dict[str, Any],
        rank: int,
        num_ranks: int,
        num_experts: int,
        name: str,
        variants: list[str],
        attach: bool,
    ) -> Descriptors:
        """Heaps and groups of each variant; the heaps' descriptors."""
        assert self.provider is not None
        self.rank, self.num_ranks, self.num_experts = rank, num_ranks, num_experts
        self.num_local = num_experts // num_ranks
        self.generator = torch.Generator(device="cuda").manual_seed(1234 + rank + int(time.time()))
        self.groups = {}
        descriptors: Descriptors = {}
        for variant in variants:
            elastic, dispatch_dtype = VARIANTS[variant]
            layout = HeapLayout.build(EpShape(**shape, dtype=torch.bfloat16, dispatch_dtype=dispatch_dtype))
            self.groups[variant], descriptors[variant] = [], []
            for turn in range(NUM_TURNS):
                own = f"{name}-{variant}{turn}-{rank}"
                heap = self.provider.attach(own) if attach else self.provider.allocate(own, layout.nbytes)
                if not attach:
                    layout.format(heap.bytes_U8)
                group = DeviceGroup(
                    layout, heap, rank, deadline_s=10.0, elastic=elastic, num_local_experts=self.num_local
                )
                self.groups[variant].append(group)
                descriptors[variant].append(heap.descriptor)
        self.ep = self.every_group()[0].layout.ep
        return descriptors

    def every_group(self) -> list[DeviceGroup]:
        return [group for groups in self.groups.values() for group in groups]

    def map_rank(self, rank: int, descriptors: Descriptors) -> None:
        assert self.provider is not None
        self.peers[rank] = []
        for variant, groups in self.groups.items():
            for group, descriptor in zip(groups, descriptors[variant], strict=True):
                heap = self.provider.map_peer(descriptor)
                self.peers[rank].append(heap)
                group.map_peer(rank, heap)

    def drop_mapping(self, rank: int) -> None:
        """Close what was mapped of a slot that has gone."""
        for group in self.every_group():
            group.unmap_peer(rank)
        for heap in self.peers.pop(rank):
            heap.close()

    def adopt(self, epoch: int, members: list[int]) -> None:
        torch.cuda.synchronize()
        for group in self.every_group():
            group.adopt(epoch, members, 5)

    def allgather(self) -> list[list[int]]:
        words_N = self.header_words()
        outs = [words_N.new_full((self.ep.max_ranks, len(words_N)), -1) for _ in self.every_group()]
        for group, out_WN in zip(self.every_group(), outs, strict=True):
            group.allgather(words_N, out_WN)
        return [out_WN.tolist()[rank][:2] for out_WN in outs for rank in range(self.num_ranks)]

    def header_words(self) -> torch.Tensor:
        return torch.arange(self.ep.num_header_words, device="cuda") + 100 * self.rank

    def announce(self, epoch: int, members: list[int]) -> None:
        for group in self.every_group():
            group.announce_header(epoch, members, self.header_words(), 5)
        torch.cuda.synchronize()

    def sees_announcement(self, epoch: int, rank: int) -> bool:
        return all(group.sees_announcement(epoch, rank) for group in self.every_group())

    def void_reasons(self) -> list[str]:
        return [reason.value for group in self.every_group() if (reason := group.void_reason())]

    def set_deadline(self, deadline_s: float) -> None:
        for group in self.every_group():
            group.set_deadline(deadline_s)

    def memory_used_mib(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return (total - free) >> 20

    def batch(self, num_tokens: int, drop: float = 0.0) -> Batch:
        """Fresh random tokens; experts uniform, each local to rank e // (experts / ranks)."""
        ep = self.ep
        score = torch.rand(num_tokens, self.num_experts, device="cuda", generator=self.generator)
        expert_TK = score.topk(ep.top_k).indices.int()
        rank_TK = expert_TK // self.num_local
        if drop:
            gone = torch.rand(rank_TK.shape, device="cuda", generator=self.generator) < drop
            rank_TK = torch.where(gone, -1, rank_TK)
        x_TH = torch.randn(num_tokens, ep.hidden_size, device="cuda", generator=self.generator).to(ep.dtype)
        weight_TK = torch.rand(num_tokens, ep.top_k, device="cuda", generator=self.generator)
        out_TH = torch.full_like(x_TH, float("nan"))
        return Batch(x_TH, rank_TK.contiguous(), (expert_TK % self.num_local).contiguous(), weight_TK, out_TH)

    def random_rows(self, ordered: bool) -> torch.Tensor:
        """What experts might return, in the form that combine takes."""
        ep = self.ep
        shape = (ep.max_ranks, ep.max_tokens, *((ep.top_k,) if ordered else ()), ep.hidden_size)
        return torch.randn(shape, device="cuda").to(ep.dtype)

    def use_plan(self, plan: tuple[int, int, int, bool] | None) -> None:
        """(part, programs, warps, overlap), or None for the group's own choice."""
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        hidden_size = self.ep.hidden_size
        for group in self.every_group():
            group.launch.planner = (
                LaunchPlanner(hidden_size, sms, True)
                if plan is None
                else FixedPlan(hidden_size, sms, plan[3], LaunchPlan(*plan))
            )
