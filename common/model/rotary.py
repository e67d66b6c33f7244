"""Rotary positions: pairs of dimensions as complex numbers, turned by angles that grow with the position."""

import math

import torch
from torch import Tensor

from common.model.architecture import Yarn
from common.model.config import ModelConfig


def turns(config: ModelConfig) -> Tensor:
    """attention_factor * (cosine, sine) of every position's angles: fp32 [max_position_embeddings, rotary / 2, 2]."""
    dim, rope = config.attention.rotary_dim, config.rope
    frequency = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    if rope.yarn is not None:
        frequency = _slowed_down(frequency, rope.theta, rope.yarn)
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float)[:, None] * frequency
    turn_Ph2 = torch.stack((angle.cos(), angle.sin()), dim=2)
    return turn_Ph2 if rope.yarn is None else turn_Ph2 * rope.yarn.attention_factor


def pair_order(dim: int, interleaved: bool) -> Tensor:
    """Rotary dimensions reordered so that the two of a pair are neighbours."""
    order = torch.arange(dim)
    return order if interleaved else order.view(2, -1).t().reshape(-1)


def _slowed_down(frequency: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """YaRN's frequencies (`architecture.Yarn`), from fully turning pairs to those slowed down by the factor."""
    dim = 2 * len(frequency)

    def pair_with(num_turns: float) -> float:
        """The pair, as a real number, that makes so many turns within the original context."""
        turns_of_first = yarn.original_max_position_embeddings / (2 * math.pi)
        return dim * math.log(turns_of_first / num_turns) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slow = ((torch.arange(len(frequency)) - low) / (high - low)).clamp(0, 1)
    return frequency / yarn.factor * slow + frequency * (1 - slow)
