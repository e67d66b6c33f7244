"""The tensor side of a prefill worker: the whole model and a paged cache of its own. Decides nothing.

Legend: T tokens of a batch, R chunks, W block table width, S last chunks, V vocabulary, L layers, N tokens of a
request, C row floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.config import PrefillConfig
from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.kv_cache import kv_cache_shape, read_kv
from common.model.model import Batch, Model
from common.model.sampling import sample
from services.prefill.prefill_queue import Attempt, Chunk, PrefillLimits


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The next token of one request, and its KV: float32 [L, N, C] in C order."""

    token: int
    logprob: float
    kv: bytes


class PrefillEngine:
    """Raises ValueError of one line for a checkpoint that cannot be used."""

    def __init__(self, path: Path | str, config: PrefillConfig, block_size: int) -> None:
        checkpoint = Checkpoint.open(path)
        cache_LBPC = torch.zeros(kv_cache_shape(checkpoint.config, config.num_kv_blocks, block_size))
        self._model = Model(checkpoint, LocalExperts(checkpoint), cache_LBPC)
        self.limits = PrefillLimits(checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings)

    def compute(self, chunks: Sequence[Chunk]) -> dict[Attempt, Prefilled]:
        """Writes the KV of all chunks; results for those that are the last of their request."""
        last = [chunk for chunk in chunks if chunk.is_last]
        logits_SV = self._model.forward(_batch(chunks)).numpy()
        return {chunk.attempt: self._finish(chunk, logits_V) for chunk, logits_V in zip(last, logits_SV, strict=True)}

    def _finish(self, chunk: Chunk, logits_V: npt.NDArray[np.float32]) -> Prefilled:
        sampling, table = chunk.prefill.sampling, np.array(chunk.block_table, dtype=np.int64)
        token, logprob = sample(
            logits_V,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            output_index=len(chunk.prefill.outputs),
        )
        kv_LNC = read_kv(self._model.kv_cache_LBPC, table, 0, chunk.start + len(chunk.tokens))
        return Prefilled(token, logprob, kv_LNC.numpy().tobytes())


def _batch(chunks: Sequence[Chunk]) -> Batch:
    tables_RW = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), dtype=np.int64)
    for row, chunk in zip(tables_RW, chunks, strict=True):
        row[: len(chunk.block_table)] = chunk.block_table
    sizes = np.array([len(chunk.tokens) for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    ends = np.cumsum(sizes)
    wanted = np.array([chunk.is_last for chunk in chunks])
    return Batch(
        token_ids_T=np.array([token for chunk in chunks for token in chunk.tokens], dtype=np.int64),
        position_T=np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes),
        request_index_T=np.repeat(np.arange(len(chunks)), sizes),
        block_table_RW=tables_RW,
        logit_index_S=(ends - 1)[wanted],
    )
