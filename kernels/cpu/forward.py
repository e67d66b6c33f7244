"""A whole forward pass in one call of C, the exchange of its layers included (forward.c).

Legend: T tokens, M most tokens of a rank, H hidden, L mixture layers, E logical experts, K experts per token, C columns
of the replica table, S rows with logits, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.cpu import structures
from kernels.cpu.attention import AttentionKernel
from kernels.cpu.batch import CheckedBatch
from kernels.cpu.exchange import CompiledExchange
from kernels.cpu.experts import ExpertTable
from kernels.cpu.library import POINTER, kernel_function
from kernels.cpu.mlp import DenseKernel, HeadKernel, MoeKernel
from kernels.heap_layout import EpShape

BEGINS, WAITS_FOR_HEADERS, WAITS_FOR_TOKENS, WAITS_FOR_ROWS, DONE, BAD_ROUTING, BAD_ROWS, NO_MEMORY = range(8)

_Int64Array = npt.NDArray[np.int64]


class LayerKernels(NamedTuple):
    """``cache_address``: see `AttentionKernel.run`."""

    attention: AttentionKernel
    cache_address: int
    mlp: DenseKernel | MoeKernel


class CompiledModel:
    """A model's kernels in the order of its layers, but for the routed experts. ``embedding_VH`` fp32, contiguous."""

    def __init__(self, layers: Sequence[LayerKernels], embedding_VH: Tensor, head: HeadKernel) -> None:
        self._kept = tuple(layers), embedding_VH, head
        mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, MoeKernel)]
        self.num_mixtures, self.vocab_size = len(mixtures), head.num_outputs
        self._layers = (structures.Layer * len(layers))(
            *(
                structures.Layer(
                    layer.attention.pointer,
                    layer.cache_address,
                    layer.mlp.pointer if isinstance(layer.mlp, DenseKernel) else None,
                    layer.mlp.pointer if isinstance(layer.mlp, MoeKernel) else None,
                )
                for layer in layers
            )
        )
        self.num_experts = max((mixture.num_experts for mixture in mixtures), default=0)
        self.top_k = max((mixture.top_k for mixture in mixtures), default=0)
        has_shared = any(mixture.has_shared for mixture in mixtures)
        if len({(mixture.num_experts, mixture.top_k, mixture.has_shared) for mixture in mixtures}) > 1:
            raise ValueError("the mixture layers of a model must be alike")
        self._structure = structures.Model(
            ctypes.addressof(self._layers),
            len(layers),
            embedding_VH.data_ptr(),
            head.pointer,
            self.num_experts,
            has_shared,
        )
        self.hidden_size = embedding_VH.shape[1]
        self.pointer = ctypes.addressof(self._structure)


class Copies(NamedTuple):
    """Of one mixture layer: rank and local index of the copy that serves (expert, column), int64 [E * C], contiguous,
    -1 where there is none; and the weights of those that are here."""

    rank_EC: _Int64Array
    local_EC: _Int64Array
    table: ExpertTable


