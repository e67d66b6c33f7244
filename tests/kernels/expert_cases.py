"""The expert MLP's kernels under the interpreter; the test writes what dispatch would have left.

``python -m tests.kernels.expert_cases`` (with TRITON_INTERPRET=1) runs every case and prints a line of JSON each: its
name and "ok" or the traceback.

Legend: W max_ranks, M max_tokens, K top_k, H hidden_size, I intermediate_size, E local experts.
"""

import json
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kernels.device_group import DeviceGroup
from kernels.expert_mlp import ExpertMlp
from kernels.expert_plan import plan_experts
from kernels.fp8 import dequantise, quantise
from kernels.heap_layout import EpShape, HeapLayout
from kernels.received import sum_of_each_row
from kernels.reference_experts import expert_rows, mlp
from kernels.symmetric_memory.shm import ShmProvider
from tests.kernels.interpreted_group import received_entries
from tests.own_directory import own_directory_prefix

SHAPE = EpShape(max_ranks=4, max_tokens=40, top_k=3, hidden_size=64)
MEMBERS = (0, 1, 2)
SELF = 1
NUM_EXPERTS = 5
INTERMEDIATE = 48
EMPTY_EXPERT, CROWDED_EXPERT = 3, 2


class Rig:
    """Rank 1 of members 0, 1, 2, its experts, and random rows of every slot, 3 included, which is no member."""

    def __init__(self, directory: Path, seed: int = 3) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.generator = torch.Generator().manual_seed(seed)
        layout = HeapLayout.build(SHAPE)
        provider = ShmProvider(directory)
        self.heaps = [provider.allocate(f"heap{rank}", layout.nbytes) for rank in MEMBERS]
        for heap in self.heaps:
            layout.format(heap.bytes_U8)
        self.group = DeviceGroup(layout, self.heaps[SELF], SELF, deadline_s=1.0)
        for rank in (0, 2):
            self.group.map_peer(rank, self.heaps[rank])
        self.group.adopt(1, MEMBERS, 0)
        self.gate_up = self.random(NUM_EXPERTS, 2, INTERMEDIATE, SHAPE.hidden_size) / 8
        self.down = self.random(NUM_EXPERTS, SHAPE.hidden_size, INTERMEDIATE) / 7
        self.experts = ExpertMlp(self.group, self.gate_up, self.down)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def leave_rows(self, num_rows: tuple[int, int, int, int]) -> None:
        """Codes of any rank, -1 too; CROWDED_EXPERT has more rows than a block, EMPTY_EXPERT none; one has one."""
        shape = (SHAPE.max_ranks, SHAPE.max_tokens, SHAPE.top_k)
        rank = torch.randint(-1, 3, shape, generator=self.generator, dtype=torch.int32)
        local = torch.randint(0, 2, shape, generator=self.generator, dtype=torch.int32)
        rank[..., 1], local[..., 1] = SELF, CROWDED_EXPERT
        rank[0, 0, 0], local[0, 0, 0] = SELF, NUM_EXPERTS - 1
        header = self.group.row_header_WMC
        header[..., 0] = torch.arange(SHAPE.max_tokens, dtype=torch.int32)
        header[..., 1 : 1 + SHAPE.top_k] = torch.where(rank < 0, -1, (rank << 16) | local)
        header[..., 1 + SHAPE.top_k :] = self.random(*shape).view(torch.int32)
        self.group.row_x_WMH.copy_(self.random(SHAPE.max_ranks, SHAPE.max_tokens, SHAPE.hidden_size))
        self.group.num_rows_W.copy_(torch.tensor(num_rows))

    def run(self) -> torch.Tensor:
        rows = torch.full((*self.group.row_x_WMH.shape[:2], SHAPE.top_k, SHAPE.hidden_size), float("nan"))
        self.experts.run(rows)
        return rows

    def wanted(self) -> torch.Tensor:
        received = received_entries(self.group, MEMBERS)
        rows = torch.full((SHAPE.max_ranks * SHAPE.max_tokens, SHAPE.top_k, SHAPE.hidden_size), float("nan"))
        rows[received.row_N, received.k_N] = expert_rows(received, self.gate_up, self.down)
        return rows.view(SHAPE.max_ranks, SHAPE.max_tokens, SHAPE.top_k, SHAPE.hidden_size)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def case_ragged_rows(directory: Path) -> None:
    rig = Rig(directory)
    for num_rows in ((40, 33, 40, 40), (0, 0, 0, 40), (1, 0, 0, 0), (0, 17, 7, 0)):
        rig.leave_rows(num_rows)
        assert_close(rig.run(), rig.wanted())
        counts = rig.experts.num_entries_E.tolist()
        assert counts[EMPTY_EXPERT] == 0
        assert counts[CROWDED_EXPERT] == sum(num_rows[:3])  # row 3 is of no member
        assert counts[NUM_EXPERTS - 1] == (num_rows[0] > 0)


