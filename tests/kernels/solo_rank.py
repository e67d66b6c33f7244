"""One rank of Triton kernels under the interpreter; the test plays its peers by writing words into its heap.

Legend: W max_ranks, M max_tokens, K top_k, H hidden.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.device_group import DeviceGroup
from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import VoidReason
from kernels.heap_layout import EpShape, HeapLayout
from kernels.launch_plan import LaunchPlan, LaunchPlanner
from kernels.symmetric_memory.shm import ShmProvider
from tests.kernels.local_group import DIGEST, SHAPE

FLOOR = 1 << 40
DEADLINE_S = 5.0
SELF = 1
NUM_LOCAL = 16


class Programs(LaunchPlanner):
    """As many programs as told."""

    def __init__(self, number: int, hidden_size: int) -> None:
        super().__init__(hidden_size, number, False)

    def _plan(self, num_tokens: int, part: int, num_warps: int, most: int) -> LaunchPlan:
        return LaunchPlan(1 << (self.hidden_size - 1).bit_length(), self.num_resident)


class Clock:
    """Half a second passes at each look; then ``events`` may act for the peers, by number of the look."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_looks = 0
        self.events: dict[int, Callable[[], None]] = {}

    def now_ns(self) -> int:
        self.now_s += 0.5
        self.num_looks += 1
        assert self.num_looks < 200, "waits for ever"
        self.events.get(self.num_looks, lambda: None)()
        return int(self.now_s * 1e9)


class Solo:
    """Rank 1 of members 0, 1, 2 (slot 3 is empty)."""

    def __init__(
        self,
        directory: Path,
        shape: EpShape = SHAPE,
        num_programs: int = 1,
        elastic: ElasticMode = ElasticMode.VIEWS,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.layout = HeapLayout.build(shape)
        self.provider = ShmProvider(directory)
        self.heaps = [self.provider.allocate(f"heap{rank}", self.layout.nbytes) for rank in range(3)]
        for heap in self.heaps:
            self.layout.format(heap.bytes_U8)
        self.clock = Clock()
        sys.modules["kernels.triton_wait"].host_now_ns = self.clock.now_ns  # type: ignore[attr-defined]
        self.group = DeviceGroup(
            self.layout,
            self.heaps[SELF],
            SELF,
            deadline_s=DEADLINE_S,
            elastic=elastic,
            num_local_experts=NUM_LOCAL,
            planner=Programs(num_programs, shape.hidden_size),
        )
        for rank in (0, 2):
            self.group.map_peer(rank, self.heaps[rank])
        self.group.adopt(1, [0, 1, 2], DIGEST)
        self.out_WN = torch.full((shape.max_ranks, shape.num_header_words), -1)

    def view(self, rank: int, region: str) -> torch.Tensor:
        return self.layout.view(self.heaps[rank].bytes_U8, region)

    def snapshot(self, rank: int) -> torch.Tensor:
        copy = self.heaps[rank].bytes_U8.clone()
        self.layout.view(copy, "ep_poison").zero_()
        return copy

    def header(self, rank: int, digest: int = DIGEST, tag: int = 1 << 20 | 1) -> None:
        row = self.view(SELF, "ep_header")[3, rank]
        row[1:] = tag << 32
        row[1] |= digest
        row[0] = FLOOR | 1

    def begin(self) -> None:
        for rank in (0, 2):
            self.header(rank)
        self.group.allgather(torch.arange(SHAPE.num_header_words), self.out_WN)
        assert self.group.void_reason() is None

    def say(self, operation: str, n: int, *ranks: int) -> None:
        words = self.view(SELF, f"ep_{operation}_word")
        for rank in ranks or (0, 2):
            if operation == "dispatch":
                words[rank, 0] = FLOOR | n
            elif operation == "barrier":
                words[n & 1, rank] = FLOOR | n
            else:
                words[rank] = FLOOR | n

    def sends(self, rank: int, token: int, codes: list[int]) -> None:
        """A row of ``rank`` in the own heap, as its dispatch writes it."""
        row = self.view(SELF, "ep_dispatch_rows").view(torch.int32)[rank, 0]
        row[: 1 + SHAPE.top_k] = torch.tensor([token, *codes])
        self.view(SELF, "ep_dispatch_word")[rank, 1] = 1

    def dispatch(self, ranks: list[list[int]], weight_TK: torch.Tensor | None = None) -> None:
        rank_TK = torch.tensor(ranks, dtype=torch.int32).reshape(-1, SHAPE.top_k)
        x_TH = torch.arange(1, 1 + len(rank_TK) * SHAPE.hidden_size).float().view(-1, SHAPE.hidden_size)
        local_TK = torch.full_like(rank_TK, 7)
        half_TK = torch.full(rank_TK.shape, 0.5)
        self.group.dispatch(x_TH, rank_TK, local_TK, half_TK if weight_TK is None else weight_TK)

    def combine(self, num_tokens: int, ordered: bool = True) -> torch.Tensor:
        ep = self.layout.ep
        shape = (ep.max_ranks, ep.max_tokens, *((ep.top_k,) if ordered else ()), ep.hidden_size)
        out_TH = torch.full((num_tokens, ep.hidden_size), float("nan"))
        self.group.combine(torch.ones(shape), out_TH, ordered=ordered)
        return out_TH

    def assert_void(self, reason: VoidReason | None, observed: tuple[int, ...] = ()) -> None:
        assert self.group.void_reason() is reason, self.group.void_reason()
        found = tuple(self.group.observation_mask().nonzero().flatten().tolist())
        assert found == observed, found

    def assert_clean(self) -> None:
        assert self.group.void_reason() is None, self.group.void_reason()

    def poisoned(self) -> list[bool]:
        return [bool(self.view(rank, "ep_poison")[SELF] >= FLOOR) for rank in (0, 2)]