class _Experts(ctypes.Structure):
    """experts_t"""

    _fields_ = [
        ("rank_EC", ctypes.c_void_p),
        ("local_EC", ctypes.c_void_p),
        ("expert_at", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("num_asked_E", ctypes.c_void_p),
        ("num_served", ctypes.c_void_p),
    ]


class RoutedExperts:
    """Where the experts of all mixture layers are under one view. ``asked_LE`` and ``served_L`` (int64, the caller's)
    count what own tokens asked for and what this rank computed, of complete layers; ``num_operations`` (int64 [1]) all
    completed operations, at once."""

    def __init__(
        self,
        copies: Sequence[Copies],
        num_columns: int,
        asked_LE: _Int64Array,
        served_L: _Int64Array,
        num_operations: _Int64Array,
    ) -> None:
        self._kept = tuple(copies), asked_LE, served_L, num_operations
        self.operations_pointer = num_operations.ctypes.data
        self.num_layers, self.num_experts = asked_LE.shape
        size = self.num_experts * num_columns
        for of_layer in copies:
            for places in (of_layer.rank_EC, of_layer.local_EC):
                if places.dtype != np.int64 or places.shape != (size,) or not places.flags.c_contiguous:
                    raise ValueError(f"a replica table is int64 [{size}], got {places.dtype} {places.shape}")
        if len(copies) != self.num_layers or served_L.shape != (self.num_layers,):
            raise ValueError(f"{self.num_layers} layers are counted, {len(copies)} have experts")
        self.num_columns = num_columns
        self.intermediate_size = copies[0].table.intermediate_size if copies else 0
        self._structures = (_Experts * len(copies))(
            *(
                _Experts(
                    of_layer.rank_EC.ctypes.data,
                    of_layer.local_EC.ctypes.data,
                    of_layer.table.pointer,
                    of_layer.table.num_slots,
                    asked_E.ctypes.data,
                    served_L[layer:].ctypes.data,
                )
                for layer, (of_layer, asked_E) in enumerate(zip(copies, asked_LE, strict=True))
            )
        )
        self.pointer = ctypes.addressof(self._structures)


class _Pass(ctypes.Structure):
    """pass_t"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("exchange", "wait", "header")),
        *((name, ctypes.c_void_p) for name in ("x_TH", "normed_TH", "shared_TH", "routed_TH", "weight_TK", "rows_NH")),
        *((name, ctypes.c_void_p) for name in ("expert_TK", "rank_TK", "local_TK")),
        *((name, ctypes.c_void_p) for name in ("model", "batch", "experts")),
        *((name, ctypes.c_int64) for name in ("num_columns", "inter")),
        *((name, ctypes.c_void_p) for name in ("misses_T", "logits_SV", "num_operations")),
        *((name, ctypes.c_int64) for name in ("step", "num_sent", "most_wait_ns", "own_ns")),
        *((name, ctypes.c_int64) for name in ("layer", "moe_layer", "stage")),
    ]


class ForwardPass:
    """The passes of one rank, one after another. ``misses_M`` says which tokens of the last one had an expert without
    live copy."""

    def __init__(self, ep: EpShape, exchange: CompiledExchange) -> None:
        most = ep.max_ranks * ep.max_tokens * ep.top_k
        # Pages that are never written take no memory.
        self._floats = [np.zeros((ep.max_tokens, ep.hidden_size), np.float32) for _ in range(4)]
        self._weight_MK = np.zeros((ep.max_tokens, ep.top_k), np.float32)
        self._rows_NH = np.zeros((most, ep.hidden_size), np.float32)
        self._numbers = [np.zeros((ep.max_tokens, ep.top_k), np.int64) for _ in range(3)]
        self.misses_M = np.zeros(ep.max_tokens, np.bool_)
        self._ep, self._exchange = ep, exchange
        self._kept: tuple[object, ...] = ()
        arrays: list[npt.NDArray[Any]] = [*self._floats, self._weight_MK, self._rows_NH, *self._numbers]
        self._pass = _Pass(*exchange.pointers, *(array.ctypes.data for array in arrays))
        self._pass.misses_T = self.misses_M.ctypes.data
        self._pointer = ctypes.addressof(self._pass)
        self._forward = kernel_function("regrow_forward", POINTER)

    def begin(self, model: CompiledModel, batch: CheckedBatch, experts: RoutedExperts, step: int) -> Tensor:
        """``step``: of the last operation before. What it returns, [S, V], holds the logits when the pass is DONE.
        ValueError for what does not fit together."""
        ep, inside = self._ep, self._pass
        if batch.num_tokens > ep.max_tokens:
            raise ValueError(f"a pass has at most {ep.max_tokens} tokens, got {batch.num_tokens}")
        if (model.hidden_size, model.top_k) != (ep.hidden_size, ep.top_k):
            raise ValueError(f"the model's rows are {model.hidden_size} x {model.top_k}, the group's are others: {ep}")
        if (model.num_mixtures, model.num_experts) != (experts.num_layers, experts.num_experts):
            raise ValueError("the model has other experts than those whose places are given")
        self._kept = model, batch, experts
        logits_SV = torch.empty(batch.num_logits, model.vocab_size)
        inside.model, inside.batch, inside.experts = model.pointer, batch.pointer, experts.pointer
        inside.num_operations = experts.operations_pointer
        inside.num_columns, inside.inter = experts.num_columns, experts.intermediate_size
        inside.logits_SV, inside.step, inside.own_ns, inside.stage = logits_SV.data_ptr(), step, 0, BEGINS
        self.misses_M[: batch.num_tokens] = False
        return logits_SV

    def go_on(self, most_wait_ns: int) -> int:
        """As far as waits of at most this long allow; the stage reached. Behind a wait once the caller has seen
        its words, those of `step`, or the headers."""
        self._pass.most_wait_ns = most_wait_ns
        self._forward(self._pointer)
        return int(self._pass.stage)

    @property
    def step(self) -> int:
        """Of the last operation begun."""
        return int(self._pass.step)

    @property
    def own_s(self) -> float:
        """What the last pass has taken so far, without its waits in C."""
        return int(self._pass.own_ns) / 1e9
