"""The expert MLP of one rank on its device: from the rows that dispatch left to the rows that combine sends back.

    dispatch -> run -> combine(ordered=True)      or      dispatch -> run_reduced -> combine(ordered=False)

Everything that changes between rounds (tokens, routing, members, a void round) is read on the device, so the calls go
into the same CUDA graph as the operations around them, without synchronisation.

Legend: W max_ranks, M max_tokens, K top_k, H hidden_size, I intermediate_size, E local physical experts.
"""

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.device_group import DeviceGroup
from kernels.expert_plan import ROW_BLOCK, ExpertPlan, ProductPlan, plan_experts
from kernels.triton_experts import down_kernel, gate_up_kernel, list_entries_kernel, sum_rows_kernel

_LIST_WARPS = 8
_MOST_LISTED, _LEAST_LISTED = 4096, 32  # entries looked at together: of all sources, of one
_SUM_PART = 1024
_MOST_EXPERTS = 1024


class ExpertMlp:
    """``gate_up_E2IH`` [E, 2, I, H] (gate, then up) and ``down_EHI`` [E, H, I], contiguous, in the layout's dtype, on
    the group's device; read where they are at every run, so an expert may be exchanged in place between rounds. Local
    expert e of dispatch's codes is index e. Rows that dispatch sent in float8 are scaled back to the layout's dtype.
    H and I must be multiples of 16. ValueError names what does not fit.
    """

    def __init__(
        self, group: DeviceGroup, gate_up_E2IH: torch.Tensor, down_EHI: torch.Tensor, *, plan: ExpertPlan | None = None
    ) -> None:
        ep = group.layout.ep
        if gate_up_E2IH.dim() != 4 or down_EHI.dim() != 3:
            raise ValueError("gate_up must be [experts, 2, intermediate, hidden], down [experts, hidden, intermediate]")
        num_experts, intermediate_size = down_EHI.shape[0], down_EHI.shape[2]
        if not 1 <= num_experts <= _MOST_EXPERTS:
            raise ValueError(f"down must hold 1..{_MOST_EXPERTS} experts, got {num_experts}")
        _check("gate_up", gate_up_E2IH, (num_experts, 2, intermediate_size, ep.hidden_size), ep.dtype, group.device)
        _check("down", down_EHI, (num_experts, ep.hidden_size, intermediate_size), ep.dtype, group.device)
        on_gpu = group.device.type == "cuda"
        self.plan = plan or plan_experts(ep.hidden_size, intermediate_size, on_gpu=on_gpu)
        self._group = group
        self._num_experts, self._intermediate_size = num_experts, intermediate_size
        self._weights = {"gate_up": gate_up_E2IH, "down": down_EHI}
        most = ep.max_ranks * ep.max_tokens * ep.top_k
        self._counts_E = torch.zeros(num_experts, dtype=torch.int32, device=group.device)
        self._entry_EC = torch.zeros(num_experts, most, dtype=torch.int32, device=group.device)
        self._inner_NI = torch.zeros(most, intermediate_size, dtype=ep.dtype, device=group.device)
        self._rows_WMKH: torch.Tensor | None = None  # of run_reduced
        self._num_processors = 1
        if on_gpu:
            self._num_processors = torch.cuda.get_device_properties(group.device).multi_processor_count

    @property
    def num_entries_E(self) -> torch.Tensor:
        """int32 [E] on the device: entries of each local expert in the last run."""
        return self._counts_E

    def run(self, rows_WMKH: torch.Tensor) -> None:
        """rows[w, r, k] = the output of the expert that code k of source w's row r names, if it is on this rank; other
        rows stay as they are. In the layout's dtype, contiguous.
        """
        ep = self._group.layout.ep
        shape = (ep.max_ranks, ep.max_tokens, ep.top_k, ep.hidden_size)
        _check("rows", rows_WMKH, shape, ep.dtype, self._group.device)
        self.launch_list()
        self.launch_gate_up()
        self.launch_down(rows_WMKH)

    def run_reduced(self, rows_WMH: torch.Tensor) -> None:
        """rows[w, r] = the outputs of this rank's experts for source w's row r, times their weights, added up in
        float32 in top-k order.
        """
        ep = self._group.layout.ep
        _check("rows", rows_WMH, (ep.max_ranks, ep.max_tokens, ep.hidden_size), ep.dtype, self._group.device)
        if self._rows_WMKH is None:
            shape = (ep.max_ranks, ep.max_tokens, ep.top_k, ep.hidden_size)
            self._rows_WMKH = torch.zeros(shape, dtype=ep.dtype, device=self._group.device)
        self.run(self._rows_WMKH)
        part = min(_SUM_PART, triton.next_power_of_2(ep.hidden_size))
        sum_rows_kernel[(self._num_processors, triton.cdiv(ep.hidden_size, part))](
            self._group.heap_U8.data_ptr(),
            self._group.flags,
            self._rows_WMKH,
            rows_WMH,
            self._group.rank,
            W=ep.max_ranks,
            M=ep.max_tokens,
            H=ep.hidden_size,
            DISPATCH_WORDS=self._offset("ep_dispatch_word"),
            PART=part,
            enable_fp_fusion=False,
            **self._row_sizes(),
            **self._overlap(),
        )

    # The steps of ``run``, for measurements.

    def launch_list(self) -> None:
        ep = self._group.layout.ep
        num_sources = triton.next_power_of_2(ep.max_ranks)
        chunk = max(_LEAST_LISTED, _MOST_LISTED // num_sources)
        list_entries_kernel[(self._num_experts,)](
            self._group.heap_U8.data_ptr(),
            self._group.flags,
            self._counts_E,
            self._entry_EC,
            self._group.rank,
            W=ep.max_ranks,
            M=ep.max_tokens,
            DISPATCH_WORDS=self._offset("ep_dispatch_word"),
            C=self._entry_EC.shape[1],
            WP=num_sources,
            CHUNK=min(chunk, triton.next_power_of_2(ep.max_tokens * ep.top_k)),
            num_warps=_LIST_WARPS,
            **self._row_sizes(),
            **self._overlap(),
        )

    def launch_gate_up(self) -> None:
        ep, plan = self._group.layout.ep, self.plan.gate_up
        gate_up_kernel[(self._num_processors * plan.programs_per_processor,)](
            self._group.heap_U8.data_ptr(),
            self._weights["gate_up"],
            self._descriptor("gate_up", plan),
            self._counts_E,
            self._entry_EC,
            self._inner_NI,
            self._num_experts,
            X_WORD=ep.row_header_words,
            SCALE_WORD=ep.scale_word,
            FP8=ep.is_fp8,
            **self._row_sizes(),
            **self._product_sizes(plan),
            **self._overlap(),
        )

    def launch_down(self, rows_WMKH: torch.Tensor) -> None:
        plan = self.plan.down
        down_kernel[(self._num_processors * plan.programs_per_processor,)](
            self._weights["down"],
            self._descriptor("down", plan),
            self._counts_E,
            self._entry_EC,
            self._inner_NI,
            rows_WMKH,
            self._num_experts,
            AHEAD=self.plan.ahead,
            **self._product_sizes(plan),
            **self._overlap(),
        )

    def _descriptor(self, name: str, plan: ProductPlan) -> TensorDescriptor | None:
        if not plan.tma:
            return None
        weight = self._weights[name]
        return TensorDescriptor.from_tensor(weight.view(-1, weight.shape[-1]), [plan.block, plan.block_k])

    def _row_sizes(self) -> dict[str, Any]:
        ep = self._group.layout.ep
        return {"K": ep.top_k, "ROW_WORDS": ep.row_bytes // 4, "DISPATCH_ROWS": self._offset("ep_dispatch_rows")}

    def _product_sizes(self, plan: ProductPlan) -> dict[str, Any]:
        return {
            "C": self._entry_EC.shape[1],
            "EP": triton.next_power_of_2(self._num_experts),
            "H": self._group.layout.ep.hidden_size,
            "I": self._intermediate_size,
            "ROWS": ROW_BLOCK,
            "BN": plan.block,
            "BK": plan.block_k,
            "TMA": plan.tma,
            "num_stages": plan.num_stages,
            "num_warps": plan.num_warps,
        }

    def _overlap(self) -> dict[str, Any]:
        return {"OVERLAP": True, "launch_pdl": True} if self.plan.overlap else {"OVERLAP": False}

    def _offset(self, region: str) -> int:
        return self._group.layout.regions[region].offset


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)} on {device}, got {tensor.dtype} {list(tensor.shape)} "
            f"with strides {list(tensor.stride())} on {tensor.device}"
        )
