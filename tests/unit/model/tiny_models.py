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


def token_by_token(model: Model, ids: list[int]) -> torch.Tensor:
    """Logits of each token, the request alone in every round."""
    block_size = model.kv_cache_LBPC.shape[2]
    table = list(range(-(-len(ids) // block_size)))
    return torch.cat([feed(model, [([token], position, table)])[0] for position, token in enumerate(ids)])


def _random_chunks(rng: np.random.Generator, size: int, largest: int) -> list[int]:
    chunks = []
    while size:
        chunks.append(int(rng.integers(1, min(size, largest) + 1)))
        size -= chunks[-1]
    return chunks


def feed_together(model: Model, rng: np.random.Generator, prompts: list[list[int]], largest: int) -> list[torch.Tensor]:
    """All prompts side by side, on shuffled blocks: each round takes chunks of a random subset in random order."""
    num_blocks, block_size = model.kv_cache_LBPC.shape[1:3]
    blocks = rng.permutation(num_blocks).tolist()
    need = [-(-len(ids) // block_size) for ids in prompts]
    tables = [[blocks.pop() for _ in range(count)] for count in need]
    chunks = [_random_chunks(rng, len(ids), largest) for ids in prompts]
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(chunks):
        waiting = [i for i, left in enumerate(chunks) if left]
        chosen = rng.permutation(waiting)[: rng.integers(1, len(waiting) + 1)].tolist()
        work = []
        for i in chosen:
            size = chunks[i].pop(0)
            work.append((prompts[i][done[i] : done[i] + size], done[i], tables[i]))
            done[i] += size
        for i, rows in zip(chosen, feed(model, work), strict=True):
            logits[i].append(rows)
    return [torch.cat(rows) for rows in logits]
