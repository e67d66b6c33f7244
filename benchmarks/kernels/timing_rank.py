"""Times of one rank's operations: CUDA graphs between two events.

Legend: T tokens, H hidden_size.
"""

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from benchmarks.kernels.bench_rank import BenchRank

NUM_REPEATS = 52  # operations of a graph: two groups take turns, each twice or a multiple of it
NUM_REPLAYS = 41
Plan = tuple[int, int, int, bool]


class TimingRank(BenchRank):
    def compile_plans(self, plans: list[tuple[str, str, int, Plan | None]]) -> None:
        """Fill the disk cache, and launch nothing from now on: that would need peers."""
        run = JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
            return run(kernel, *arguments, grid=grid, warmup=True, **more)

        JITFunction.run = compile_only
        for operation, variant, num_tokens, plan in plans:
            self.use_plan(plan)
            self.repeated(operation, variant, num_tokens)(2)

    def repeated(self, operation: str, variant: str, num_tokens: int) -> Callable[[int], None]:
        """Launches the operation a number of times, the groups in turn; first one true dispatch, for rows to return."""
        batch, groups = self.batch(num_tokens), self.groups[variant]
        if operation == "dispatch":
            rows = None
        else:
            rows = self.random_rows(operation == "ordered")
            for group in groups:
                group.launch.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
                group._state.ctl[0].copy_(group._state.ctl[1])

        def launch(number: int) -> None:
            for i in range(number):
                to, cell = groups[i % 2].launch, i // 2 % 2
                if rows is None:
                    to.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK, cell, 1 - cell)
                else:
                    to.combine(rows, batch.out_TH, operation == "ordered", cell, 1 - cell)

        return launch

    def time_operation(self, operation: str, variant: str, num_tokens: int, plan: Plan | None) -> list[float]:
        """Microseconds an operation, of each replay of a graph of NUM_REPEATS."""
        self.use_plan(plan)
        launch = self.repeated(operation, variant, num_tokens)
        launch(4)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(NUM_REPEATS)
        times = self.replay(graph, NUM_REPLAYS)
        if self.void_reasons():
            raise RuntimeError(f"void: {self.void_reasons()}")
        return [us / NUM_REPEATS for us in times]

    def replay(self, graph: torch.cuda.CUDAGraph, number: int) -> list[float]:
        """Microseconds of each replay. The ranks start together: a barrier on the devices, behind a pause in which the
        host gets ahead of them."""
        gate = self.every_group()[0]
        times = []
        for _ in range(number):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            gate.clean_buffer(10.0)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return times

    def capture_layers(self, variant: str, num_layers: int, num_tokens: int, ordered: bool) -> torch.cuda.CUDAGraph:
        """(dispatch, combine) num_layers times, as a model would, on the first group."""
        self.use_plan(None)
        group, batch, rows = self.groups[variant][0], self.batch(num_tokens), self.random_rows(ordered)
        self.kept = (batch, rows)  # as long as the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(num_layers):
                group.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
                group.combine(rows, batch.out_TH, ordered=ordered)
        return graph

    def time_pair(self, num_tokens: int, ordered: bool) -> list[float]:
        """Microseconds of (dispatch, combine), from a graph of 26."""
        return [us / 26 for us in self.replay(self.capture_layers("views", 26, num_tokens, ordered), NUM_REPLAYS)]

    def slowest_single(self, num_tokens: int, number: int) -> tuple[float, float]:
        """Median and largest microseconds of single (dispatch, reduced combine) replays."""
        graph = self.capture_layers("views", 1, num_tokens, False)
        self.replay(graph, 20)
        times = sorted(self.replay(graph, number))
        return times[number // 2], times[-1]

    def time_nccl(self, port: int, num_tokens: int) -> list[float]:
        """Microseconds of all_to_all_single with the same number of tokens for every rank, graph of 50."""
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group(
                "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=self.rank, world_size=self.num_ranks
            )
        send = torch.randn(self.num_ranks * num_tokens, self.ep.hidden_size, device="cuda").bfloat16()
        receive = torch.empty_like(send)
        for _ in range(3):
            dist.all_to_all_single(receive, send)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                dist.all_to_all_single(receive, send)
        return [us / 50 for us in self.replay(graph, NUM_REPLAYS)]
