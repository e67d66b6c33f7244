"""The routed experts of a decode rank: dispatch to where copies live, compute what came, combine. An `ExpertExchange`.

Legend: L mixture-of-experts layers, T own tokens, H hidden, K experts per token, E logical experts, N received entries.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.model.experts import VoidRound
from common.pace import Pace
from common.replica_choice import NUM_COLUMNS, ReplicaChoice
from kernels.compiled_group import CompiledGroup
from kernels.cpu.batch import CheckedBatch
from kernels.cpu.experts import expert_rows
from kernels.cpu.forward import CompiledModel, Copies, RoutedExperts
from kernels.reference import ElasticGroup
from services.decode.expert_slots import ExpertSlots
from services.decode.load_counts import LoadCounts

_Sent = tuple[Tensor, Tensor, Tensor, Tensor]


class ElasticExchange:
    """``moe_layers``: the model's layers with experts. ``enter`` names group and map of an epoch. Not ``ordered``: sums
    depend on which ranks hold the experts."""

    def __init__(
        self,
        slots: ExpertSlots,
        moe_layers: Sequence[int],
        num_logical_experts: int,
        pace: Pace,
        ordered: bool = True,
    ) -> None:
        self._slots, self._pace, self._ordered = slots, pace, ordered
        self._moe_layer = {layer: number for number, layer in enumerate(moe_layers)}
        self._group: ElasticGroup | None = None
        self._experts: RoutedExperts | None = None
        self._choice: ReplicaChoice | None = None
        self._num_sent = 0
        self.has_orphans = False
        self._missed_T: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._num_operations: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self.load = LoadCounts(len(moe_layers), num_logical_experts)

    def enter(self, group: ElasticGroup, choice: ReplicaChoice, has_orphans: bool = False) -> None:
        self._group, self._choice, self.has_orphans = group, choice, has_orphans
        self.load.on_epoch()
        layers = self._moe_layer.values()
        copies = [Copies(*choice.tables(layer), self._slots.table(layer)) for layer in layers]
        self._experts = RoutedExperts(
            copies, NUM_COLUMNS, self.load.tokens_LE, self.load.served_L, self._num_operations
        )

    @property
    def num_operations(self) -> int:
        """Completed so far. From any thread."""
        return int(self._num_operations[0])

    def begin(self, num_tokens: int) -> npt.NDArray[np.bool_]:
        """Before each forward pass. Which of its tokens were routed to an expert without live copy is noted in what
        this returns; such an expert adds nothing to a token, and the weights of its others stay as they are."""
        self._missed_T = np.zeros(num_tokens, dtype=np.bool_)
        self.load.on_pass()
        return self._missed_T

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        """See `common.model.experts.ExpertExchange`. Waits for headers that are due. Raises VoidRound when an operation
        did not complete."""
        assert self._group is not None and self._choice is not None, "no epoch entered"
        group, moe_layer = self._group, self._moe_layer[layer]
        logical_TK = topk_expert_TK.numpy()
        # Any number that differs between tokens will do: which copy serves a token does not change its bits.
        hash_T = np.arange(self._num_sent, self._num_sent + len(logical_TK))
        self._num_sent += len(logical_TK)
        rank_TK, local_TK = self._choice.choose(moe_layer, logical_TK, hash_T)
        if self.has_orphans:
            self._missed_T |= (rank_TK < 0).any(axis=1)
        sent = x_TH, _tensor(rank_TK), _tensor(local_TK), topk_weight_TK
        out_TH, num_served = self._step_by_step(group, moe_layer, sent)
        self.load.on_layer(moe_layer, logical_TK, num_served)
        return out_TH

    def run_pass(self, model: CompiledModel, batch: CheckedBatch) -> Tensor | None:
        """See `common.model.experts.ExpertExchange`. Layer by layer while a fault acts between the operations."""
        group, experts = self._group, self._experts
        assert experts is not None, "no epoch entered"
        if not isinstance(group, CompiledGroup) or not self._ordered or self._pace.factor > 1.0 or group.has_link_fault:
            return None
        self._pace.pause()
        logits_SV = group.run_pass(model, batch, experts)
        if logits_SV is None:
            raise VoidRound
        self._pace.add(group.own_s)
        self._pace.resume()
        if self.has_orphans:
            self._missed_T |= group.missed_T(batch.num_tokens)
        return logits_SV

    def _step_by_step(self, group: ElasticGroup, moe_layer: int, sent: _Sent) -> tuple[Tensor, int]:
        """With this rank's own work between the waits, where a fault can slow it down."""
        self._pace.pause()
        if group.header_due and group.await_headers() is None:
            raise VoidRound
        received = group.dispatch(*sent)
        if received is None:
            raise VoidRound
        self._num_operations[0] += 1
        self._pace.resume()
        rows_NH = expert_rows(received.x_SH, received.row_N, received.local_expert_N, self._slots.table(moe_layer))
        self._pace.pause()
        out_TH = group.combine(rows_NH, received, ordered=self._ordered)
        if out_TH is None:
            raise VoidRound
        self._num_operations[0] += 1
        self._pace.resume()
        return out_TH, received.num_entries


def _tensor(array: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array)
