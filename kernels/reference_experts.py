"""The expert MLP that ``kernels.triton_experts`` computes, in torch: its specification, and what the tests
compare with. For the reduced combine, `sum_of_each_row` of `kernels.received` follows.

One expert's output for a row x: gate = W_gate x, up = W_up x, inner = silu(gate) * up, out = W_down inner. Products and
sums in float32 (or wider); inner and out are rounded to the weights' dtype, so bfloat16 weights mean bfloat16 rows. So
are rows that came in float8 (`kernels.fp8.dequantise`).

Legend: N entries of ``Received``, H hidden_size, I intermediate_size, E local experts, R entries of one expert.
"""

import torch

from kernels.received import Received

ROW_BLOCK = 64


def expert_rows(received: Received, gate_up_E2IH: torch.Tensor, down_EHI: torch.Tensor) -> torch.Tensor:
    """Output of every entry's expert, float32 [N, H], unweighted, as the ordered combine takes it. Rows run in blocks
    of a fixed shape, so a row's bits depend on the row and its expert only.
    """
    out_NH = torch.zeros(received.num_entries, down_EHI.shape[1])
    x_NH = received.x_NH()
    for expert in range(len(down_EHI)):
        chosen = (received.local_expert_N == expert).nonzero()[:, 0]
        for first in range(0, len(chosen), ROW_BLOCK):
            index_R = chosen[first : first + ROW_BLOCK]
            x_BH = torch.zeros(ROW_BLOCK, x_NH.shape[1])
            x_BH[: len(index_R)] = x_NH[index_R].to(down_EHI.dtype)
            out_NH[index_R] = mlp(x_BH, gate_up_E2IH[expert], down_EHI[expert])[: len(index_R)]
    return out_NH


def mlp(x_RH: torch.Tensor, gate_up_2IH: torch.Tensor, down_HI: torch.Tensor) -> torch.Tensor:
    """One expert, in x's dtype (float32 or float64)."""
    gate_RI, up_RI = (x_RH @ weight_IH.to(x_RH.dtype).T for weight_IH in gate_up_2IH)
    inner_RI = (torch.nn.functional.silu(gate_RI) * up_RI).to(down_HI.dtype)
    out_RH: torch.Tensor = inner_RI.to(x_RH.dtype) @ down_HI.to(x_RH.dtype).T
    return out_RH.to(down_HI.dtype).to(x_RH.dtype)
