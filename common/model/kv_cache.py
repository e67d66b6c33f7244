"""Paged KV cache: one row per token and layer, in blocks that requests own.

A row is [latent | rotated key] of latent attention, or [rotated keys | values] of all key heads of grouped attention.
The tensor belongs to the caller, who places it in a heap that outlives the process or in plain memory. Position p of a
request lies in block block_table[p // P], row p % P. Rows beyond a request's committed length may hold anything.

Legend: L layers, B blocks, P rows of a block, C row floats, N positions, M entries of a block table.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.model.config import ModelConfig

Int64Array = npt.NDArray[np.int64]


def kv_cache_shape(config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
    """[num_hidden_layers, num_blocks, block_size, kv_row_size], fp32."""
    return (config.num_hidden_layers, num_blocks, block_size, config.kv_row_size)


def kv_block_bytes(config: ModelConfig, block_size: int) -> int:
    """Bytes of one block over all layers."""
    return 4 * config.num_hidden_layers * block_size * config.kv_row_size


def read_kv(kv_cache_LBPC: Tensor, block_table_M: Int64Array, start: int, stop: int) -> Tensor:
    """A copy of the rows of positions start..stop-1: [L, N, C], contiguous; what prefill hands to decode."""
    return kv_cache_LBPC.flatten(1, 2).index_select(1, _rows(kv_cache_LBPC, block_table_M, start, stop))


def write_kv(kv_cache_LBPC: Tensor, block_table_M: Int64Array, start: int, rows_LNC: Tensor) -> None:
    """Writes the rows of positions start..start+N-1; the inverse of read_kv."""
    index = _rows(kv_cache_LBPC, block_table_M, start, start + rows_LNC.shape[1])
    kv_cache_LBPC.flatten(1, 2).index_copy_(1, index, rows_LNC)


def _rows(kv_cache_LBPC: Tensor, block_table_M: Int64Array, start: int, stop: int) -> Tensor:
    block_size = kv_cache_LBPC.shape[2]
    position_N = np.arange(start, stop)
    return torch.from_numpy(block_table_M[position_N // block_size] * block_size + position_N % block_size)
