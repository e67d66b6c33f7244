"""Compiled products: every element is one chain of fused multiply-adds, on every instruction set and in every batch."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import library
from kernels.cpu.library import KernelsNotBuilt, open_level
from kernels.cpu.linear import PackedWeight, linear
from tests.kernels.cpu_levels import HERE, at_level

_fmaf = ctypes.CDLL("libm.so.6").fmaf
_fmaf.argtypes, _fmaf.restype = (ctypes.c_float,) * 3, ctypes.c_float


def chain(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """What a product means, one libm call after the other."""
    rows = []
    for x_K in x_RK.tolist():
        row = [0.0] * len(weight_NK)
        for k, x in enumerate(x_K):
            row = [_fmaf(x, w, total) for w, total in zip(weight_NK[:, k].tolist(), row, strict=True)]
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 5, 1), (9, 31, 40), (3, 64, 33), (12, 7, 64)])
def test_an_element_is_a_chain_in_the_order_of_the_inner_index(level: str, rows: int, inner: int, outer: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inner), torch.randn(outer, inner)
    with at_level(level):
        assert torch.equal(linear(x, PackedWeight(weight)), chain(x, weight))


@pytest.mark.parametrize(("inner", "outer"), [(64, 260), (128, 416), (32, 128), (256, 128), (7, 33), (512, 96)])
def test_bits_of_a_row_depend_on_nothing_but_the_row(inner: int, outer: int) -> None:
    torch.manual_seed(inner + outer)
    weight_NK, rows = torch.randn(outer, inner), torch.randn(16, inner)
    weight = PackedWeight(weight_NK)
    expected = linear(rows, weight)
    assert torch.allclose(expected.double(), rows.double() @ weight_NK.double().T, atol=1e-3)
    for num_rows in (16, 17, 23, 40, 64):
        batch = torch.randn(num_rows, inner) * 10.0 ** float(torch.randint(-3, 4, ()))
        place = torch.randperm(num_rows)[:16]
        batch[place] = rows
        assert torch.equal(linear(batch, weight)[place], expected)
        whole = linear(batch, weight)
        for level in HERE:
            with at_level(level):
                assert torch.equal(linear(batch, weight), whole)
    for row in range(16):
        assert torch.equal(linear(rows[row : row + 1], weight)[0], expected[row])


def test_rows_may_lie_apart_and_are_checked() -> None:
    x, weight = torch.randn(5, 24), PackedWeight(torch.randn(10, 16))
    assert torch.equal(linear(x[:, 3:19], weight), linear(x[:, 3:19].clone(), weight))
    for wrong in (x, x[:, :16].double(), torch.randn(16, 5).t()):
        with pytest.raises(ValueError, match="rows must be fp32"):
            linear(wrong, weight)


def test_missing_and_stale_libraries_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "sources_digest", lambda: "other sources")
    with pytest.raises(KernelsNotBuilt, match=r"older than their sources; run `python -m kernels.cpu.build`"):
        open_level("base")
    monkeypatch.setattr(library, "library_path", lambda level: tmp_path / f"{level}.so")
    with pytest.raises(KernelsNotBuilt, match=r"not built; run `python -m kernels.cpu.build`"):
        open_level("base")
