"""Launches the kernels of one rank: sizes, offsets and launch plans filled in, nothing checked.

Legend: W max_ranks, M max_tokens, T tokens, K top_k, H hidden_size, N num_header_words, L physical experts of a rank.
"""

from typing import Any

import torch
import triton

from kernels.device_state import CODES, DeviceState
from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import VoidReason
from kernels.heap_layout import HeapLayout
from kernels.launch_plan import LaunchPlan, LaunchPlanner
from kernels.triton_combine import combine_kernel
from kernels.triton_control import allgather_kernel, announce_kernel, barrier_kernel, poison_kernel
from kernels.triton_dispatch import dispatch_kernel
from kernels.triton_wait import ALONE, BARE, STEP_BEFORE_COMBINE, STEP_BEFORE_DISPATCH, VIEWS

_CONTROL_WARPS = 4
_MODES = {
    ElasticMode.VIEWS: VIEWS.value,
    ElasticMode.OFF: VIEWS.value,
    ElasticMode.ALONE: ALONE.value,
    ElasticMode.BARE: BARE.value,
}
DISPATCH_CELL, COMBINE_CELL = STEP_BEFORE_DISPATCH.value, STEP_BEFORE_COMBINE.value


class DeviceLaunch:
    """``load_WL`` int64 on the device, L = 0 if nothing is counted. All go to the current stream."""

    def __init__(
        self,
        layout: HeapLayout,
        state: DeviceState,
        rank: int,
        planner: LaunchPlanner,
        elastic: ElasticMode,
        load_WL: torch.Tensor,
    ) -> None:
        self.planner = planner
        self._layout, self._state, self._rank, self._load_WL = layout, state, rank, load_WL
        self._mode = _MODES[elastic]

    def allgather(self, words_N: torch.Tensor, out_WN: torch.Tensor) -> None:
        allgather_kernel[(1,)](
            self._state.ctl,
            self._state.flags,
            words_N,
            out_WN,
            self._rank,
            WP=triton.next_power_of_2(self._layout.ep.max_ranks),
            POISON=self._offset("ep_poison"),
            MODE=self._mode,
            **self._header_sizes(),
        )

    def announce(self, words_N: torch.Tensor, step: int, digest: int, ranks: list[int]) -> None:
        """The header of ``step`` into the heaps of ``ranks``, before their epoch is adopted."""
        bits = sum(1 << rank for rank in set(ranks))
        signed = bits - (bits >> 63 << 64)
        announce_kernel[(1,)](self._state.ctl, words_N, step, digest, signed, self._rank, **self._header_sizes())

    def barrier(self) -> None:
        barrier_kernel[(1,)](
            self._state.ctl,
            self._state.flags,
            self._rank,
            BARRIER=self._offset("ep_barrier_word"),
            MODE=self._mode,
            **self._control_sizes(),
        )

    def poison(self, reason: VoidReason) -> None:
        poison_kernel[(1,)](self._state.ctl, self._state.flags, self._rank, CODES[reason], **self._control_sizes())

    def dispatch(
        self,
        x_TH: torch.Tensor,
        rank_TK: torch.Tensor,
        local_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        step_in: int = DISPATCH_CELL,
        step_out: int = COMBINE_CELL,
    ) -> None:
        ep = self._layout.ep
        plan = self.planner.dispatch(len(x_TH))
        dispatch_kernel[(plan.num_programs,)](
            self._state.ctl,
            self._state.flags,
            self._load_WL,
            x_TH,
            rank_TK,
            local_TK,
            weight_TK,
            len(x_TH),
            self._rank,
            step_in,
            step_out,
            L=self._load_WL.shape[1],
            X_WORD=ep.row_header_words,
            SCALE_WORD=ep.scale_word,
            IS_FP8=ep.is_fp8,
            WORDS=self._offset("ep_dispatch_word"),
            ROWS=self._offset("ep_dispatch_rows"),
            **self._sizes(plan),
        )

    def combine(
        self,
        expert_rows: torch.Tensor,
        out_TH: torch.Tensor,
        ordered: bool,
        step_in: int = COMBINE_CELL,
        step_out: int = DISPATCH_CELL,
    ) -> None:
        plan = self.planner.combine(len(out_TH), ordered)
        combine_kernel[(plan.num_programs,)](
            self._state.ctl,
            self._state.flags,
            expert_rows,
            out_TH,
            len(out_TH),
            self._rank,
            step_in,
            step_out,
            ORDERED=ordered,
            DISPATCH_WORDS=self._offset("ep_dispatch_word"),
            DISPATCH_ROWS=self._offset("ep_dispatch_rows"),
            WORDS=self._offset("ep_combine_word"),
            ROWS=self._offset("ep_combine_rows"),
            enable_fp_fusion=False,  # every product and every sum is rounded, as in the reference
            **self._sizes(plan),
        )

    def _sizes(self, plan: LaunchPlan) -> dict[str, Any]:
        ep = self._layout.ep
        launch = {"launch_pdl": True} if plan.overlap else {}
        return {
            "W": ep.max_ranks,
            "M": ep.max_tokens,
            "K": ep.top_k,
            "KP": triton.next_power_of_2(ep.top_k),
            "H": ep.hidden_size,
            "ROW_WORDS": ep.row_bytes // 4,
            "POISON": self._offset("ep_poison"),
            "PART": plan.part,
            "NT": 32 * plan.num_warps,
            "OVERLAP": plan.overlap,
            "MODE": self._mode,
            "num_warps": plan.num_warps,
            **launch,
        }

    def _control_sizes(self) -> dict[str, Any]:
        return {
            "W": self._layout.ep.max_ranks,
            "POISON": self._offset("ep_poison"),
            "NT": 32 * _CONTROL_WARPS,
            "num_warps": _CONTROL_WARPS,
        }

    def _header_sizes(self) -> dict[str, Any]:
        ep = self._layout.ep
        return {
            "W": ep.max_ranks,
            "N": ep.num_header_words,
            "NP": triton.next_power_of_2(ep.num_header_words + 1),
            "HEADER": self._offset("ep_header"),
            "NT": 32 * _CONTROL_WARPS,
            "num_warps": _CONTROL_WARPS,
        }

    def _offset(self, region: str) -> int:
        return self._layout.regions[region].offset
