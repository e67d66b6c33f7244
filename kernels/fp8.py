"""Rows of float8 e4m3 with a float32 scale for each 128 elements, as dispatch sends them; in torch. The same bits as
``triton_fp8``.

    amax = max(max |x|, 1e-4)      q = e4m3(x * (448 / amax))      scale = amax * (1 / 448)      x' = q * scale

every step rounded to float32, 1 / 448 a constant; the cast to e4m3 rounds to nearest, ties to even. The floor is
DeepEP's.

Legend: T rows, H hidden_size, G = H / 128 groups.
"""

import torch

GROUP_SIZE = 128
LARGEST = 448.0
ONE_OVER_LARGEST = 1 / 448
SMALLEST_AMAX = 1e-4


def quantise(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [T, H] and float32 scales [T, G] of a float tensor whose H is a multiple of 128."""
    x_TGC = x_TH.float().reshape(len(x_TH), x_TH.shape[1] // GROUP_SIZE, GROUP_SIZE)
    amax_TG = x_TGC.abs().amax(2).clamp_min(SMALLEST_AMAX)
    # A number divided by a tensor would be its reciprocal times the number: other bits.
    factor_TG = torch.full_like(amax_TG, LARGEST) / amax_TG
    q_TGC = (x_TGC * factor_TG[:, :, None]).to(torch.float8_e4m3fn)
    return q_TGC.flatten(1), amax_TG * ONE_OVER_LARGEST


def dequantise(q_TH: torch.Tensor, scale_TG: torch.Tensor) -> torch.Tensor:
    """float32 [T, H]."""
    return (q_TH.float().reshape(*scale_TG.shape, GROUP_SIZE) * scale_TG[:, :, None]).flatten(1)
