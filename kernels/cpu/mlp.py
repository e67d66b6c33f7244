"""The second half of a layer: a dense MLP, or routing and shared experts around an exchange; and the head.

Legend: T tokens, H hidden, E routed experts, K experts per token, I intermediate, S rows with logits, V vocabulary.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.cpu import structures
from kernels.cpu.batch import CheckedBatch
from kernels.cpu.library import POINTER, SIZE, CountingFunction, KernelFunction, counting_function, kernel_function
from kernels.cpu.linear import PackedWeight


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight_H; fp32, contiguous."""

    weight_H: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """down(silu(gate x) * up x); gate and up are one weight [2 I, H]."""

    gate_up: PackedWeight
    down: PackedWeight

    @property
    def structure(self) -> structures.Mlp:
        return structures.Mlp(self.gate_up.structure, self.down.structure)


class DenseKernel:
    def __init__(self, norm: Norm, weights: MlpWeights) -> None:
        self._kept = norm, weights
        self._structure = structures.Dense(norm.weight_H.data_ptr(), norm.eps, weights.structure)
        self.pointer = ctypes.addressof(self._structure)

    def run(self, x_TH: Tensor) -> None:
        """x_TH += mlp(norm(x_TH)), fp32, contiguous."""
        if _dense()(self.pointer, len(x_TH), x_TH.data_ptr()):
            raise MemoryError("no memory for an MLP")


@dataclass(frozen=True, slots=True)
class Choice:
    """How experts are chosen from the gate's outputs; bias_E takes part in the choice, not in the weight. With groups,
    experts of the num_kept_groups best remain, a group being as good as the sum of its num_scored best experts."""

    top_k: int
    is_sigmoid: bool
    is_normalised: bool
    scaling: float
    bias_E: Tensor | None = None
    num_groups: int = 1
    num_kept_groups: int = 1
    num_scored: int = 1


@dataclass(frozen=True, slots=True)
class Routed:
    """What the exchange is given, normed_TH, expert_TK int64 and weight_TK, best expert first; and the shared part."""

    normed_TH: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    shared_TH: Tensor | None


class MoeKernel:
    """Routing: equal scores go to the lower expert."""

    def __init__(self, norm: Norm, gate: PackedWeight, choice: Choice, shared: MlpWeights | None) -> None:
        self._kept = norm, gate, choice, shared
        self.num_experts, self.top_k, self.has_shared = gate.outer, choice.top_k, shared is not None
        self._structure = structures.Moe(
            norm.weight_H.data_ptr(),
            None if choice.bias_E is None else choice.bias_E.data_ptr(),
            norm.eps,
            choice.scaling,
            gate.structure,
            structures.Mlp() if shared is None else shared.structure,
            choice.top_k,
            choice.is_sigmoid,
            choice.is_normalised,
            choice.num_groups,
            choice.num_kept_groups,
            choice.num_scored,
        )
        self.pointer = ctypes.addressof(self._structure)

    def route(self, x_TH: Tensor) -> Routed:
        """x_TH fp32, contiguous; not changed."""
        num_tokens = len(x_TH)
        expert_TK = torch.empty(num_tokens, self.top_k, dtype=torch.int64)
        weight_TK, normed_TH = torch.empty(num_tokens, self.top_k), torch.empty_like(x_TH)
        shared_TH = torch.empty_like(x_TH) if self.has_shared else None
        outputs = (normed_TH.data_ptr(), expert_TK.data_ptr(), weight_TK.data_ptr())
        shared = None if shared_TH is None else shared_TH.data_ptr()
        if _route()(self.pointer, x_TH.data_ptr(), num_tokens, *outputs, shared):
            raise MemoryError("no memory for routing")
        return Routed(normed_TH, expert_TK, weight_TK, shared_TH)


def add_experts(x_TH: Tensor, shared_TH: Tensor | None, routed_TH: Tensor) -> None:
    """x_TH += shared_TH + routed_TH, the sum first."""
    if routed_TH.shape != x_TH.shape or routed_TH.dtype != torch.float32 or not routed_TH.is_contiguous():
        raise ValueError(f"routed experts gave {routed_TH.dtype} {list(routed_TH.shape)}, not fp32 {list(x_TH.shape)}")
    shared = None if shared_TH is None else shared_TH.data_ptr()
    _add_experts()(x_TH.data_ptr(), shared, routed_TH.data_ptr(), x_TH.numel())


class HeadKernel:
    def __init__(self, norm: Norm, weight: PackedWeight) -> None:
        self._kept = norm, weight
        self.num_outputs = weight.outer
        self._structure = structures.Head(norm.weight_H.data_ptr(), norm.eps, weight.structure)
        self.pointer = ctypes.addressof(self._structure)

    def run(self, batch: CheckedBatch, x_TH: Tensor) -> Tensor:
        """Logits fp32 [S, V] of the rows that the batch asks for."""
        logits_SV = torch.empty(batch.num_logits, self.num_outputs)
        if _head()(self.pointer, batch.pointer, x_TH.data_ptr(), logits_SV.data_ptr()):
            raise MemoryError("no memory for logits")
        return logits_SV


def embed(batch: CheckedBatch, embedding_VH: Tensor) -> Tensor:
    """fp32 [T, H]; embedding_VH fp32, contiguous, of the batch's vocabulary."""
    x_TH = torch.empty(batch.num_tokens, embedding_VH.shape[1])
    _embed()(batch.pointer, embedding_VH.data_ptr(), embedding_VH.shape[1], x_TH.data_ptr())
    return x_TH


@cache
def _dense() -> CountingFunction:
    return counting_function("regrow_dense", POINTER, SIZE, POINTER)


@cache
def _route() -> CountingFunction:
    return counting_function("regrow_route", POINTER, POINTER, SIZE, POINTER, POINTER, POINTER, POINTER)


@cache
def _add_experts() -> KernelFunction:
    return kernel_function("regrow_add_experts", POINTER, POINTER, POINTER, SIZE)


@cache
def _head() -> CountingFunction:
    return counting_function("regrow_head", POINTER, POINTER, POINTER, POINTER)


@cache
def _embed() -> KernelFunction:
    return kernel_function("regrow_embed", POINTER, POINTER, SIZE, POINTER)
