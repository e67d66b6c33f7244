"""float8 rows: what quantisation does, and that dispatch sends just that."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels.fp8 import GROUP_SIZE, dequantise, quantise
from kernels.heap_layout import EpShape, HeapLayout
from kernels.reference import ElasticGroup
from tests.kernels.local_group import Placement, Tokens, local_group, moe_layer, oracle

SHAPE = EpShape(4, 6, 3, 256, dispatch_dtype=torch.float8_e4m3fn)


def test_quantisation_keeps_the_largest_and_is_near() -> None:
    x_TH = torch.randn(8, 3 * GROUP_SIZE, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [1e-3, 1, 1e3]
    ).repeat_interleave(GROUP_SIZE)
    q_TH, scale_TG = quantise(x_TH)
    assert (q_TH.dtype, scale_TG.shape) == (torch.float8_e4m3fn, (8, 3))
    assert torch.equal(q_TH.float().view(8, 3, -1).abs().amax(2), torch.full((8, 3), 448.0))
    back_TH = dequantise(q_TH, scale_TG)
    # Half of the last of three mantissa bits; below 2**-6 of the scale the steps no longer shrink.
    bound = (x_TH.abs() / 16).maximum(scale_TG.repeat_interleave(GROUP_SIZE, 1) * 2**-10)
    assert ((back_TH - x_TH).abs() <= bound * 1.0001).all()
    assert torch.equal(dequantise(*quantise(torch.zeros(2, GROUP_SIZE))), torch.zeros(2, GROUP_SIZE))
    assert quantise(torch.zeros(0, GROUP_SIZE))[1].shape == (0, 1)


def layer(tokens: Sequence[Tokens], placement: Placement, group: ElasticGroup) -> torch.Tensor | None:
    return moe_layer(group, tokens[group.rank], placement)


def test_experts_get_the_quantised_rows_wherever_they_are(heap_dir: Path) -> None:
    tokens = [Tokens.random(rank, num, 256) for rank, num in enumerate((6, 0, 1, 3))]
    with local_group(heap_dir, shape=SHAPE) as cluster:
        cluster.enter(1, [0, 1, 2, 3])
        for seed in range(2):
            placement = Placement.random(seed, [0, 1, 2, 3])
            out = cluster.run(partial(layer, tokens, placement))
            for rank, mine in enumerate(tokens):
                sent = Tokens(dequantise(*quantise(mine.x_TH)), mine.expert_TK, mine.weight_TK)
                got = out[rank]
                assert got is not None and torch.equal(got, oracle(sent))


def test_rows_are_half_as_large_and_layouts_differ() -> None:
    wide = HeapLayout.build(EpShape(2, 128, 8, 7168, dtype=torch.bfloat16))
    narrow = HeapLayout.build(EpShape(2, 128, 8, 7168, dtype=torch.bfloat16, dispatch_dtype=torch.float8_e4m3fn))
    assert (wide.ep.row_bytes, narrow.ep.row_bytes) == (80 + 14336, 80 + 7168 + 224)
    assert wide.digest != narrow.digest
    with pytest.raises(ValueError, match=r"EpShape\.hidden_size must be a multiple of 128"):
        EpShape(2, 2, 2, 100, dispatch_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"EpShape\.dispatch_dtype"):
        EpShape(2, 2, 2, 128, dispatch_dtype=torch.float16)
