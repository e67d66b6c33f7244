"""Products with weights: rows through a matrix that was packed once, at load.

Legend: R rows, K inner size, N outer size.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.cpu.library import POINTER, SIZE, KernelFunction, kernel_function
from kernels.cpu.structures import Packed

PANEL = 32  # columns that lie together: gemm.h


class PackedWeight:
    """A stored weight [N, K] of any float dtype as the products read it: fp32 panels of 32 columns, input-major."""

    def __init__(self, weight_NK: Tensor) -> None:
        self.outer, self.inner = weight_NK.shape
        num_panels = -(-self.outer // PANEL)
        padded_NK = torch.zeros(num_panels * PANEL, self.inner)
        padded_NK[: self.outer] = weight_NK
        self._panels = padded_NK.view(num_panels, PANEL, self.inner).transpose(1, 2).contiguous()

    @property
    def structure(self) -> Packed:
        """Valid as long as this object."""
        return Packed(self._panels.data_ptr(), self.inner, self.outer)


def linear(x_RK: Tensor, weight: PackedWeight) -> Tensor:
    """x_RK @ weight.T, fp32 [R, N]: each element one chain of fused multiply-adds in the order of K, whatever R."""
    num_rows, inner = x_RK.shape
    if inner != weight.inner or x_RK.dtype != torch.float32 or x_RK.stride(1) != 1:
        raise ValueError(f"rows must be fp32 [rows, {weight.inner}], got {x_RK.dtype} {list(x_RK.shape)}")
    out_RN = torch.empty(num_rows, weight.outer)
    panels = weight.structure.at
    _linear()(x_RK.data_ptr(), x_RK.stride(0), num_rows, panels, inner, weight.outer, out_RN.data_ptr())
    return out_RN


@cache
def _linear() -> KernelFunction:
    return kernel_function("regrow_linear", POINTER, SIZE, SIZE, POINTER, SIZE, SIZE, POINTER)
