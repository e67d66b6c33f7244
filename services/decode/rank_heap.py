"""What lies in the heap of a decode rank, and the peers' heaps as mapped here.

One heap a life: a process that leaves its slot unlinks it and makes another, so nobody can mistake one life for the
next. Its name is known before its size is, since the name travels in Hello and the size follows from the model.
"""

from pathlib import Path

import torch

from common.config import DecodeConfig
from common.ids import Incarnation, ProcessId, Rank
from common.messages import Member
from common.model.checkpoint import Checkpoint
from common.model.kv_cache import kv_cache_shape
from common.placement import num_local_experts, num_staging_experts
from kernels.heap_layout import EpShape, HeapLayout
from kernels.symmetric_memory.base import HeapError, HeapProvider, PeerHeap
from services.decode.expert_slots import NUM_TAG_WORDS, ExpertRows
from services.decode.round_header import NUM_HEADER_WORDS


def heap_name(process: ProcessId, life: int) -> str:
    return f"{process}.{life}.heap"


def rank_heap_layout(checkpoint: Checkpoint, decode: DecodeConfig) -> HeapLayout:
    """The layout that follows from model and configuration, hence the same in every rank."""
    model = checkpoint.config
    num_slots = model.num_moe_layers * num_local_experts(decode, model.n_routed_experts)
    num_rows = num_slots + num_staging_experts(decode, model.n_routed_experts)
    return HeapLayout.build(
        EpShape(
            max_ranks=decode.max_ranks,
            max_tokens=decode.max_batch + decode.prompt_tokens,
            top_k=model.num_experts_per_tok,
            hidden_size=model.hidden_size,
            num_header_words=NUM_HEADER_WORDS,
        ),
        {
            "expert_weights": ((num_rows, checkpoint.expert_layout.row_size), torch.float32),
            "expert_tags": ((num_rows, NUM_TAG_WORDS), torch.int64),
            "kv_cache": (kv_cache_shape(model, decode.num_kv_blocks, decode.block_size), torch.float32),
        },
    )


class PeerHeaps:
    """Heaps of other slots, each under the incarnation that it was mapped for."""

    def __init__(self, provider: HeapProvider, layout: HeapLayout) -> None:
        self._provider, self._layout = provider, layout
        self._mapped: dict[Rank, tuple[Incarnation, PeerHeap]] = {}

    def map(self, member: Member) -> PeerHeap | None:
        """The member's heap if it was not mapped yet, else None. HeapError or ValueError while it does not exist or is
        not formatted: ask again later."""
        mapped = self._mapped.get(member.rank)
        if mapped and mapped[0] == member.incarnation:
            return None
        heap = self._provider.map_peer(f"shm:{self._layout.nbytes}:{Path(member.heap)}")
        try:
            self._layout.verify(heap.bytes_U8, f"the heap of rank {member.rank}")
        except ValueError as error:
            heap.close()
            raise HeapError(str(error)) from None
        self.forget(member.rank)
        self._mapped[member.rank] = (member.incarnation, heap)
        return heap

    def forget(self, rank: Rank) -> None:
        if mapped := self._mapped.pop(rank, None):
            mapped[1].close()

    def ranks(self) -> tuple[Rank, ...]:
        return tuple(self._mapped)

    def expert_rows(self) -> dict[int, ExpertRows]:
        """Expert memory by rank: to be read only."""
        layout = self._layout
        return {
            rank: ExpertRows(layout.view(heap.bytes_U8, "expert_weights"), layout.view(heap.bytes_U8, "expert_tags"))
            for rank, (_, heap) in self._mapped.items()
        }

    def close(self) -> None:
        for rank in self.ranks():
            self.forget(rank)
