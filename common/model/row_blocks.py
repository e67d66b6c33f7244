"""Row blocks of a fixed size: why a row's bits do not depend on who shares its batch.

A matrix product picks its kernel, and with it the order of its sums, by the shape; so the bits of a row differ
between a batch of 1 and a batch of 7. Here every product has 16 rows, the rest of the last block anything finite. In a
block of fixed shape a row's bits do not depend on its place or on its neighbours (measured; the tests check it on the
machine at hand, tests/unit/model/test_batch_invariance.py). The other operations are row-wise sums over
the last dimension, IEEE basic operations, and `exp`, whose vector body and scalar tail agree bit for bit. torch's own
sigmoid and silu do not: their tails use another exp, so an element's bits depend on its place. Hence `sigmoid` and
`silu` below. One thread per process is assumed (torch.set_num_threads(1)).

Legend: R rows, B blocks of ROW_BLOCK rows, K inner size, N outer size.
"""

import math

import torch
from torch import Tensor

ROW_BLOCK = 16


def num_padded(num_rows: int) -> int:
    """The smallest multiple of ROW_BLOCK that is not below num_rows."""
    return -(-num_rows // ROW_BLOCK) * ROW_BLOCK


def pad_rows(x_RK: Tensor) -> Tensor:
    """x_RK with zero rows appended up to whole blocks; x_RK itself when nothing is missing."""
    num_rows = x_RK.shape[0]
    if num_rows % ROW_BLOCK == 0:
        return x_RK
    padded = x_RK.new_zeros((num_padded(num_rows), *x_RK.shape[1:]))
    padded[:num_rows] = x_RK
    return padded


def linear(x_RK: Tensor, weight_KN: Tensor) -> Tensor:
    """x_RK @ weight_KN in blocks of 16 rows; R must be a multiple of 16. The weight is stored input-major."""
    num_rows = x_RK.shape[0]
    if num_rows == ROW_BLOCK:
        return torch.mm(x_RK, weight_KN)
    assert num_rows % ROW_BLOCK == 0
    out_RN = x_RK.new_empty((num_rows, weight_KN.shape[1]))
    for start in range(0, num_rows, ROW_BLOCK):
        stop = start + ROW_BLOCK
        torch.mm(x_RK[start:stop], weight_KN, out=out_RN[start:stop])
    return out_RN


def input_major(weight_NK: Tensor) -> Tensor:
    """fp32 [K, N], contiguous: a stored weight as `linear` wants it. A copy."""
    return weight_NK.t().to(torch.float32).contiguous()


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as x / sqrt(sum(x^2) + K eps) * (weight sqrt(K)).

    The weight may have more dimensions than that, say one row for each head.
    """

    def __init__(self, weight_K: Tensor, eps: float) -> None:
        size = weight_K.shape[-1]
        self._weight_K = weight_K * math.sqrt(size)
        self._eps = eps * size

    def run(self, x_RK: Tensor) -> Tensor:
        scale_R1 = (x_RK * x_RK).sum(-1, keepdim=True).add_(self._eps).rsqrt_()
        return (x_RK * scale_R1).mul_(self._weight_K)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) without torch.sigmoid, whose bits depend on an element's place (module docstring)."""
    return x.neg().exp_().add_(1.0).reciprocal_()


def softmax(x_RK: Tensor) -> Tensor:
    """exp(x - max) / sum over the last dimension."""
    weight_RK = (x_RK - x_RK.amax(-1, keepdim=True)).exp_()
    return weight_RK / weight_RK.sum(-1, keepdim=True)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x / x.neg().exp_().add_(1.0)
