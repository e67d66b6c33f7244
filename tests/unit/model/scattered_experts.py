"""Experts as if spread over a group of ranks, in one process."""

import numpy as np
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from kernels.cpu.experts import combine_ordered, expert_rows


class ScatteredExperts:
    """Stands for a group of ranks: a row goes to a random rank with its expert, in random order, beside strangers."""

    def __init__(self, checkpoint: Checkpoint, num_ranks: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_ranks = num_ranks
        config, layout = checkpoint.config, checkpoint.expert_layout
        self._tables = {
            (layer, rank): layout.table(config.n_routed_experts)
            for layer in config.moe_layers
            for rank in range(num_ranks)
        }
        for layer in config.moe_layers:
            for expert in range(config.n_routed_experts):
                holders = self._rng.permutation(num_ranks)[: self._rng.integers(1, num_ranks + 1)]
                for rank in holders:
                    row = torch.empty(layout.row_size)
                    checkpoint.read_expert(layer, expert, row)
                    self._tables[layer, int(rank)].put(expert, row)

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        expert_R = topk_expert_TK.numpy().reshape(-1)
        tables = [self._tables[layer, rank] for rank in range(self._num_ranks)]
        holders = [[rank for rank, table in enumerate(tables) if table.row(int(e)) is not None] for e in expert_R]
        rank_R = np.array([self._rng.choice(ranks) for ranks in holders], dtype=np.int64)
        token_R = np.repeat(np.arange(x_TH.shape[0]), topk_expert_TK.shape[1])
        rows_RH = torch.empty((len(token_R), x_TH.shape[1]))
        for rank in range(self._num_ranks):
            mine = self._rng.permutation(np.flatnonzero(rank_R == rank))
            strangers = self._rng.integers(0, len(expert_R), 5)
            strangers = strangers[rank_R[strangers] == rank]
            there = np.concatenate([strangers, mine])
            rows, experts = torch.from_numpy(token_R[there]), torch.from_numpy(expert_R[there])
            computed = expert_rows(x_TH, rows, experts, tables[rank])
            rows_RH[torch.from_numpy(mine)] = computed[len(strangers) :]
        return combine_ordered(rows_RH.view(*topk_expert_TK.shape, -1), topk_weight_TK)
