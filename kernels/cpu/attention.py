"""One layer's attention in one call: norm, projections, rotation, cache rows, softmax, output, residual.

Legend: T tokens, H hidden, N heads, G key heads, C floats of a cache row.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from kernels.cpu import structures
from kernels.cpu.batch import CheckedBatch
from kernels.cpu.library import POINTER, CountingFunction, counting_function
from kernels.cpu.linear import PackedWeight


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Key head g of a cache row: its key at g * key_size, its value at value_at + g * value_size. The last
    2 * num_pairs floats of a query and a key rotate, as pairs of neighbours."""

    num_heads: int
    num_key_heads: int
    key_size: int
    value_size: int
    value_at: int
    num_pairs: int


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Norms fp32, contiguous. key_value: from the normed input to a cache row. query: from there, or with query_a from
    its normed outputs, to the queries [N, key_size], whose scores need no other scale. query_norm norms each query,
    key_norm the first floats of each key, as many as it has. eps is that of `norm`."""

    norm: Tensor
    eps: float
    key_value: PackedWeight
    query: PackedWeight
    output: PackedWeight
    key_norm: Tensor
    inner_eps: float
    query_norm: Tensor | None = None
    query_a: PackedWeight | None = None
    query_a_norm: Tensor | None = None


class AttentionKernel:
    """Both kinds of attention: attention.c."""

    def __init__(self, shape: AttentionShape, weights: AttentionWeights) -> None:
        self._weights = weights
        none = structures.Packed(None, 0, 0)
        heads = (shape.num_heads, shape.num_key_heads, shape.key_size, shape.value_size, shape.value_at)
        self._structure = structures.Attention(
            weights.key_value.inner,
            weights.key_value.outer,
            shape.num_pairs,
            structures.Heads(*heads),
            none if weights.query_a is None else weights.query_a.structure,
            weights.query.structure,
            weights.key_value.structure,
            weights.output.structure,
            weights.norm.data_ptr(),
            None if weights.query_a_norm is None else weights.query_a_norm.data_ptr(),
            None if weights.query_norm is None else weights.query_norm.data_ptr(),
            weights.key_norm.data_ptr(),
            len(weights.key_norm),
            weights.eps,
            weights.inner_eps,
        )
        self.pointer = ctypes.addressof(self._structure)

    def run(self, batch: CheckedBatch, cache_address: int, x_TH: Tensor) -> None:
        """x_TH += attention(norm(x_TH)), fp32, contiguous; the cache rows of the batch's tokens are written first.

        cache_address: the layer's cache, fp32 [num_blocks, block_size, C] within the batch's bounds. A token's bits
        depend on the request's own rows up to its position and on nothing else.
        """
        if _attention()(self.pointer, batch.pointer, cache_address, x_TH.data_ptr()):
            raise MemoryError("no memory for attention")


@cache
def _attention() -> CountingFunction:
    return counting_function("regrow_attention", POINTER, POINTER, POINTER, POINTER)
