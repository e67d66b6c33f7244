"""Small models for the tests of common/model, and a session that feeds one request to a model."""

from pathlib import Path

import numpy as np
import torch

from common.model.checkpoint import Checkpoint
from common.model.experts import ExpertExchange, LocalExperts
from common.model.kv_cache import Int64Array, kv_cache_shape
from common.model.model import Batch, Model

TINY_RANDOM = Path(__file__).parents[2] / "fixtures" / "tiny-random"


def open_model(
    directory: Path = TINY_RANDOM, num_blocks: int = 64, block_size: int = 16, exchange: ExpertExchange | None = None
) -> Model:
    """The cache starts full of NaN: whoever reads an unwritten row shows it."""
    checkpoint = Checkpoint.open(directory)
    cache = torch.full(kv_cache_shape(checkpoint.config, num_blocks, block_size), float("nan"))
    return Model(checkpoint, exchange or LocalExperts(checkpoint), cache)


def int64(values: object) -> Int64Array:
    return np.asarray(values, dtype=np.int64)


def feed(model: Model, chunks: list[tuple[list[int], int, list[int]]]) -> list[torch.Tensor]:
    """One forward pass over (token ids, first position, block table) of several requests: all logits, per request."""
    lengths = [len(ids) for ids, _, _ in chunks]
    width = max(len(table) for _, _, table in chunks)
    tables = int64([table + [-1] * (width - len(table)) for _, _, table in chunks])
    batch = Batch(
        token_ids_T=int64([token for ids, _, _ in chunks for token in ids]),
        position_T=np.concatenate([np.arange(start, start + len(ids)) for ids, start, _ in chunks]),
        request_index_T=np.repeat(np.arange(len(chunks)), lengths),
        block_table_RW=tables,
        logit_index_S=np.arange(sum(lengths)),
    )
    logits = model.forward(batch)
    ends = np.cumsum(lengths).tolist()
    return [logits[end - length : end] for end, length in zip(ends, lengths, strict=True)]
