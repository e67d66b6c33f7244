"""The elastic group as the exchange: experts spread over ranks give the bits of all experts in one process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.experts import VoidRound
from common.model.model import Batch
from kernels.cpu.experts import ExpertTable, expert_rows
from kernels.heap_layout import EpShape, HeapLayout
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.shm import ShmProvider
from tests.unit.model.tiny_models import TINY_RANDOM, feed, open_model

NUM_RANKS = 3
GENEROUS_S = 30.0


class ElasticExperts:
    """Rank r holds the experts e with e % NUM_RANKS == r, as local expert e // NUM_RANKS."""

    def __init__(self, checkpoint: Checkpoint, group: ElasticGroup) -> None:
        self._group = group
        config, layout = checkpoint.config, checkpoint.expert_layout
        self._tables: dict[int, ExpertTable] = {}
        for layer in config.moe_layers:
            self._tables[layer] = layout.table(config.n_routed_experts)
            for local, expert in enumerate(range(group.rank, config.n_routed_experts, NUM_RANKS)):
                row = torch.empty(layout.row_size)
                checkpoint.read_expert(layer, expert, row)
                self._tables[layer].put(local, row)

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        received = self._group.dispatch(x_TH, topk_expert_TK % NUM_RANKS, topk_expert_TK // NUM_RANKS, topk_weight_TK)
        if received is None:
            raise VoidRound
        rows_NH = expert_rows(received.x_SH, received.row_N, received.local_expert_N, self._tables[layer])
        out_TH = self._group.combine(rows_NH, received)
        if out_TH is None:
            raise VoidRound
        return out_TH


@contextmanager
def elastic_group(directory: Path, checkpoint: Checkpoint) -> Iterator[list[ElasticGroup]]:
    config = checkpoint.config
    shape = EpShape(NUM_RANKS, max_tokens=64, top_k=config.num_experts_per_tok, hidden_size=config.hidden_size)
    layout = HeapLayout.build(shape)
    provider = ShmProvider(directory)
    heaps = [provider.allocate(f"heap{rank}", layout.nbytes) for rank in range(NUM_RANKS)]
    for heap in heaps:
        layout.format(heap.bytes_U8)
    groups = [ElasticGroup(layout, heap, rank, deadline_s=GENEROUS_S) for rank, heap in enumerate(heaps)]
    for group in groups:
        for peer in range(NUM_RANKS):
            if peer != group.rank:
                group.map_peer(peer, provider.map_peer(heaps[peer].descriptor))
        group.adopt(1, range(NUM_RANKS), digest=1)
    try:
        yield groups
    finally:
        provider.close()
        for rank in range(NUM_RANKS):
            provider.unlink(f"heap{rank}")


def test_a_group_of_ranks_gives_the_bits_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(TINY_RANDOM)
    rng = np.random.default_rng(1)
    # Rank 2 has no tokens and serves its experts all the same.
    prompts = {0: rng.integers(0, 260, 50).tolist(), 1: rng.integers(0, 260, 7).tolist()}
    table = [0, 1, 2, 3]
    expected = {rank: feed(open_model(), [(ids, 0, table)])[0] for rank, ids in prompts.items()}
    got: dict[int, Tensor] = {}

    with elastic_group(tmp_path, checkpoint) as groups:

        def serve(group: ElasticGroup) -> None:
            model = open_model(exchange=ElasticExperts(checkpoint, group))
            assert group.allgather([]) is not None
            if group.rank in prompts:
                got[group.rank] = feed(model, [(prompts[group.rank], 0, table)])[0]
            else:
                got[group.rank] = model.forward(Batch.empty())

        threads = [threading.Thread(target=serve, args=(group,), daemon=True) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GENEROUS_S)
            assert not thread.is_alive(), "a rank hangs"

    assert len(got[2]) == 0
    for rank, logits in expected.items():
        assert torch.equal(got[rank], logits)
