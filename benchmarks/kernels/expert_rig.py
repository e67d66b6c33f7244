# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""One rank's experts on one GPU, with rows as the dispatch of all ranks would have left them.

Legend: W ranks, M max_tokens, T tokens a rank, K top_k, H hidden_size, I intermediate_size, E local experts, S sets.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from kernels.device_group import DeviceGroup
from kernels.expert_mlp import ExpertMlp
from kernels.expert_plan import ExpertPlan
from kernels.heap_layout import ALIGNMENT_BYTES, EpShape, HeapLayout

MAX_TOKENS = 128
RANK = 0
NUM_REPLAYS = 9
NUM_OPERATIONS = 24  # of a graph, about


@dataclass(frozen=True, slots=True)
class Shape:
    """One MoE layer, spread over ``num_ranks``; every rank sends the same number of tokens."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_ranks: int
    num_sets: int
    tuned: bool = True  # also by expert_tune

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size * 2


class OwnHeap:
    """Plain device memory; it stands in for the peers' heaps too, which nobody reads here."""

    def __init__(self, layout: HeapLayout) -> None:
        self.bytes_U8 = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
        layout.format(self.bytes_U8)
        self.nbytes = layout.nbytes
        self.header_U8 = self.bytes_U8[:ALIGNMENT_BYTES].cpu()
        self.address = self.bytes_U8.data_ptr()
        self.descriptor = ""

    def close(self) -> None:
        pass


class ExpertSet:
    """Weights of a layer's local experts, and a heap with rows for them."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.generator = torch.Generator(device="cuda").manual_seed(seed)
        sizes = EpShape(shape.num_ranks, MAX_TOKENS, shape.top_k, shape.hidden_size, dtype=torch.bfloat16)
        layout = HeapLayout.build(sizes)
        heap = OwnHeap(layout)
        self.group = DeviceGroup(layout, heap, RANK, deadline_s=1.0)
        for rank in range(1, shape.num_ranks):
            self.group.map_peer(rank, heap)
        self.group.adopt(1, range(shape.num_ranks), 0, in_band=True)
        self.gate_up = self._weight(2, shape.intermediate_size, shape.hidden_size)
        self.down = self._weight(shape.hidden_size, shape.intermediate_size)
        rows = (shape.num_ranks, MAX_TOKENS, shape.top_k, shape.hidden_size)
        self.rows_WMKH = torch.zeros(rows, dtype=torch.bfloat16, device="cuda")
        self.local_WTK = torch.zeros(0)

    def _weight(self, *sizes: int) -> torch.Tensor:
        weight = torch.empty(self.shape.num_local, *sizes, dtype=torch.bfloat16, device="cuda")
        for expert in weight:
            expert.copy_(torch.randn(sizes, device="cuda", generator=self.generator) * sizes[-1] ** -0.5)
        return weight

    def experts(self, plan: ExpertPlan | None = None) -> ExpertMlp:
        return ExpertMlp(self.group, self.gate_up, self.down, plan=plan)

    def leave_rows(self, num_tokens: int, drop: float = 0.0) -> None:
        """Fresh random tokens of every rank; experts uniform."""
        shape = self.shape
        tokens = (shape.num_ranks, num_tokens)
        score = torch.rand(*tokens, shape.num_experts, device="cuda", generator=self.generator)
        expert_WTK = score.topk(shape.top_k).indices.int()
        rank_WTK = expert_WTK // shape.num_local
        if drop:
            gone = torch.rand(rank_WTK.shape, device="cuda", generator=self.generator) < drop
            rank_WTK = torch.where(gone, -1, rank_WTK)
        local_WTK = expert_WTK % shape.num_local
        header = self.group.row_header_WMC[:, :num_tokens]
        header[..., 0] = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
        header[..., 1 : 1 + shape.top_k] = torch.where(rank_WTK < 0, -1, (rank_WTK << 16) | local_WTK)
        weight = torch.rand(rank_WTK.shape, device="cuda", generator=self.generator)
        header[..., 1 + shape.top_k :] = weight.view(torch.int32)
        x_WTH = torch.randn(*tokens, shape.hidden_size, device="cuda", generator=self.generator)
        self.group.row_x_WMH[:, :num_tokens] = x_WTH.bfloat16()
        self.group.num_rows_W.fill_(num_tokens)
        self.local_WTK = torch.where(rank_WTK == RANK, local_WTK, -1)

    def entries(self) -> torch.Tensor:
        """int64 [N, 4]: source, row, k, local expert, sorted by expert."""
        where = (self.local_WTK >= 0).nonzero()
        expert = self.local_WTK[tuple(where.T)].long()
        entries: torch.Tensor = torch.cat([where, expert[:, None]], 1)[expert.argsort(stable=True)]
        return entries

    def num_active(self) -> int:
        return len(set(self.entries()[:, 3].tolist()))


def capture(operations: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    """One graph; every operation runs once before."""
    for operation in operations:
        operation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for operation in operations:
            operation()
    return graph


def repeated(operations: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
    return [*operations] * max(1, NUM_OPERATIONS // len(operations))


def time_graph(graph: torch.cuda.CUDAGraph, num_operations: int, num_replays: int = NUM_REPLAYS) -> list[float]:
    """Microseconds an operation, of each replay."""
    graph.replay()
    times = []
    for _ in range(num_replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / num_operations)
    return times


@triton.jit
def _copy_kernel(target, source, number, PART: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * PART
    while first < number:
        i = first + tl.arange(0, PART)
        tl.store(target + i, tl.load(source + i, mask=i < number), mask=i < number)
        first += tl.num_programs(0).to(tl.int64) * PART


@triton.jit
def _read_kernel(target, source, number, PART: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * PART
    total = tl.zeros([PART], tl.int32)
    while first < number:
        i = first + tl.arange(0, PART)
        total += tl.load(source + i, mask=i < number, other=0)
        first += tl.num_programs(0).to(tl.int64) * PART
    tl.store(target + tl.program_id(0), tl.sum(total))


def bandwidths() -> dict[str, float]:
    """Bytes per second of large streams, the best of several sizes and launches: ``copy`` counts bytes read and
    written; ``read`` only reads.
    """
    best = {"copy": 0.0, "read": 0.0}
    for num_bytes in (1 << 30, 4 << 30):
        source = torch.randint(-(2**31), 2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        number = source.numel()
        runs: list[tuple[str, int, Callable[[], object]]] = [("copy", 2, partial(target.copy_, source))]
        for part, programs, num_warps in itertools.product((2048, 4096, 8192), (264, 528, 1056, 1 << 20), (4, 8)):
            grid = (min(programs, -(-number // part)),)
            arguments = (target, source, number)
            runs.append(("copy", 2, partial(_copy_kernel[grid], *arguments, PART=part, num_warps=num_warps)))
            runs.append(("read", 1, partial(_read_kernel[grid], *arguments, PART=part, num_warps=num_warps)))
        for name, passes, run in runs:
            run()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(4):
                run()
            end.record()
            torch.cuda.synchronize()
            best[name] = max(best[name], 4 * passes * num_bytes / (begin.elapsed_time(end) * 1e-3))
    return best
