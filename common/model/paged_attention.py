"""Attention over a paged cache, as far as its kinds agree; the same code, and the same bits, in prefill and decode.

Work is cut into items: (token, key block), a key block being KEY_BLOCK positions from a multiple of KEY_BLOCK on. All
products of an item have one fixed shape. The maximum over a token's scores is taken over all its blocks first (exact in
any order); then sums run inside a block in a fixed order, and block after block, starting from zero. So a token's
bits depend on the request's own rows up to its position, and on nothing else: not on chunking, on the batch, or on
where blocks lie.

Legend: T tokens, N heads, A items, S keys of a block, P tokens of a part, R requests, W block table width, C row
floats, F rows of the cache.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.model.kv_cache import Int64Array

KEY_BLOCK = 64
# Items computed at a time; bounds the memory of their gathered keys.
_PART_ITEMS = 64


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """Tokens start..stop-1 and their items."""

    start: int
    stop: int
    token_A: Tensor  # counted from start, rising
    key_row_AS: Tensor  # flat [A * S]: cache row of each key
    seen_A1S: Tensor  # 1.0 where the token sees the key, else 0.0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of one forward pass share. Built from the batch by `plan_attention`."""

    cache_row_T: Tensor  # where each token's own row is written; not padded
    parts: tuple[AttentionPart, ...]


def plan_attention(
    position_T: Int64Array, request_T: Int64Array, block_table_RW: Int64Array, block_size: int
) -> AttentionPlan:
    """Items and indices of a batch; arrays are those of `model.Batch`, T > 0 and not padded."""
    blocks_T = position_T // KEY_BLOCK + 1
    ends_T = np.cumsum(blocks_T)
    token_A = np.repeat(np.arange(len(position_T)), blocks_T)
    block_A = np.arange(len(token_A)) - (ends_T - blocks_T)[token_A]
    key_AS = block_A[:, None] * KEY_BLOCK + np.arange(KEY_BLOCK)
    seen_AS = key_AS <= position_T[token_A][:, None]
    # Places past the token read the request's first row, which every token sees: it does not raise the maximum, and it
    # is finite, where zero times whatever lies in unused memory could be NaN.
    read_AS = np.where(seen_AS, key_AS, 0)
    request_A1 = request_T[token_A][:, None]
    key_row_AS = torch.from_numpy(block_table_RW[request_A1, read_AS // block_size] * block_size + read_AS % block_size)
    seen_A1S = torch.from_numpy(seen_AS.astype(np.float32)[:, None])

    part_T = (ends_T - 1) // _PART_ITEMS
    starts = np.flatnonzero(np.diff(part_T, prepend=-1)).tolist()
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(position_T)], strict=True):
        items = slice(int(ends_T[start] - blocks_T[start]), int(ends_T[stop - 1]))
        token_A_of_part = torch.from_numpy(token_A[items] - start)
        parts.append(AttentionPart(start, stop, token_A_of_part, key_row_AS[items].reshape(-1), seen_A1S[items]))
    cache_row_T = block_table_RW[request_T, position_T // block_size] * block_size + position_T % block_size
    return AttentionPlan(torch.from_numpy(cache_row_T), tuple(parts))


class Attention(Protocol):
    """One layer's attention."""

    def run(self, x_TH: Tensor, turn_T1h: Tensor, plan: AttentionPlan, cache_FC: Tensor) -> Tensor:
        """Writes the cache rows of the batch's tokens, then attends. x_TH and the result are padded to row blocks."""
        ...


def softmax_numerators(score_ANS: Tensor, part: AttentionPart) -> Tensor:
    """exp(score - the token's largest score), zero where the token does not see the key; computed in place."""
    num_items, heads = score_ANS.shape[:2]
    top_PN = score_ANS.new_full((part.stop - part.start, heads), float("-inf"))
    top_PN.scatter_reduce_(0, part.token_A[:, None].expand(num_items, heads), score_ANS.amax(-1), "amax")
    score_ANS.sub_(top_PN.index_select(0, part.token_A)[:, :, None])
    # exp is ten times slower where it underflows, so nothing is left below e^-80; what is masked becomes exactly zero.
    return score_ANS.clamp_(min=-80.0).exp_().mul_(part.seen_A1S)