def case_a_row_is_the_same_in_every_batch(directory: Path) -> None:
    """Bits: alone, in another place, among others, with other programs and tensor copies."""
    rig = Rig(directory)
    rig.leave_rows((40, 33, 40, 40))
    full = rig.run()
    plan = rig.experts.plan
    for programs, tma in ((1, True), (7, False)):
        gate_up = replace(plan.gate_up, programs_per_processor=programs, tma=tma)
        down = replace(plan.down, programs_per_processor=programs, tma=tma)
        rig.experts.plan = replace(plan, gate_up=gate_up, down=down)
        assert torch.equal(rig.run().nan_to_num(0.5), full.nan_to_num(0.5))
    header, x = rig.group.row_header_WMC.clone(), rig.group.row_x_WMH.clone()
    for source, row in ((0, 0), (2, 39), (1, 17)):
        rig.leave_rows((0, 0, 1, 0))
        rig.group.row_header_WMC[2, 0] = header[source, row]
        rig.group.row_x_WMH[2, 0] = x[source, row]
        alone = rig.run()[2, 0]
        assert torch.equal(alone.nan_to_num(0.5), full[source, row].nan_to_num(0.5))
        assert not alone[1].isnan().any()


def case_reduced(directory: Path) -> None:
    rig = Rig(directory)
    rig.leave_rows((40, 33, 2, 40))
    rows = torch.full((SHAPE.max_ranks, SHAPE.max_tokens, SHAPE.hidden_size), float("nan"))
    rig.experts.run_reduced(rows)
    received = received_entries(rig.group, MEMBERS)
    first_R, sum_RH = sum_of_each_row(expert_rows(received, rig.gate_up, rig.down), received, SHAPE.top_k)
    assert_close(rows.view(-1, SHAPE.hidden_size)[received.row_N[first_R]], torch.from_numpy(sum_RH))
    assert rows[1, 33:].isnan().all() and rows[3].isnan().all()


def case_rows_in_float8(directory: Path) -> None:
    shape = EpShape(max_ranks=2, max_tokens=9, top_k=2, hidden_size=256, dispatch_dtype=torch.float8_e4m3fn)
    layout = HeapLayout.build(shape)
    heap = ShmProvider(directory).allocate("heap", layout.nbytes)
    layout.format(heap.bytes_U8)
    group = DeviceGroup(layout, heap, 0, deadline_s=1.0)
    group.map_peer(1, heap)
    group.adopt(1, [0, 1], 0, in_band=True)
    generator = torch.Generator().manual_seed(6)
    gate_up, down = (torch.randn(*size, generator=generator) / 9 for size in ((2, 2, 32, 256), (2, 256, 32)))
    x_WMH = torch.randn(2, 9, 256, generator=generator)
    q_SH, scale_SG = quantise(x_WMH.view(18, 256))
    group.row_x_WMH.copy_(q_SH.view(2, 9, 256))
    group.row_scale_WMG.copy_(scale_SG.view(2, 9, 2))
    group.row_header_WMC[..., 1:3] = torch.tensor([0, 1], dtype=torch.int32)
    group.num_rows_W.copy_(torch.tensor([9, 5]))
    rows = torch.full((2, 9, 2, 256), float("nan"))
    ExpertMlp(group, gate_up, down).run(rows)
    for k in range(2):
        wanted = mlp(dequantise(q_SH, scale_SG), gate_up[k], down[k]).view(2, 9, 256)
        assert_close(rows[0, :, k], wanted[0])
        assert_close(rows[1, :5, k], wanted[1, :5])
    assert rows[1, 5:].isnan().all()


