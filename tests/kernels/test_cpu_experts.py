"""Compiled expert rows: what they compute, and bits that depend on the row and its expert only.

Legend: E expert slots, F floats of a packed expert, R rows, S row slots, T tokens, K experts per token, H hidden.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.experts import ExpertTable, combine_ordered, expert_rows
from tests.kernels.cpu_levels import HERE, at_level

SIZES = [(64, 32), (40, 24), (20, 7)]


def experts(hidden: int, inter: int, count: int = 5) -> tuple[Tensor, ExpertTable]:
    """Slot 2 is empty."""
    packed_EF = torch.randn(count, 3 * hidden * inter) * 0.3
    table = ExpertTable(hidden, inter, count)
    for slot in set(range(count)) - {2}:
        table.put(slot, packed_EF[slot])
    return packed_EF, table


def meaning(x_RH: Tensor, packed_F: Tensor, inter: int) -> Tensor:
    """In float64."""
    hidden = x_RH.shape[1]
    gate_up_HG = packed_F[: 2 * hidden * inter].double().view(hidden, 2 * inter)
    down_IH = packed_F[2 * hidden * inter :].double().view(inter, hidden)
    gate_RI, up_RI = (x_RH.double() @ gate_up_HG).chunk(2, dim=1)
    out_RH: Tensor = (torch.nn.functional.silu(gate_RI) * up_RI) @ down_IH
    return out_RH


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_rows_are_those_of_their_experts(hidden: int, inter: int) -> None:
    torch.manual_seed(hidden)
    packed_EF, table = experts(hidden, inter)
    x_SH = torch.randn(30, hidden + 5)[:, 2 : 2 + hidden]  # rows that lie apart
    # More rows of one expert than are worked on together.
    expert_R = torch.tensor([0] * 150 + [4, 1, 4, 3])
    row_R = torch.randint(0, 30, (154,))
    got = expert_rows(x_SH, row_R, expert_R, table)
    for expert in (0, 1, 3, 4):
        chosen = expert_R == expert
        expected = meaning(x_SH[row_R[chosen]], packed_EF[expert], inter)
        assert torch.allclose(got[chosen].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_bits_depend_neither_on_company_nor_on_order_nor_on_the_processor(hidden: int, inter: int) -> None:
    torch.manual_seed(inter)
    rng = np.random.default_rng(inter)
    _, table = experts(hidden, inter)
    x_SH = torch.randn(50, hidden)
    row_R, expert_R = torch.arange(50), torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (50,))]
    expected = expert_rows(x_SH, row_R, expert_R, table)
    for size in (1, 2, 9, 33, 50):
        chosen = torch.from_numpy(rng.permutation(50)[:size])
        for level in HERE:
            with at_level(level):
                assert torch.equal(expert_rows(x_SH, row_R[chosen], expert_R[chosen], table), expected[chosen])


def test_silu_is_right_to_the_last_bits_everywhere() -> None:
    """Of an expert with one input, all weights one: silu(x) * x."""
    table = ExpertTable(1, 1, 1)
    table.put(0, torch.ones(3))
    x = torch.cat((torch.linspace(-86, 100, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-6])))
    got = expert_rows(x[:, None], torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64), table)[:, 0]
    assert torch.allclose(got.double(), torch.nn.functional.silu(x.double()) * x.double(), rtol=5e-7, atol=1e-37)
    far = expert_rows(torch.tensor([[-200.0], [float("nan")]]), torch.arange(2), torch.tensor([0, 0]), table)
    assert abs(float(far[0, 0])) < 1e-33 and bool(far[1, 0].isnan())


def test_rows_without_input_or_expert_are_refused() -> None:
    _, table = experts(20, 7)
    x_SH = torch.randn(3, 20)
    for row, expert in ((3, 0), (-1, 0), (0, 5), (0, -1), (0, 2)):
        with pytest.raises(ValueError, match="1 of 2 rows name a row or an expert that is not there"):
            expert_rows(x_SH, torch.tensor([0, row]), torch.tensor([1, expert]), table)
    with pytest.raises(ValueError, match="rows must be fp32"):
        expert_rows(x_SH.double(), torch.tensor([0]), torch.tensor([0]), table)
    with pytest.raises(ValueError, match="indices must be int64"):
        expert_rows(x_SH, torch.tensor([0]), torch.tensor([0, 1]), table)
    with pytest.raises(ValueError, match="an expert is 420 floats"):
        table.put(2, torch.zeros(419))
    none = torch.zeros(0, dtype=torch.int64)
    assert expert_rows(x_SH, none, none, table).shape == (0, 20)


def test_the_sum_has_one_order_and_rounds_every_product() -> None:
    torch.manual_seed(0)
    rows_TKH, weight_TK = torch.randn(7, 6, 37), torch.randn(7, 6)
    expected = torch.zeros(7, 37)
    for k in range(6):
        expected += rows_TKH[:, k] * weight_TK[:, k, None]
    for level in HERE:
        with at_level(level):
            assert torch.equal(combine_ordered(rows_TKH, weight_TK), expected)
