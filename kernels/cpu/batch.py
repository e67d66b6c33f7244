"""The rows of one forward pass as the kernels read them, checked once for all layers.

Legend: T tokens, R requests, W block table width, S rows with logits, h rotary pairs.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernels.cpu.library import POINTER, CountingFunction, counting_function
from kernels.cpu.structures import Batch

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the numbers of a batch must stay below, and the turns of all positions: fp32 [num_positions, h, 2]."""

    vocab_size: int
    num_blocks: int
    block_size: int
    turn_Ph2: Tensor


class CheckedBatch:
    """``pointer`` is what the kernels take. Raises ValueError for what is out of range: nothing is read or written."""

    def __init__(
        self,
        token_T: Int64Array,
        position_T: Int64Array,
        request_T: Int64Array,
        block_table_RW: Int64Array,
        logit_index_S: Int64Array,
        bounds: Bounds,
    ) -> None:
        # In one piece: each address that Python asks for takes longer than a copy of all numbers.
        self._numbers = np.concatenate((token_T, position_T, request_T, block_table_RW.ravel(), logit_index_S))
        if self._numbers.dtype != np.int64:
            raise ValueError(f"the numbers of a batch are int64, got {self._numbers.dtype}")
        self.num_tokens, self.num_logits = len(token_T), len(logit_index_S)
        token_at, after_tokens = self._numbers.ctypes.data, 8 * self.num_tokens
        table_at = token_at + 3 * after_tokens
        self._batch = Batch(
            self.num_tokens,
            *block_table_RW.shape,
            self.num_logits,
            token_at,
            token_at + after_tokens,
            token_at + 2 * after_tokens,
            table_at,
            table_at + 8 * block_table_RW.size,
            bounds.vocab_size,
            len(bounds.turn_Ph2),
            bounds.num_blocks,
            bounds.block_size,
            bounds.turn_Ph2.data_ptr(),
        )
        self.pointer = ctypes.addressof(self._batch)
        if fault := _check_batch()(self.pointer):
            raise ValueError(_fault(fault, bounds, len(block_table_RW), self.num_tokens))


def _fault(code: int, bounds: Bounds, num_requests: int, num_tokens: int) -> str:
    what, size = {
        1: ("token id", bounds.vocab_size),
        2: ("position", len(bounds.turn_Ph2)),
        3: ("request index", num_requests),
        4: ("block of a block table", bounds.num_blocks),
        5: ("logit index", num_tokens),
    }[code]
    return f"{what} outside 0..{size - 1}"


@cache
def _check_batch() -> CountingFunction:
    return counting_function("regrow_check_batch", POINTER)