def case_void_rounds_compute_nothing(directory: Path) -> None:
    rig = Rig(directory)
    rig.leave_rows((40, 33, 40, 40))
    rig.group.poison_members()
    assert rig.run().isnan().all()
    assert not rig.experts.num_entries_E.any()
    rows = torch.full((SHAPE.max_ranks, SHAPE.max_tokens, SHAPE.hidden_size), float("nan"))
    rig.experts.run_reduced(rows)
    assert rows.isnan().all()


def case_experts_change_in_place(directory: Path) -> None:
    rig = Rig(directory)
    rig.leave_rows((5, 0, 0, 0))
    before = rig.run()
    rig.gate_up[CROWDED_EXPERT] = rig.random(2, INTERMEDIATE, SHAPE.hidden_size)
    assert_close(rig.run(), rig.wanted())
    assert not torch.equal(rig.run()[0, 0, 1], before[0, 0, 1])


def case_between_dispatch_and_combine(directory: Path) -> None:
    """A group of one: tokens in, the layer's output out."""
    shape = EpShape(max_ranks=1, max_tokens=5, top_k=2, hidden_size=32)
    layout = HeapLayout.build(shape)
    heap = ShmProvider(directory).allocate("one", layout.nbytes)
    layout.format(heap.bytes_U8)
    group = DeviceGroup(layout, heap, 0, deadline_s=1.0)
    group.adopt(1, [0], 0)
    group.allgather(torch.zeros(8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    generator = torch.Generator().manual_seed(5)
    gate_up, down = (torch.randn(*size, generator=generator) / 5 for size in ((3, 2, 16, 32), (3, 32, 16)))
    experts = ExpertMlp(group, gate_up, down)
    x_TH, weight_TK = torch.randn(5, 32, generator=generator), torch.rand(5, 2, generator=generator)
    local_TK = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [0, 2]], dtype=torch.int32)
    rank_TK = torch.tensor([[0, 0], [0, -1], [-1, -1], [0, 0], [-1, 0]], dtype=torch.int32)
    wanted = torch.zeros(5, 32)
    for token, k in (rank_TK == 0).nonzero().tolist():
        expert = int(local_TK[token, k])
        wanted[token] += weight_TK[token, k] * mlp(x_TH[token, None], gate_up[expert], down[expert])[0]
    for ordered in (True, False):
        group.dispatch(x_TH, rank_TK, local_TK, weight_TK)
        out_TH = torch.full((5, 32), float("nan"))
        if ordered:
            rows = torch.full((1, 5, 2, 32), float("nan"))
            experts.run(rows)
        else:
            rows = torch.full((1, 5, 32), float("nan"))
            experts.run_reduced(rows)
        group.combine(rows, out_TH, ordered=ordered)
        assert group.void_reason() is None
        assert_close(out_TH, wanted)


def case_wrong_use(directory: Path) -> None:
    rig = Rig(directory)
    gate_up, down = rig.gate_up, rig.down

    def refused(message: str, act: Callable[[], object]) -> None:
        try:
            act()
        except ValueError as caught:
            assert message in str(caught), caught
            return
        raise AssertionError(f"accepted: {message}")

    refused("gate_up must be", lambda: ExpertMlp(rig.group, gate_up.view(-1, SHAPE.hidden_size), down))
    refused("gate_up must be", lambda: ExpertMlp(rig.group, gate_up[:2], down))
    refused("gate_up must be", lambda: ExpertMlp(rig.group, gate_up.bfloat16(), down))
    refused("down must be", lambda: ExpertMlp(rig.group, gate_up, down.mT.contiguous().mT))
    refused("intermediate_size must be a multiple", lambda: plan_experts(64, 40, on_gpu=False))
    refused("hidden_size must be a multiple", lambda: plan_experts(20, 48, on_gpu=False))
    rows = torch.zeros(SHAPE.max_ranks, SHAPE.max_tokens, SHAPE.top_k, SHAPE.hidden_size)
    refused("rows must be", lambda: rig.experts.run(rows[:, :, 0]))
    refused("rows must be", lambda: rig.experts.run(rows.bfloat16()))
    refused("rows must be", lambda: rig.experts.run_reduced(rows))


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


def main() -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        answer = "ok"
        try:
            with tempfile.TemporaryDirectory(prefix=own_directory_prefix(os.getpid()), dir="/dev/shm") as root:
                case(Path(root))
        except BaseException:
            answer = traceback.format_exc()
        print(json.dumps({"case": name, "answer": answer}), flush=True)


if __name__ == "__main__":
    main()
