"""Changes the memory of a running rank from outside, as a stranger would."""

from pathlib import Path

import numpy as np
import torch

from common.config import DecodeConfig
from common.model.checkpoint import Checkpoint
from services.decode.rank_heap import rank_heap_layout


def zero_experts(heap: Path, model: Path, decode: DecodeConfig) -> int:
    """Overwrites the weights of every expert that the rank holds; returns how many weights were not zero before."""
    layout = rank_heap_layout(Checkpoint.open(model), decode)
    memory = np.memmap(heap, dtype=np.uint8, mode="r+", shape=(layout.nbytes,))
    weights = layout.view(torch.from_numpy(memory), "expert_weights")
    num_overwritten = int(weights.count_nonzero())
    weights.zero_()
    return num_overwritten
