"""Compiled attention against its meaning in float64, and its bits in every batch, paging and instruction set.

Legend: T tokens, H hidden, N heads, G key heads, D size of a key or value, C floats of a cache row.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.attention import AttentionKernel, AttentionShape, AttentionWeights
from kernels.cpu.batch import Bounds, CheckedBatch
from kernels.cpu.linear import PackedWeight
from tests.kernels.cpu_levels import HERE, at_level

NUM_BLOCKS, NUM_POSITIONS, HIDDEN = 40, 300, 40
SHAPES = {
    # One key head, its beginning is the value; sizes that fill no vector, and more than four vectors.
    "latent": AttentionShape(num_heads=6, num_key_heads=1, key_size=30, value_size=22, value_at=0, num_pairs=4),
    "latent, wide": AttentionShape(num_heads=3, num_key_heads=1, key_size=90, value_size=74, value_at=0, num_pairs=8),
    "grouped": AttentionShape(num_heads=10, num_key_heads=2, key_size=24, value_size=24, value_at=48, num_pairs=12),
    "one for one": AttentionShape(num_heads=3, num_key_heads=3, key_size=16, value_size=16, value_at=48, num_pairs=8),
}


@dataclass
class Layer:
    """The stored weights [outer, H] in float32, and the kernel made of them."""

    shape: AttentionShape
    key_value: Tensor
    query: Tensor
    output: Tensor
    norm: Tensor
    key_norm: Tensor
    query_norm: Tensor | None
    turn: Tensor

    @classmethod
    def random(cls, shape: AttentionShape) -> "Layer":
        is_grouped = shape.value_at > 0
        row_size = shape.num_key_heads * (shape.key_size + shape.value_size) if is_grouped else shape.key_size
        angle = torch.arange(NUM_POSITIONS)[:, None] * 0.7 ** torch.arange(shape.num_pairs)
        return cls(
            shape,
            torch.randn(row_size, HIDDEN) * 0.3,
            torch.randn(shape.num_heads * shape.key_size, HIDDEN) * 0.1,
            torch.randn(HIDDEN, shape.num_heads * shape.value_size) * 0.1,
            torch.rand(HIDDEN) + 0.5,
            torch.rand(shape.key_size if is_grouped else shape.value_size) + 0.5,
            torch.rand(shape.key_size) * 0.3 if is_grouped else None,
            torch.stack((angle.cos(), angle.sin()), dim=2),
        )

    def kernel(self) -> AttentionKernel:
        packed = (PackedWeight(self.key_value), PackedWeight(self.query), PackedWeight(self.output))
        weights = AttentionWeights(self.norm, 1e-6, *packed, self.key_norm, 1e-5, self.query_norm)
        return AttentionKernel(self.shape, weights)

    def meaning(self, x_TH: Tensor) -> Tensor:
        """Of one request's tokens from position 0 on, in float64."""
        shape, num_tokens = self.shape, len(x_TH)
        x = _normed(x_TH.double(), self.norm, 1e-6)
        row = x @ self.key_value.double().T
        keys = row[:, : shape.num_key_heads * shape.key_size].view(num_tokens, shape.num_key_heads, shape.key_size)
        keys = torch.cat(
            (_normed(keys[..., : len(self.key_norm)], self.key_norm, 1e-5), keys[..., len(self.key_norm) :]), -1
        )
        values = keys[..., : shape.value_size]
        if shape.value_at:
            values = row[:, shape.value_at :].view(num_tokens, shape.num_key_heads, shape.value_size)
        query = (x @ self.query.double().T).view(num_tokens, shape.num_heads, shape.key_size)
        if self.query_norm is not None:
            query = _normed(query, self.query_norm, 1e-5)
        keys, query = (self._turned(part) for part in (keys, query))
        repeats = shape.num_heads // shape.num_key_heads
        keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
        score_NTT = torch.einsum("tnd,snd->nts", query, keys)
        unseen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        weight_NTT = score_NTT.masked_fill(unseen, float("-inf")).softmax(-1)
        attended = torch.einsum("nts,snd->tnd", weight_NTT, values).flatten(1)
        return x_TH + attended @ self.output.double().T

    def _turned(self, x_TND: Tensor) -> Tensor:
        start = x_TND.shape[2] - 2 * self.shape.num_pairs
        pairs = torch.view_as_complex(x_TND[..., start:].reshape(*x_TND.shape[:2], -1, 2))
        turn = torch.view_as_complex(self.turn.double())[: len(x_TND), None]
        return torch.cat((x_TND[..., :start], torch.view_as_real(pairs * turn).flatten(2)), -1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def run(
    layer: Layer, x_TH: Tensor, position_T: np.ndarray, request_T: np.ndarray, table: np.ndarray, size: int
) -> Tensor:
    """Rows of one batch; the cache is full of NaN where nobody wrote."""
    row_size = len(layer.key_value)
    cache = torch.full((NUM_BLOCKS * 16, row_size), float("nan"))
    bounds = Bounds(1, NUM_BLOCKS * 16 // size, size, layer.turn)
    none = np.zeros(0, dtype=np.int64)
    batch = CheckedBatch(np.zeros(len(x_TH), dtype=np.int64), position_T, request_T, table, none, bounds)
    out_TH = x_TH.clone()
    layer.kernel().run(batch, cache.data_ptr(), out_TH)
    return out_TH


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_what_it_means(name: str) -> None:
    torch.manual_seed(len(name))
    layer, x_TH = Layer.random(SHAPES[name]), torch.randn(150, HIDDEN)
    table = np.random.default_rng(0).permutation(NUM_BLOCKS)[None]
    got = run(layer, x_TH, np.arange(150), np.zeros(150, dtype=np.int64), table, 16)
    assert torch.allclose(got.double(), layer.meaning(x_TH), atol=1e-4)
    assert float((got - x_TH).abs().mean()) > 0.05, "attention adds too little to tell"


@pytest.mark.parametrize("name", SHAPES)
def test_bits_depend_on_the_request_alone(name: str) -> None:
    torch.manual_seed(len(name))
    rng = np.random.default_rng(len(name))
    layer, x_TH = Layer.random(SHAPES[name]), torch.randn(70, HIDDEN)
    alone = np.zeros(70, dtype=np.int64)
    expected = run(layer, x_TH, np.arange(70), alone, rng.permutation(NUM_BLOCKS)[None], 16)
    # Among two other requests, tokens in any order, other blocks, another block size.
    others_TH, order = torch.randn(110, HIDDEN), rng.permutation(180)
    x = torch.cat((x_TH, others_TH))[torch.from_numpy(order)]
    position = np.concatenate((np.arange(70), np.arange(100), np.arange(10)))[order]
    request = np.repeat([1, 0, 2], (70, 100, 10))[order]
    tables = rng.permutation(NUM_BLOCKS * 2)[:75].reshape(3, 25)
    for level in HERE:
        with at_level(level):
            mixed = run(layer, x, position, request, tables, 8)
        assert torch.equal(mixed[torch.from_numpy(np.argsort(order)[:70])], expected), level
