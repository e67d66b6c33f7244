"""What a rank process does for the measurements.

Legend: W ranks, M max_tokens, T tokens, K top_k, H hidden_size.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.device_group import DeviceGroup
from kernels.heap_layout import EpShape, HeapLayout
from kernels.launch_plan import LaunchPlan, LaunchPlanner
from kernels.symmetric_memory.vmm import VmmProvider

NUM_REPEATS = 52  # operations of a graph: two groups take turns, each twice or a multiple of it
NUM_REPLAYS = 9
NUM_LAYERS = 32


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
    def __init__(self, device: int, holder: Path) -> None:
        torch.cuda.set_device(device)
        torch.zeros(1, device="cuda")
        self.provider = VmmProvider(holder, device)
        self.groups: list[DeviceGroup] = []
        self.rank = 0
        self.epoch = 0

    def make(self, shape: dict[str, Any], rank: int, num_ranks: int, num_experts: int, name: str, attach: bool) -> None:
        """Two groups over heaps ``{name}{0,1}-{rank}``: one operation can be repeated only if two groups take turns,
        since buffers are single."""
        self.layout = HeapLayout.build(EpShape(**shape, dtype=torch.bfloat16))
        self.rank, self.num_ranks, self.num_experts, self.name = rank, num_ranks, num_experts, name
        self.groups = []
        for which in range(2):
            own = f"{name}{which}-{rank}"
            heap = self.provider.attach(own) if attach else self.provider.allocate(own, self.layout.nbytes)
            if not attach:
                self.layout.format(heap.bytes_U8)
            self.groups.append(DeviceGroup(self.layout, heap, rank, deadline_s=10.0))
        self.generator = torch.Generator(device="cuda").manual_seed(1234 + rank + int(time.time()))

    def map_rank(self, rank: int) -> None:
        for which, group in enumerate(self.groups):
            group.map_peer(rank, self.provider.map_peer(f"vmm:{self.name}{which}-{rank}"))

    def adopt(self, epoch: int, members: list[int]) -> None:
        torch.cuda.synchronize()
        for group in self.groups:
            group.adopt(epoch, members, 5)

    def allgather(self) -> list[list[int]]:
        ep = self.layout.ep
        words = torch.arange(ep.num_header_words, device="cuda") + 100 * self.rank
        outs = [words.new_full((ep.max_ranks, ep.num_header_words), -1) for _ in self.groups]
        for group, out in zip(self.groups, outs, strict=True):
            group.allgather(words, out)
        return [out.tolist()[rank][:2] for out in outs for rank in range(self.num_ranks)]

    def void_reasons(self) -> list[str]:
        return [reason.value if (reason := group.void_reason()) else "" for group in self.groups]

    def batch(self, num_tokens: int, drop: float = 0.0) -> Batch:
        """Fresh random tokens; experts uniform, each local to rank e // (experts / ranks)."""
        ep = self.layout.ep
        score = torch.rand(num_tokens, self.num_experts, device="cuda", generator=self.generator)
        expert_TK = score.topk(ep.top_k).indices.int()
        num_local = self.num_experts // self.num_ranks
        rank_TK = expert_TK // num_local
        if drop:
            gone = torch.rand(rank_TK.shape, device="cuda", generator=self.generator) < drop
            rank_TK = torch.where(gone, -1, rank_TK)
        x_TH = torch.randn(num_tokens, ep.hidden_size, device="cuda", generator=self.generator).to(ep.dtype)
        weight_TK = torch.rand(num_tokens, ep.top_k, device="cuda", generator=self.generator)
        out_TH = torch.full_like(x_TH, float("nan"))
        return Batch(x_TH, rank_TK.contiguous(), (expert_TK % num_local).contiguous(), weight_TK, out_TH)

    def fake_experts(self, group: DeviceGroup, ordered: bool) -> torch.Tensor:
        """Expert e multiplies by 1 + e / experts. Rows that nobody sent are NaN."""
        ep = self.layout.ep
        header = group.row_header_WMC
        code_WMK = header[:, :, 1 : 1 + ep.top_k]
        weight_WMK = header[:, :, 1 + ep.top_k :].contiguous().view(torch.float32)
        mine = (code_WMK >> 16) == self.rank
        rows = torch.arange(ep.max_tokens, device="cuda")
        member = torch.arange(ep.max_ranks, device="cuda") < self.num_ranks
        arrived = (rows[None] < group.num_rows_W[:, None]) & member[:, None]
        mine &= arrived[:, :, None]
        factor = 1 + ((code_WMK & 0xFFFF) + self.rank * (self.num_experts // self.num_ranks)) / self.num_experts
        x_WMH = group.row_x_WMH.float()
        nan = torch.full((), float("nan"), device="cuda")
        if ordered:
            y_WMKH = (x_WMH[:, :, None] * factor[..., None]).to(ep.dtype)
            return torch.where(mine[..., None], y_WMKH, nan.to(ep.dtype))
        total = torch.where(mine, factor * weight_WMK, 0).sum(-1, keepdim=True)
        return torch.where(mine.any(-1, keepdim=True), (x_WMH * total).to(ep.dtype), nan.to(ep.dtype))

    def check(self, num_tokens: int, drop: float) -> dict[str, float]:
        """Relative errors against float64, and in how many elements the ordered result differs from torch's sum."""
        results: dict[str, float] = {}
        for ordered in (False, True):
            group = self.groups[int(ordered)]
            batch = self.batch(num_tokens, drop)
            group.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
            group.combine(self.fake_experts(group, ordered), batch.out_TH, ordered=ordered)
            reason = group.void_reason()
            if reason is not None:
                raise RuntimeError(f"void: {reason.value}")
            expert_TK = batch.rank_TK * (self.num_experts // self.num_ranks) + batch.local_TK
            factor_TK = torch.where(batch.rank_TK >= 0, 1 + expert_TK / self.num_experts, 0)
            exact = batch.x_TH.double() * (factor_TK.double() * batch.weight_TK.double()).sum(-1, keepdim=True)
            norm = float(exact.norm()) or 1.0
            results["ordered" if ordered else "reduced"] = float((batch.out_TH.double() - exact).norm()) / norm
            if ordered:
                total = torch.zeros_like(batch.x_TH, dtype=torch.float32)
                for k in range(self.layout.ep.top_k):
                    row = (batch.x_TH.float() * factor_TK[:, k, None]).to(batch.x_TH.dtype).float()
                    sent = (batch.rank_TK[:, k] >= 0)[:, None]
                    total = torch.where(sent, total + batch.weight_TK[:, k, None] * row, total)
                results["wrong_bits"] = float((total.to(batch.out_TH.dtype) != batch.out_TH).sum())
        return results

    def use_plan(self, plan: tuple[int, int, int, bool] | None) -> None:
        """(part, programs, warps, overlap), or None for the group's own choice."""
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        hidden_size = self.layout.ep.hidden_size
        for group in self.groups:
            group._planner = (
                LaunchPlanner(hidden_size, sms, True)
                if plan is None
                else FixedPlan(hidden_size, sms, plan[3], LaunchPlan(*plan))
            )

    def compile_plans(self, plans: list[tuple[str, int, tuple[int, int, int, bool] | None]]) -> None:
        """Fill the disk cache: in a group of one, so that no peer is needed."""
        for operation, num_tokens, plan in plans:
            self.use_plan(plan)
            self.repeated(operation, num_tokens)(2)
            torch.cuda.synchronize()

    def repeated(self, operation: str, num_tokens: int) -> Callable[[int], None]:
        """Launches the operation a number of times, the groups in turn; first one true dispatch, for rows to return."""
        ep = self.layout.ep
        batch = self.batch(num_tokens)
        for group in self.groups:
            if operation != "dispatch":
                group._launch_dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK, 0, 1)
                group._state.ctl[0].copy_(group._state.ctl[1])
        ordered = operation == "ordered"
        shape = (ep.max_ranks, ep.max_tokens, *((ep.top_k,) if ordered else ()), ep.hidden_size)
        rows = torch.randn(shape, device="cuda").to(ep.dtype) if operation != "dispatch" else None

        def launch(number: int) -> None:
            for i in range(number):
                group, cell = self.groups[i % 2], i // 2 % 2
                if rows is None:
                    group._launch_dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK, cell, 1 - cell)
                else:
                    group._launch_combine(rows, batch.out_TH, ordered, cell, 1 - cell)

        return launch

    def time_operation(self, operation: str, num_tokens: int, plan: tuple[int, int, int, bool] | None) -> list[float]:
        """Microseconds an operation, of each replay of a graph of NUM_REPEATS."""
        self.use_plan(plan)
        launch = self.repeated(operation, num_tokens)
        launch(4)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(NUM_REPEATS)
        times = self.replay(graph, NUM_REPLAYS)
        if any(self.void_reasons()):
            raise RuntimeError(f"void: {self.void_reasons()}")
        return [us / NUM_REPEATS for us in times]

    def replay(self, graph: torch.cuda.CUDAGraph, number: int) -> list[float]:
        """Microseconds of each replay. The ranks start together: a barrier on the devices, behind a pause in which the
        host gets ahead of them."""
        times = []
        for _ in range(number):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            self.groups[0].clean_buffer(10.0)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return times

    def capture_layers(self, num_layers: int, num_tokens: int, ordered: bool) -> torch.cuda.CUDAGraph:
        """(dispatch, combine) num_layers times, as a model would, on the first group."""
        ep = self.layout.ep
        self.use_plan(None)
        group, batch = self.groups[0], self.batch(num_tokens)
        shape = (ep.max_ranks, ep.max_tokens, *((ep.top_k,) if ordered else ()), ep.hidden_size)
        rows = torch.randn(shape, device="cuda").to(ep.dtype)
        self.kept = (batch, rows, batch.rank_TK.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(num_layers):
                group.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
                group.combine(rows, batch.out_TH, ordered=ordered)
        return graph

    def time_pair(self, num_tokens: int, ordered: bool) -> list[float]:
        """Microseconds of (dispatch, combine), from a graph of 26."""
        return [us / 26 for us in self.replay(self.capture_layers(26, num_tokens, ordered), NUM_REPLAYS)]

    def slowest_single(self, num_tokens: int, number: int) -> tuple[float, float]:
        """Median and largest microseconds of single (dispatch, combine) replays."""
        times = sorted(self.replay(self.capture_layers(1, num_tokens, False), number))
        return times[number // 2], times[-1]

    def prepare_layers(self, num_tokens: int, deadline_s: float) -> None:
        """The graph that the fault section replays. Capture launches nothing, so it needs no peer."""
        self.layers = self.capture_layers(NUM_LAYERS, num_tokens, False)
        torch.cuda.synchronize()
        for group in self.groups:
            group.set_deadline(deadline_s)

    def prepare_layers_alone(self, num_tokens: int, deadline_s: float) -> None:
        """The same for a newcomer: loads the kernels (a void rank's do nothing) and captures, before it is a member."""
        group, batch = self.groups[0], self.batch(num_tokens)
        rows = torch.zeros(self.layout.ep.max_ranks, self.layout.ep.max_tokens, self.layout.ep.hidden_size).cuda()
        self.use_plan(None)
        group._launch_dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK, 0, 1)
        group._launch_combine(rows.to(self.layout.ep.dtype), batch.out_TH, False, 1, 0)
        group.epoch, group._had_header = 1, True  # the order of calls is that of the replays to come
        self.prepare_layers(num_tokens, deadline_s)
        group.epoch, group._had_header = 0, False

    def set_deadline(self, deadline_s: float) -> None:
        for group in self.groups:
            group.set_deadline(deadline_s)

    def replay_layers(self, number: int) -> float:
        """Median milliseconds of a replay; all must be clean."""
        took = []
        for _ in range(number):
            begin = time.perf_counter()
            self.layers.replay()
            torch.cuda.synchronize()
            took.append((time.perf_counter() - begin) * 1e3)
        if self.groups[0].void_reason() is not None:
            raise RuntimeError(f"void: {self.void_reasons()} {self.groups[0].observation_mask().tolist()}")
        return sorted(took)[number // 2]

    def replay_until_void(self, limit_s: float) -> dict[str, Any]:
        group, give_up = self.groups[0], time.perf_counter() + limit_s
        number = 0
        while time.perf_counter() < give_up:
            begin = time.perf_counter()
            self.layers.replay()
            reason = group.void_reason()
            number += 1
            if reason is not None:
                torch.cuda.synchronize()
                took_ms = (time.perf_counter() - begin) * 1e3
                again = time.perf_counter()
                self.layers.replay()
                torch.cuda.synchronize()
                return {
                    "replays": number,
                    "void_replay_ms": took_ms,
                    "next_void_replay_ms": (time.perf_counter() - again) * 1e3,
                    "reason": reason.value,
                    "observed": group.observation_mask().tolist(),
                }
        raise RuntimeError("the group never became void")

    def poisoned_by_host(self, after_s: float) -> dict[str, Any]:
        """Replay with a peer that does nothing; another thread poisons."""
        group, epoch = self.groups[0], self.groups[0].epoch
        timer = threading.Timer(after_s, lambda: group.poison_self(epoch))
        begin = time.perf_counter()
        self.layers.replay()
        timer.start()
        reason = group.void_reason()
        timer.join()
        took_s = time.perf_counter() - begin
        return {"took_s": took_s, "reason": str(reason), "observed": group.observation_mask().tolist()}

    def reroute(self, members: list[int]) -> None:
        """Send the captured graph's tokens to members only, as routing by a new placement does."""
        batch, _, rank_TK = self.kept
        batch.rank_TK.copy_(torch.tensor(members, device="cuda", dtype=torch.int32)[rank_TK.long() % len(members)])

    def memory_used_mib(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return (total - free) >> 20

    def drop_mapping(self, rank: int) -> None:
        """Close what was mapped of a slot that has gone."""
        for which, group in enumerate(self.groups):
            group.unmap_peer(rank)
            stale = [heap for heap in self.provider._open if heap.descriptor == f"vmm:{self.name}{which}-{rank}"]
            for heap in stale:
                heap.close()
                self.provider._open.remove(heap)

    def time_nccl(self, port: int, num_tokens: int) -> list[float]:
        """Microseconds of all_to_all_single with the same number of tokens for every rank, graph of 50."""
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group(
                "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=self.rank, world_size=self.num_ranks
            )
        send = torch.randn(self.num_ranks * num_tokens, self.layout.ep.hidden_size, device="cuda").bfloat16()
        receive = torch.empty_like(send)
        for _ in range(3):
            dist.all_to_all_single(receive, send)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                dist.all_to_all_single(receive, send)
        return [us / 50 for us in self.replay(graph, NUM_REPLAYS)]
