"""Experts as if spread over a group of ranks, in one process."""

import numpy as np
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.experts import ExpertWeights, combine_ordered, expert_rows


class ScatteredExperts:
    """Stands for a group of ranks: a row goes to a random rank with its expert, in random order, beside strangers."""

    def __init__(self, checkpoint: Checkpoint, num_ranks: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_ranks = num_ranks
        config, layout = checkpoint.config, checkpoint.expert_layout
        self._weights: dict[tuple[int, int, int], ExpertWeights] = {}
        for layer in config.moe_layers:
            for expert in range(config.n_routed_experts):
                holders = self._rng.permutation(num_ranks)[: self._rng.integers(1, num_ranks + 1)]
                for rank in holders:
                    row = torch.empty(layout.row_size)
                    checkpoint.read_expert(layer, expert, row)
                    self._weights[layer, int(rank), expert] = layout.views(row)

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        expert_R = topk_expert_TK.numpy().reshape(-1)
        holders = [[r for r in range(self._num_ranks) if (layer, r, int(e)) in self._weights] for e in expert_R]
        rank_R = np.array([self._rng.choice(ranks) for ranks in holders], dtype=np.int64)
        token_R = np.repeat(np.arange(x_TH.shape[0]), topk_expert_TK.shape[1])
        rows_RH = torch.empty((len(token_R), x_TH.shape[1]))
        for rank in range(self._num_ranks):
            mine = self._rng.permutation(np.flatnonzero(rank_R == rank))
            strangers = self._rng.integers(0, len(expert_R), 5)
            strangers = strangers[rank_R[strangers] == rank]
            there = np.concatenate([strangers, mine])
            weights = {int(e): self._weights[layer, rank, int(e)] for e in expert_R[there]}
            computed = expert_rows(x_TH, token_R[there], expert_R[there], weights.__getitem__)
            rows_RH[torch.from_numpy(mine)] = computed[len(strangers) :]
        return combine_ordered(rows_RH.view(*topk_expert_TK.shape, -1), topk_weight_TK)
