"""The tensor side of a prefill worker: the whole model and a paged cache of its own. Decides nothing.

KV leaves piece by piece: what the prefix cache knew at once, the rest layer by layer as it is computed. Only a request
that is computed in one chunk, or has lost its place several times, has its KV in one piece, with its token.

Legend: T tokens of a batch, R chunks, W block table width, S rows of logits, V vocabulary, L layers, N tokens of a
request, C row floats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.config import PrefillConfig
from common.messages import TopLogprobs
from common.model.checkpoint import Checkpoint, LoadProgress
from common.model.experts import LocalExperts
from common.model.kv_cache import kv_block_bytes, kv_cache_shape, read_kv
from common.model.model import Batch, Model
from common.model.token_choice import TokenChoice, choose, prompt_logprobs
from services.prefill.prefill_queue import Attempt, Chunk, PrefillLimits


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The next token of one request, and its KV: float32 [L, N, C] in C order, empty when it was pushed in pieces."""

    choice: TokenChoice
    kv: bytes
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of one request: float32 [num_layers, num_tokens, C] in C order, of positions start, start + 1, ..."""

    chunk: Chunk
    first_layer: int
    num_layers: int
    start: int
    num_tokens: int
    kv: bytes


class PrefillEngine:
    """Raises ValueError of one line for a checkpoint that cannot be used."""

    def __init__(
        self,
        path: Path | str,
        config: PrefillConfig,
        block_size: int,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        checkpoint = Checkpoint.open(path, on_progress)
        model, block_bytes = checkpoint.config, kv_block_bytes(checkpoint.config, block_size)
        num_blocks = config.num_kv_blocks + config.prefix_cache_bytes // block_bytes
        cache_LBPC = torch.zeros(kv_cache_shape(model, num_blocks, block_size))
        self._model = Model(checkpoint, LocalExperts(checkpoint), cache_LBPC)
        self.limits = PrefillLimits(model.vocab_size, model.max_position_embeddings, block_bytes)

    def compute(self, chunks: Sequence[Chunk], push: Callable[[Piece], None]) -> dict[Attempt, Prefilled]:
        """Writes the KV of all chunks; results for those that are the last of their request."""
        in_pieces = [chunk for chunk in chunks if chunk.goes_in_pieces]
        num_layers = self._model.config.num_hidden_layers
        for chunk in in_pieces:
            if chunk.is_first and chunk.num_cached:
                push(self._piece(chunk, 0, num_layers, 0, chunk.num_cached))

        def push_layer(layer: int) -> None:
            for chunk in in_pieces:
                push(self._piece(chunk, layer, 1, chunk.start, len(chunk.tokens)))

        logits_SV = self._model.forward(_batch(chunks), push_layer).numpy()
        results, row = {}, 0
        for chunk in chunks:
            num_rows = _num_logits(chunk)
            if chunk.judges_prompt:
                sampling, prompt = chunk.prefill.sampling, chunk.prefill.prompt
                chunk.prompt_logprobs.extend(
                    prompt_logprobs(logits_SV[row : row + num_rows], sampling, prompt, chunk.start)
                )
            row += num_rows
            if chunk.is_last:
                results[chunk.attempt] = self._finish(chunk, logits_SV[row - 1])
        return results

    def _piece(self, chunk: Chunk, first_layer: int, num_layers: int, start: int, num_tokens: int) -> Piece:
        layers_LBPC = self._model.kv_cache_LBPC[first_layer : first_layer + num_layers]
        table = np.array(chunk.block_table, dtype=np.int64)
        kv_LNC = read_kv(layers_LBPC, table, start, start + num_tokens)
        return Piece(chunk, first_layer, num_layers, start, num_tokens, kv_LNC.numpy().tobytes())

    def _finish(self, chunk: Chunk, logits_V: npt.NDArray[np.float32]) -> Prefilled:
        prefill = chunk.prefill
        choice = choose(logits_V, prefill.sampling, prefill.prompt, prefill.outputs)
        num_layers = self._model.config.num_hidden_layers
        kv = b"" if chunk.goes_in_pieces else self._piece(chunk, 0, num_layers, 0, chunk.stop).kv
        return Prefilled(choice, kv, tuple(chunk.prompt_logprobs))


def _num_logits(chunk: Chunk) -> int:
    """Rows of logits that a chunk needs: its last tokens' ones. All of them where the prompt itself is judged."""
    return len(chunk.tokens) if chunk.judges_prompt else int(chunk.is_last)


def _batch(chunks: Sequence[Chunk]) -> Batch:
    tables_RW = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), dtype=np.int64)
    for row, chunk in zip(tables_RW, chunks, strict=True):
        row[: len(chunk.block_table)] = chunk.block_table
    sizes = np.array([len(chunk.tokens) for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    ends = np.cumsum(sizes)
    logit_indices = [np.arange(end - _num_logits(chunk), end) for chunk, end in zip(chunks, ends, strict=True)]
    return Batch(
        token_ids_T=np.array([token for chunk in chunks for token in chunk.tokens], dtype=np.int64),
        position_T=np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes),
        request_index_T=np.repeat(np.arange(len(chunks)), sizes),
        block_table_RW=tables_RW,
        logit_index_S=np.concatenate(logit_indices),
    )
